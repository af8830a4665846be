//! Fine-tunes a small language model three times from the same weights and the same batches: plainly (SFT), with a
//! constant label smoothing, and uncertainty-aware (UAL), where a sample's smoothing grows with its uncertainty and has
//! the constant's mean. Reports how well each predicts held-out samples, certain and uncertain ones apart, and how much
//! memory a batch takes with the loss from hidden states and from logits (`--loss`).
//!
//! ```text
//! cargo run --release --example finetune
//! cargo run --release --example finetune -- --data samples.jsonl
//! cargo run --release --example finetune -- --data samples.jsonl --model MODEL.gguf --lora 8
//! ```
//!
//! Without `--data` the program makes its data, whose true answer distributions are known: see [`synthetic`]. With it,
//! a line of the file is a sample: see [`jsonl`], and [`ngram`] for how uncertainties are estimated where there are none. With `--model`
//! the weights and the tokeniser are a model's of the Llama family (see [`pretrained`]), all of which or adapters of which
//! are trained; what UAL made of it is saved in the same form. With `--checkpoint-every` a run that was cut off goes on exactly where it was (`--resume`).
//!
//! The same arguments give the same numbers on one machine with the same number of threads (`RAYON_NUM_THREADS`): how
//! candle splits a matrix product, and so how it rounds, depends on both.

#[path = "../common/allocator.rs"]
mod allocator;
mod args;
#[path = "../common/chat.rs"]
mod chat;
mod checkpoint;
mod data;
#[path = "../common/digest.rs"]
mod digest;
mod evaluate;
mod export;
mod fused;
#[path = "../common/gguf.rs"]
mod gguf;
#[path = "../common/gguf_tokenizer.rs"]
mod gguf_tokenizer;
mod jsonl;
mod linear;
mod memory;
mod metrics;
mod model;
mod ngram;
mod optimizer;
mod plots;
mod pretrained;
mod progress;
mod report;
mod separate;
mod setup;
mod synthetic;
mod train;

use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use serde::Serialize;

use crate::{
    args::{Args, device},
    memory::BatchMemory,
    report::Run,
    setup::Setup,
    train::{Curve, Method, Plan},
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

fn main() -> Result<()> {
    let args = Args::parse();
    args.check()?;
    let start = Instant::now();
    let device = device(&args.device)?;
    let trained_model = args.out.join("model");
    if let Some(source) = &args.model {
        export::check(source, &trained_model)?;
    }
    let loaded = setup::pretrained(&args, &device)?;
    let data = setup::dataset(&args, loaded.as_ref())?;
    let setup = Setup::new(&args, data, loaded, &device)?;

    let ual = Method::Ual(setup.map.clone());
    let mut runs = Vec::new();
    for method in [
        Method::Sft,
        Method::Constant(args.mean_smoothing),
        ual.clone(),
    ] {
        runs.push(setup.run(&args, method.name(), &method, &setup.data.train, &device)?);
    }

    println!("{}", report::table(&runs));
    println!(
        "certain: uncertainty below {:.3}, which parts the held-out samples",
        setup.threshold
    );
    plots::reliability(&args.out.join("reliability.svg"), &runs)?;
    plots::losses(&args.out.join("losses.svg"), &runs)?;
    let (model, plan) = (&setup.model, setup.plan);
    let mut report = Report {
        arguments: &args,
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
    report::save_json(&args.out.join("smoothing_map.json"), &setup.map)?;
    report::save_json(&args.out.join("metrics.json"), &report)?;
    if let Some(source) = &args.model {
        let path = export::save(source, &model.config(), &model.merged()?, &trained_model)?;
        println!("the model that UAL trained is {}", path.display());
    }
    report.peak_batch_bytes = BatchMemory::measure(model, &ual, &setup.data.train, &plan, &device)?;
    if let Some(memory) = report.peak_batch_bytes {
        println!("{memory}");
        report::save_json(&args.out.join("metrics.json"), &report)?;
    }
    println!(
        "{:.0} s in all; reliability.svg, losses.svg, metrics.json and smoothing_map.json are in {}",
        start.elapsed().as_secs_f64(),
        args.out.display()
    );
    Ok(())
}
