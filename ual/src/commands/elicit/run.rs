//! A run of the command, from samples to their scores.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};

use crate::{
    commands::elicit::{
        answers::Answers,
        args::Args,
        local, remote,
        samples::{self, Sample},
    },
    training::ranks,
};

/// Exit status when some samples could not be scored.
const INCOMPLETE: u8 = 3;

pub fn run(args: &Args) -> Result<ExitCode> {
    args.check()?;
    ranks::refuse("elicit")?;
    if args.print_prompt {
        io::stdout().write_all(args.template()?.text().as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let data = args.data.as_deref().context("--data is missing")?;
    let out = args.out.as_deref().context("--out is missing")?;
    ensure!(
        !same_file(data, out),
        "--out is {}, the file of the samples; choose another",
        out.display()
    );
    // Before the first sample is scored, so that a wrong argument costs nothing.
    args.template()?;
    args.body()?;
    let samples: Arc<[Sample]> = samples::read(data)?.into();

    let model = match &args.local {
        Some(path) => local::name(path)?,
        None => args.model().to_string(),
    };
    let votes = args.local.is_none().then_some(args.votes);
    let mut answers = Answers::resume(out, &samples, &model, votes)?;
    let before = answers.done();
    let mut missing = BTreeMap::new();
    let result = match &args.local {
        _ if before == samples.len() => Ok(()),
        Some(path) => local::score(path, &args.overrides, &samples, &mut answers, &mut missing),
        None => remote::score(args, &samples, &mut answers, &mut missing),
    };
    if !missing.is_empty() {
        eprintln!("{} samples could not be scored:", missing.len());
    }
    for (sample, reason) in missing {
        eprintln!("  {}: {reason}", samples[sample].id);
    }
    if let Some(warning) = answers.warning() {
        eprintln!("{warning}");
    }
    result?;

    let done = answers.done();
    println!(
        "{done} of {} samples are scored, {before} of them by earlier runs: {}",
        samples.len(),
        out.display()
    );
    if let (true, Some(warning)) = (done == samples.len(), answers.unfit()) {
        eprintln!("{warning}");
    }
    answers.close()?;
    Ok(match done == samples.len() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(INCOMPLETE),
    })
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}
