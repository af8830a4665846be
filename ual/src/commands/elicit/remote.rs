//! Asks a server: threads with a request in flight each, and one writer.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use crate::commands::elicit::{
    answers::Answers,
    args::Args,
    client::{Client, Failure, Passing, Reply},
    limits::{Gate, backoff, sleep},
    progress::Progress,
    prompt::{Template, parse},
    samples::{Cost, Sample},
};

/// Samples that fail, before any has an answer, that show that every request is wrong.
const ALL_FAILED: usize = 5;
/// Answers in a row that cannot be read which show that the model does not keep to the form.
const ALL_UNREAD: usize = 20;
/// How long answers on their way are waited for when the program stops.
const GRACE: Duration = Duration::from_secs(2);
/// Between two looks at the counts.
const TICK: Duration = Duration::from_millis(200);
/// Characters of an answer that are shown.
const SHOWN: usize = 80;

/// What the threads share.
struct Shared {
    client: Client,
    template: Template,
    samples: Arc<[Sample]>,
    attempts: usize,
    retries: u32,
    backoff: Duration,
    max_wait: Duration,
    /// A sample's index, once for each answer it lacks.
    jobs: Mutex<VecDeque<usize>>,
    gate: Gate,
    stop: AtomicBool,
    replies: AtomicU64,
    repeated: AtomicU64,
    /// Answers since the last one that could be read.
    unread: AtomicUsize,
    /// Of earlier runs' answers and of this one's requests.
    cost: Mutex<Cost>,
}

/// Why there is no answer.
enum Missing {
    Fatal(anyhow::Error),
    /// Of this sample. Failed: there was no answer at all, not one that cannot be used.
    Unanswered {
        reason: String,
        failed: bool,
    },
    /// The program ends.
    Stopped,
}

/// An uncertainty, and what it and the answers before it that could not be used have cost.
type Answer = Result<(f64, Cost), Missing>;

