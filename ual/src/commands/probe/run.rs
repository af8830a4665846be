//! A run of the command: every seed and size, then the report.

use std::{
    fs,
    num::NonZero,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use rand::{SeedableRng, rngs::StdRng};
use rayon::ThreadPoolBuilder;

use crate::{
    commands::probe::{
        args::Args,
        hidden,
        outcome::Outcome,
        pictures,
        questions::{self, Questions},
        stretches::{self, OfStretch, Stretch},
        summary::{self, Results},
        trainings::{Data, Draw, Trainings},
    },
    files::{self, Folder},
    training::ranks,
};

/// Of the samples that --limit takes, and of their order: the same for all seeds.
const ORDER: u64 = 1;

fn about(args: &Args, questions: &Questions, width: usize) -> String {
    format!(
        "Data: {}: {} samples to draw from, {} held out, {} responses. Model: {}, last hidden states of width {width}.",
        args.data.display(),
        questions.train.len(),
        questions.held_out.len(),
        questions.responses.len(),
        args.model.display(),
    )
}

pub fn run(args: &Args) -> Result<()> {
    ranks::refuse("probe")?;
    args.check()?;
    let questions = questions::read(&args.data, args.group.as_deref(), args.limit, ORDER)?;
    args.check_sizes(questions.train.len(), questions.responses.len())?;
    let stretches = match args.stretch_size {
        0 => Vec::new(),
        size => stretches::quintiles(&questions.train, size)?,
    };
    let _locked = Folder::make(&args.out)?;
    let all: Vec<_> = questions.train.iter().chain(&questions.held_out).collect();
    let hidden = hidden::of(&all, (&args.model, &args.overrides), &args.out)?;
    let data = Data {
        questions: &questions,
        hidden: &hidden,
    };
    let of_seed = |seed| of_seed(&data, &stretches, seed, args);
    let of_seeds = side_by_side(args.seed..args.seed + args.seeds, of_seed)?;
    let (outcomes, of_stretches): (Vec<_>, Vec<_>) = of_seeds.into_iter().unzip();
    let results = Results {
        outcomes: outcomes.concat(),
        of_stretches: of_stretches.concat(),
        stretches,
    };
    let folder = &args.out;
    files::replace_with_lines(&folder.join("outcomes.jsonl"), &results.outcomes)?;
    pictures::sizes(&folder.join("sizes.svg"), &results, args)?;
    pictures::epochs(&folder.join("epochs.svg"), &results, args)?;
    pictures::smoothings(&folder.join("smoothing.svg"), &results, args)?;
    if !results.stretches.is_empty() {
        pictures::uncertainty(&folder.join("uncertainty.svg"), &results)?;
    }
    let about = about(args, &questions, hidden.states.dim(1)?);
    let text = summary::markdown(&results, args, &about);
    let path = folder.join("report.md");
    fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{text}");
    println!(
        "report.md, its pictures and outcomes.jsonl are in {}",
        folder.display()
    );
    Ok(())
}

fn of_seed(
    data: &Data,
    stretches: &[Stretch],
    seed: u64,
    args: &Args,
) -> Result<(Vec<Outcome>, Vec<OfStretch>)> {
    let start = Instant::now();
    let of_size = |&size: &usize| {
        let mut rng = StdRng::seed_from_u64(seed);
        let all = (0..data.questions.train.len()).collect();
        let trainings = Trainings::new(data, Draw::new(all, size, &mut rng), None, args)?;
        let outcome = trainings.all(seed);
        outcome.with_context(|| format!("seed {seed}, {size} samples"))
    };
    let outcomes = args.sizes.iter().map(of_size).collect::<Result<_>>()?;
    let of_stretches = stretches::of_seed(data, stretches, seed, args)?;
    eprintln!("seed {seed}: {:.0} s", start.elapsed().as_secs_f64());
    Ok((outcomes, of_stretches))
}

/// What `of` gives for each seed, in order, on a core each: most of a head's tensors are too small for more.
fn side_by_side<T: Send>(
    seeds: Range<u64>,
    of: impl Fn(u64) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let (next, end) = (AtomicU64::new(seeds.start), seeds.end);
    let work = || {
        let alone = ThreadPoolBuilder::new().num_threads(1).build()?;
        let mut done = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return Ok(done);
            }
            done.push((seed, alone.install(|| of(seed))?));
        }
    };
    let mut all = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all: Vec<(u64, T)> = Vec::new();
        for thread in threads {
            let done: Result<_> = thread.join().expect("a thread of trainings panicked");
            all.extend(done?);
        }
        anyhow::Ok(all)
    })?;
    all.sort_by_key(|(seed, _)| *seed);
    Ok(all.into_iter().map(|(_, value)| value).collect())
}
