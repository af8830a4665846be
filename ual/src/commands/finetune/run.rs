//! A run of the command: three trainings, their report, and the model that the last one made.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::{
    commands::finetune::memory::BatchMemory,
    files::Folder,
    model::export,
    report::{
        curve::Curve,
        plots,
        run::{Run, save_json, table},
    },
    training::{
        args::{Args, device},
        method::Method,
        plan::Plan,
        setup::{self, Setup},
    },
};

/// What metrics.json holds.
#[derive(Serialize)]
struct Report<'a> {
    arguments: &'a Args,
    data: &'a str,
    vocab: usize,
    parameters: usize,
    threshold: f32,
    plan: Plan,
    peak_batch_bytes: Option<BatchMemory>,
    pretraining: Option<&'a Curve>,
    runs: &'a [Run],
}

pub fn run(args: &Args) -> Result<()> {
    args.check()?;
    let start = Instant::now();
    let device = device(&args.device)?;
    let mut folder = Folder::existing(&args.out)?;
    let trained_model = args.out.join("model");
    if let Some(source) = &args.model {
        export::check(source, &trained_model)?;
    }
    let loaded = setup::pretrained(args, &device)?;
    let data = setup::dataset(args, loaded.as_ref())?;
    if folder.is_none() {
        folder = Some(Folder::make(&args.out)?); // only now: what is refused leaves nothing
    }
    let setup = Setup::new(args, data, loaded, &device)?;

    let spread = |method| setup.spread(&method, args.smoothing_prior);
    let ual = spread(Method::Ual(setup.map.clone()));
    let mut runs = Vec::new();
    for method in [
        Method::Sft,
        spread(Method::Constant(args.mean_smoothing)),
        ual.clone(),
    ] {
        runs.push(setup.run(args, method.name(), &method, &setup.data.train, &device)?);
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
        pretraining: setup.pretraining.as_ref(),
        runs: &runs,
    };
    // Before what may run out of disk or memory, after what may refuse the checkpoints of other trainings.
    save_json(&args.out.join("smoothing_map.json"), &setup.map)?;
    save_json(&args.out.join("metrics.json"), &report)?;
    if let Some(source) = &args.model {
        let (config, weights) = (model.config(), model.merged()?);
        let path = export::save(source, &args.overrides, &config, &weights, &trained_model)?;
        println!("the model that UAL trained is {}", path.display());
    }
    report.peak_batch_bytes = BatchMemory::measure(model, &ual, &setup.data.train, &plan, &device)?;
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