/// Asks for every answer that is missing. Puts the samples that lack one in the end into `missing`, by index, with the last
/// reason.
pub fn score(
    args: &Args,
    samples: &Arc<[Sample]>,
    answers: &mut Answers,
    missing: &mut BTreeMap<usize, String>,
) -> Result<()> {
    let model = args.model();
    let jobs: VecDeque<usize> = (0..samples.len())
        .flat_map(|i| std::iter::repeat_n(i, answers.missing(i)))
        .collect();
    let total = samples.len() * args.votes;
    let mut progress = Progress::new(total, total - jobs.len());
    let shared = Arc::new(Shared {
        client: Client::new(
            args.base_url(),
            args.key(),
            args.key_header(),
            model,
            args.body()?,
            args.timeout(),
            args.concurrency,
        ),
        template: args.template()?,
        samples: samples.clone(),
        attempts: args.attempts,
        retries: args.retries,
        backoff: args.backoff(),
        max_wait: args.max_wait(),
        jobs: Mutex::new(jobs),
        gate: Gate::default(),
        stop: AtomicBool::new(false),
        replies: AtomicU64::new(0),
        repeated: AtomicU64::new(0),
        unread: AtomicUsize::new(0),
        cost: Mutex::new(answers.cost()),
    });
    // A thread waits until its answer is taken: a kill costs an answer a thread at most, and the one that is being written.
    let (sender, results) = mpsc::sync_channel(0);
    for _ in 0..args.concurrency {
        let (shared, sender) = (shared.clone(), sender.clone());
        thread::Builder::new()
            .spawn(move || shared.work(&sender))
            .context("cannot start a thread")?;
    }
    drop(sender);

    let mut failures = BTreeSet::new();
    let mut answered = answers.any();
    let mut fatal = None;
    let mut deadline: Option<Instant> = None;
    loop {
        match results.recv_timeout(TICK) {
            Ok((sample, Ok((answer, cost)))) => {
                answers.add(sample, answer, cost)?;
                answered = true;
                progress.answered();
            }
            Ok((sample, Err(Missing::Unanswered { reason, failed }))) => {
                if failed && failures.insert(sample) && failures.len() == ALL_FAILED && !answered {
                    fatal.get_or_insert(anyhow!("the first requests all failed: {reason}"));
                }
                missing.insert(sample, reason);
                progress.gave_up();
            }
            Ok((_, Err(Missing::Fatal(error)))) => {
                fatal.get_or_insert(error);
            }
            Ok((_, Err(Missing::Stopped))) | Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        progress.show(&shared.message());
        if fatal.is_some() {
            // Answers on their way are paid for: they are taken if they come soon.
            shared.stop.store(true, Relaxed);
            if *deadline.get_or_insert_with(|| Instant::now() + GRACE) <= Instant::now() {
                break;
            }
        }
    }
    progress.finish(&shared.message());
    match fatal {
        None => Ok(()),
        Some(error) => Err(error.context(format!(
            "stopped with {} of {} samples scored; start again to continue",
            answers.done(),
            samples.len()
        ))),
    }
}

impl Shared {
    fn work(&self, results: &SyncSender<(usize, Answer)>) {
        while !self.stop.load(Relaxed) {
            let job = self
                .jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let Some(sample) = job else { return };
            let answer = self.answer(&self.samples[sample]);
            if matches!(answer, Err(Missing::Fatal(_))) {
                self.stop.store(true, Relaxed);
            }
            // The writer has ended if it does not listen, and so has the program.
            if results.send((sample, answer)).is_err() {
                return;
            }
        }
    }

    /// Asks until an answer can be used.
    fn answer(&self, sample: &Sample) -> Answer {
        let prompt = self.template.fill(&sample.prompt, &sample.response);
        let mut last = String::new();
        let mut failed = true;
        let mut cost = Cost::default();
        for _ in 0..self.attempts {
            let reply = self.request(&prompt)?;
            cost += reply.cost;
            last = match reply.text {
                Ok(text) => {
                    if let Some(uncertainty) = parse(&text) {
                        self.unread.store(0, Relaxed);
                        return Ok((uncertainty, cost));
                    }
                    failed = false;
                    let shown = self.client.secrets.hide(text.trim());
                    let mut end: Vec<char> = shown.chars().rev().take(SHOWN).collect();
                    end.reverse();
                    format!("ends with {:?}", end.into_iter().collect::<String>())
                }
                Err(why) => format!("is of no use, {why}"),
            };
            // One sample alone shows nothing of the others.
            let most = ALL_UNREAD.max(self.attempts + 1);
            if self.unread.fetch_add(1, Relaxed) + 1 >= most {
                return Err(Missing::Fatal(anyhow!(
                    "{most} answers in a row could not be read, and each is paid for; the last, to sample {}, {last}. \
                     The last line must be \"Uncertainty: N\", N from 0 to 100",
                    sample.id
                )));
            }
        }
        Err(Missing::Unanswered {
            reason: format!(
                "{} answers that cannot be parsed; the last {last}",
                self.attempts
            ),
            failed,
        })
    }

    /// Sends a request until it has a reply.
    fn request(&self, prompt: &str) -> Result<Reply, Missing> {
        let stopped = || self.stop.load(Relaxed);
        let mut repetition = 0;
        let mut replies = self.replies.load(Relaxed);
        loop {
            let too_long = || self.gate.left() > self.max_wait;
            self.gate.pass(|| stopped() || too_long());
            self.check_wait("a limit is used up", self.gate.left())?;
            if stopped() {
                return Err(Missing::Stopped);
            }
            let (reason, wait, kind) = match self.client.ask(prompt) {
                Ok(reply) => {
                    self.count(&reply);
                    return Ok(reply);
                }
                Err(Failure::Fatal(error)) => return Err(Missing::Fatal(error)),
                Err(Failure::Refused(reason)) => {
                    return Err(Missing::Unanswered {
                        reason,
                        failed: true,
                    });
                }
                Err(Failure::Passing { reason, wait, kind }) => (reason, wait, kind),
            };

            self.check_wait(&reason, wait.unwrap_or_default())?;
            let others = self.replies.load(Relaxed);
            if kind == Passing::Unreachable && others == 0 {
                return Err(Missing::Fatal(anyhow!(reason)));
            }
            if kind == Passing::Limit && others > replies {
                // Others got through since this one last failed: a limit that is shared is not one that stays.
                (repetition, replies) = (0, others);
            }
            if repetition == self.retries {
                let reason = format!("{reason} (given up after {} requests)", repetition + 1);
                return Err(match kind {
                    Passing::Limit | Passing::Unreachable => Missing::Fatal(anyhow!(reason)),
                    Passing::Error => Missing::Unanswered {
                        reason,
                        failed: true,
                    },
                });
            }
            // What the server says may be too little: its clock is another, or many ask.
            let wait = wait
                .unwrap_or_default()
                .max(backoff(self.backoff, repetition).min(self.max_wait));
            if kind == Passing::Limit {
                self.gate.close(wait);
            }
            self.repeated.fetch_add(1, Relaxed);
            repetition += 1;
            sleep(wait, stopped);
        }
    }

    /// Fails where the server asks to wait longer than the user would.
    fn check_wait(&self, reason: &str, wait: Duration) -> Result<(), Missing> {
        if wait <= self.max_wait {
            return Ok(());
        }
        let (wait, most) = (wait.as_secs_f64(), self.max_wait.as_secs_f64());
        Err(Missing::Fatal(anyhow!(
            "{reason}: the server asks to wait {wait:.0} s, and --max-wait is {most} s"
        )))
    }

    fn count(&self, reply: &Reply) {
        self.replies.fetch_add(1, Relaxed);
        *self.cost.lock().unwrap_or_else(PoisonError::into_inner) += reply.cost;
        if let Some(wait) = reply.wait {
            self.gate.close(wait);
        }
    }

    fn message(&self) -> String {
        let Cost {
            prompt_tokens,
            completion_tokens,
        } = *self.cost.lock().unwrap_or_else(PoisonError::into_inner);
        let mut message =
            format!("{prompt_tokens} prompt + {completion_tokens} completion tokens so far");
        let repeated = self.repeated.load(Relaxed);
        if repeated > 0 {
            message += &format!(", {repeated} requests repeated");
        }
        let wait = self.gate.left().as_secs();
        if wait > 0 {
            message += &format!(", requests wait {wait} s");
        }
        message
    }
}
