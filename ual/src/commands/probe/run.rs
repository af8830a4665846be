//! A run of the command: every seed and size, then the report.

use std::{fs, time::Instant};

use anyhow::{Context, Result};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    commands::probe::{
        args::Args,
        hidden, pictures,
        questions::{self, Questions},
        stretches,
        summary::{self, Results},
        trainings::{Data, Draw, Trainings},
    },
    files::Folder,
    report::run::save_json,
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
    let mut results = Results {
        outcomes: Vec::new(),
        stretches,
        of_stretches: Vec::new(),
    };
    for seed in args.seed..args.seed + args.seeds {
        let start = Instant::now();
        for &size in &args.sizes {
            let mut rng = StdRng::seed_from_u64(seed);
            let draw = Draw::new((0..questions.train.len()).collect(), size, &mut rng);
            let outcome = Trainings::new(&data, draw, None, args)?.all(seed);
            let outcome = outcome.with_context(|| format!("seed {seed}, {size} samples"))?;
            results.outcomes.push(outcome);
        }
        let of_stretches = stretches::of_seed(&data, &results.stretches, seed, args)?;
        results.of_stretches.extend(of_stretches);
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("seed {seed}: {seconds:.0} s");
    }
    let folder = &args.out;
    save_json(&folder.join("outcomes.json"), &results.outcomes)?;
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
        "report.md, its pictures and outcomes.json are in {}",
        folder.display()
    );
    Ok(())
}
