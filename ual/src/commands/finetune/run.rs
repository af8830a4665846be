//! A run of the command: three trainings, their report, and the model that the last one made.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::{
    commands::finetune::{args::Args, memory::BatchMemory},
    failure,
    files::Folder,
    model::export,
    report::{
        curve::Curve,
        plots,
        run::{Run, save_json, table},
    },
    training::{
        args,
        method::Method,
        plan::Plan,
        ranks::Ranks,
        setup::{self, Setup},
    },
};

/// What metrics.json holds.
#[derive(Serialize)]
struct Report<'a> {
    arguments: &'a args::Args,
    data: &'a str,
    vocab: usize,
    parameters: usize,
    threshold: f32,
    plan: Plan,
    peak_batch_bytes: Option<BatchMemory>,
    /// Of the states that enter the first trained layer, with `--train-last`.
    kept_state_bytes: Option<usize>,
    pretraining: Option<&'a Curve>,
    runs: &'a [Run],
}

pub fn run(args: &Args) -> Result<()> {
    let Args {
        training: args,
        vocab_parallel,
    } = args;
    args.check()?;
    let mut ranks = Ranks::launched()?.by_classes(*vocab_parallel);
    let result = run_as(args, &mut ranks);
    if let (Err(error), true) = (&result, ranks.size() > 1) {
        eprintln!("process {}: {}", ranks.rank(), failure::text(error));
        ranks.abort();
    }
    result
}

/// As one of several processes, of which the first one writes.
fn run_as(args: &args::Args, ranks: &mut Ranks) -> Result<()> {
    let start = Instant::now();
    let device = ranks.device(&args.device)?;
    ranks.connect(&device)?;
    let mut folder = match ranks.is_first() {
        true => Folder::existing(&args.out)?,
        false => None,
    };
    let trained_model = args.out.join("model");
    if let (Some(source), true) = (&args.model, ranks.is_first()) {
        export::check(source, &trained_model)?;
    }
    let loaded = setup::pretrained(args, &device)?;
    let data = setup::dataset(args, loaded.as_ref())?;
    if folder.is_none() && ranks.is_first() {
        folder = Some(Folder::make(&args.out)?); // only now: what is refused leaves nothing
    }
    let setup = Setup::new(args, data, loaded, ranks, &device)?;

    let spread = |method| setup.spread(&method, args.smoothing_prior);
    let ual = spread(Method::Ual(setup.map.clone()))?;
    let mut runs = Vec::new();
    for method in [
        Method::Sft,
        spread(Method::Constant(args.mean_smoothing))?,
        ual.clone(),
    ] {
        let (name, samples) = (method.name(), &setup.data.train);
        if ranks.is_first() {
            runs.push(setup.run(name, &method, samples)?);
        } else {
            setup.train(name, &method, samples)?;
        }
    }
    if !ranks.is_first() {
        return Ok(());
    }

    println!("{}", table(&runs));
    println!(
        "certain: uncertainty below {:.3}, which parts the held-out samples",
        setup.threshold
    );
    plots::reliability(&args.out.join("reliability.svg"), &runs)?;
    plots::losses(&args.out.join("losses.svg"), &runs)?;
    let (model, plan) = (&setup.model, setup.plan);
    let mut report = Report {
        arguments: args,
        data: &setup.data.description,
        vocab: setup.data.vocab,
        parameters: setup.parameters,
        threshold: setup.threshold,
        plan,
        peak_batch_bytes: None,
        kept_state_bytes: model.kept_bytes(),
        pretraining: setup.pretraining.as_ref(),
        runs: &runs,
    };
    if let Some(bytes) = report.kept_state_bytes {
        println!("kept of what enters the first trained layer: {bytes} bytes");
    }
    // Before what may run out of disk or memory, after what may refuse the checkpoints of other trainings.
    save_json(&args.out.join("smoothing_map.json"), &setup.map)?;
    save_json(&args.out.join("metrics.json"), &report)?;
    if let Some(source) = &args.model {
        let (config, weights) = (model.config(), model.merged()?);
        let path = export::save(source, &args.overrides, &config, &weights, &trained_model)?;
        println!("the model that UAL trained is {}", path.display());
    }
    report.peak_batch_bytes = BatchMemory::measure(model, &ual, &setup.data.train, &plan)?;
    if let Some(memory) = report.peak_batch_bytes {
        println!("{memory}");
        save_json(&args.out.join("metrics.json"), &report)?;
    }
    println!(
        "{:.0} s in all; reliability.svg, losses.svg, metrics.json and smoothing_map.json are in {}",
        start.elapsed().as_secs_f64(),
        args.out.display()
    );
    drop(folder);
    Ok(())
}
