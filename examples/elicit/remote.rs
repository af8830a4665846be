//! Asks a server: threads with a request in flight each, and one writer.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use rand::Rng;

use crate::{
    answers::Answers,
    args::Args,
    client::{Client, Failure, Passing, Reply},
    limits::{Gate, backoff, sleep},
    progress::Progress,
    prompt::{Template, parse},
    samples::Sample,
};

/// Samples refused, before any has an answer, that show that every request is wrong.
const ALL_REFUSED: usize = 5;
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
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
}

/// Why there is no answer.
enum Missing {
    Fatal(anyhow::Error),
    /// Of this sample. Refused: the server would not have the request.
    Unanswered {
        reason: String,
        refused: bool,
    },
    /// The program ends.
    Stopped,
}

/// Asks for every answer that is missing. Returns the samples that lack one in the end, by index, with the last reason.
pub fn score(
    args: &Args,
    samples: &Arc<[Sample]>,
    answers: &mut Answers,
) -> Result<BTreeMap<usize, String>> {
    let model = args.model.as_deref().context("--model is missing")?;
    let jobs: VecDeque<usize> = (0..samples.len())
        .flat_map(|i| std::iter::repeat_n(i, answers.missing(i)))
        .collect();
    let total = samples.len() * args.votes;
    let mut progress = Progress::new(total, total - jobs.len());
    let shared = Arc::new(Shared {
        client: Client::new(
            &args.base_url,
            args.key(),
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
        gate: Gate::new(),
        stop: AtomicBool::new(false),
        replies: AtomicU64::new(0),
        repeated: AtomicU64::new(0),
        prompt_tokens: AtomicU64::new(0),
        completion_tokens: AtomicU64::new(0),
    });
    let (sender, results) = mpsc::channel();
    for _ in 0..args.concurrency {
        let (shared, sender) = (shared.clone(), sender.clone());
        thread::Builder::new()
            .spawn(move || shared.work(&sender))
            .context("cannot start a thread")?;
    }
    drop(sender);

    let mut missing = BTreeMap::new();
    let mut refusals = BTreeSet::new();
    let mut answered = answers.any();
    let mut fatal = None;
    let mut deadline: Option<Instant> = None;
    loop {
        match results.recv_timeout(TICK) {
            Ok((sample, Ok(answer))) => {
                answers.add(sample, answer)?;
                answered = true;
                progress.answered();
            }
            Ok((sample, Err(Missing::Unanswered { reason, refused }))) => {
                if refused && refusals.insert(sample) && refusals.len() == ALL_REFUSED && !answered
                {
                    fatal.get_or_insert(anyhow!("the first requests were all refused: {reason}"));
                }
                missing.insert(sample, reason);
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
        None => Ok(missing),
        Some(error) => Err(error.context(format!(
            "stopped with {} of {} samples scored; start again to continue",
            answers.done(),
            samples.len()
        ))),
    }
}

impl Shared {
    fn work(&self, results: &Sender<(usize, Result<f64, Missing>)>) {
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

    fn answer(&self, sample: &Sample) -> Result<f64, Missing> {
        let prompt = self.template.fill(&sample.prompt, &sample.response);
        let mut last = None;
        for _ in 0..self.attempts {
            let reply = self.request(&prompt)?;
            if let Some(uncertainty) = reply.text.as_deref().and_then(parse) {
                return Ok(uncertainty);
            }
            last = reply.text;
        }
        let last = last.map_or("the last was empty or cut short".to_string(), |text| {
            let mut end: Vec<char> = text.trim().chars().rev().take(SHOWN).collect();
            end.reverse();
            format!(
                "the last ends with {:?}",
                end.into_iter().collect::<String>()
            )
        });
        Err(Missing::Unanswered {
            reason: format!("{} answers that cannot be parsed; {last}", self.attempts),
            refused: false,
        })
    }

    /// Sends a request until it has a reply.
    fn request(&self, prompt: &str) -> Result<Reply, Missing> {
        let stopped = || self.stop.load(Relaxed);
        let mut repetition = 0;
        loop {
            self.gate.pass(stopped);
            if stopped() {
                return Err(Missing::Stopped);
            }
            let replies = self.replies.load(Relaxed);
            let (reason, wait, kind) = match self.client.ask(prompt) {
                Ok(reply) => {
                    self.count(&reply);
                    return Ok(reply);
                }
                Err(Failure::Fatal(error)) => return Err(Missing::Fatal(error)),
                Err(Failure::Refused(reason)) => {
                    return Err(Missing::Unanswered {
                        reason,
                        refused: true,
                    });
                }
                Err(Failure::Passing { reason, wait, kind }) => (reason, wait, kind),
            };

            if let Some(wait) = wait.filter(|&wait| wait > self.max_wait) {
                let (wait, most) = (wait.as_secs_f64(), self.max_wait.as_secs_f64());
                return Err(Missing::Fatal(anyhow!(
                    "{reason}: the server asks to wait {wait:.0} s, and --max-wait is {most} s"
                )));
            }
            let others = self.replies.load(Relaxed);
            if kind == Passing::Unreachable && others == 0 {
                return Err(Missing::Fatal(anyhow!(reason)));
            }
            if kind == Passing::Limit && others > replies {
                repetition = 0; // others got through: a limit that is shared is not one that stays
            }
            if repetition == self.retries {
                let reason = format!("{reason} (given up after {} requests)", repetition + 1);
                return Err(match kind {
                    Passing::Limit | Passing::Unreachable => Missing::Fatal(anyhow!(reason)),
                    Passing::Error => Missing::Unanswered {
                        reason,
                        refused: false,
                    },
                });
            }
            // Not all at the moment that the server named.
            let wait = wait.map(|wait| wait.mul_f64(rand::rng().random_range(1.0..=1.1)));
            let wait = wait.unwrap_or_else(|| backoff(self.backoff, repetition));
            if kind == Passing::Limit {
                self.gate.close(wait);
            }
            self.repeated.fetch_add(1, Relaxed);
            repetition += 1;
            sleep(wait, stopped);
        }
    }

    fn count(&self, reply: &Reply) {
        self.replies.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(reply.prompt_tokens, Relaxed);
        self.completion_tokens
            .fetch_add(reply.completion_tokens, Relaxed);
        if let Some(wait) = reply.wait {
            self.gate.close(wait.min(self.max_wait)); // the next request will be told if it is longer
        }
    }

    fn message(&self) -> String {
        let (prompt, completion) = (
            self.prompt_tokens.load(Relaxed),
            self.completion_tokens.load(Relaxed),
        );
        let mut message = format!("{prompt} prompt + {completion} completion tokens");
        let repeated = self.repeated.load(Relaxed);
        if repeated > 0 {
            message += &format!(", {repeated} requests repeated");
        }
        let wait = self.gate.left().as_secs();
        if wait > 0 {
            message += &format!(", the server asks to wait {wait} s");
        }
        message
    }
}
