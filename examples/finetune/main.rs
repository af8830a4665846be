//! Fine-tunes a small language model three times from the same weights and the same batches: plainly (SFT), with a
//! constant label smoothing, and uncertainty-aware (UAL), where a sample's smoothing grows with its uncertainty and has
//! the constant's mean. Reports how well each predicts held-out samples, certain and uncertain ones apart, and how much
//! memory a training step takes with the loss from hidden states and from logits (`--loss`).
//!
//! ```text
//! cargo run --release --example finetune
//! cargo run --release --example finetune -- --data samples.jsonl
//! cargo run --release --example finetune -- --data samples.jsonl --model MODEL.gguf --lora 8
//! ```
//!
//! Without `--data` the program makes its data, whose true answer distributions are known: see [`synthetic`]. With it,
//! a line of the file is a sample: see [`jsonl`], and [`ngram`] for how a missing uncertainty is estimated. With `--model`
//! the weights and the tokeniser are a model's of the Llama family (see [`pretrained`]), all of which or adapters of which
//! are trained. With `--checkpoint-every` a run that was cut off goes on exactly where it was (`--resume`).
//!
//! The same arguments give the same numbers on one machine with the same number of threads (`RAYON_NUM_THREADS`): how
//! candle splits a matrix product, and so how it rounds, depends on both.

#[path = "../common/allocator.rs"]
mod allocator;
mod args;
mod checkpoint;
mod data;
mod evaluate;
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
mod synthetic;
mod train;

use std::{fs, time::Instant};

use anyhow::{Context, Result};
use candle_cross_entropy::ual::SmoothingMap;
use clap::Parser;
use serde::Serialize;

use crate::{
    args::{Args, device, plans},
    checkpoint::Checkpoints,
    memory::StepMemory,
    model::{Config, Decoder, Trained},
    report::Run,
    train::{Curve, Method, Plan, train},
};

/// What metrics.json holds.
#[derive(Serialize)]
struct Report<'a> {
    arguments: &'a Args,
    data: &'a str,
    vocab: usize,
    parameters: usize,
    median_uncertainty: f32,
    plan: Plan,
    peak_step_bytes: Option<StepMemory>,
    pretraining: Option<&'a Curve>,
    runs: &'a [Run],
}

fn main() -> Result<()> {
    let args = Args::parse();
    args.check()?;
    let start = Instant::now();
    let device = device(&args.device)?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;

    let loaded = match &args.model {
        Some(path) => Some(pretrained::load(path, args.max_tokens, &device)?),
        None => None,
    };
    let data = match &args.data {
        None => synthetic::generate(args.seed),
        Some(path) => {
            let tokenizer = loaded.as_ref().map(|model| model.tokenizer.clone());
            let Args {
                seed,
                held_out,
                vocab,
                max_tokens,
                limit,
                ..
            } = args;
            let options = jsonl::Options {
                seed,
                held_out,
                vocab,
                max_tokens,
                limit,
            };
            jsonl::load(path, tokenizer, &options)?
        }
    };
    let uncertainties: Vec<f32> = data.train.iter().map(|sample| sample.uncertainty).collect();
    let map = SmoothingMap::fit(&uncertainties, args.mean_smoothing, args.max_smoothing)
        .context("the uncertainties of the training samples")?;
    report::save_json(&args.out.join("smoothing_map.json"), &map)?;
    println!("{}", data.description);

    let (plan, pretraining) = plans(&args, &data);
    let checkpoints = |name: &str| Checkpoints {
        path: checkpoint::path(&args.out, name),
        every: args.checkpoint_every,
        resume: args.resume,
        fingerprint: format!("{name}, {} of {}", args.fingerprint(), data.description),
    };
    let of_model = loaded.is_some();
    let model = match loaded {
        Some(loaded) => {
            let trained = args.lora.map_or(Trained::All, |rank| Trained::Lora {
                rank,
                scale: args.lora_alpha.unwrap_or(2.0 * rank as f64) / rank as f64,
            });
            Decoder::from_weights(loaded.config, loaded.weights, trained, args.seed, &device)?
        }
        None => {
            let shape = (args.dim, args.layers, args.heads);
            let config = Config::small(data.vocab, shape, data.longest());
            Decoder::new(config, args.seed, &device)?
        }
    };
    let parameters = model.vars().iter().map(|var| var.elem_count()).sum();
    let Config { layers, dim, .. } = model.config();
    println!("model: {layers} layers of width {dim}, {parameters} parameters trained\n");
    let pretraining = if of_model {
        None
    } else {
        let corpus = (data.pretrain.as_slice(), &[][..]);
        let checkpoints = checkpoints("pre-training");
        Some(train(
            "pre-training",
            &model,
            &Method::Sft,
            corpus,
            &pretraining,
            &checkpoints,
            &device,
        )?)
    };
    let initial = model.weights()?;

    let held_out: Vec<_> = data.held_out.iter().collect();
    let median = held_out.iter().map(|sample| sample.uncertainty).collect();
    let median = metrics::median(median).context("no held-out samples")?;
    let ual = Method::Ual(map);
    let mut runs = Vec::new();
    for method in [
        Method::Sft,
        Method::Constant(args.mean_smoothing),
        ual.clone(),
    ] {
        model.set_weights(&initial)?;
        let training = train(
            method.name(),
            &model,
            &method,
            (&data.train, &data.held_out),
            &plan,
            &checkpoints(method.name()),
            &device,
        )?;
        let rows = evaluate::evaluate(&model, &held_out, plan.batch, &device)?;
        let mean_smoothing = method.mean_smoothing(&uncertainties)?;
        runs.push(Run {
            method: method.name(),
            mean_smoothing,
            groups: report::groups(&rows, median),
            training,
        });
    }

    println!("{}", report::table(&runs));
    println!("certain: uncertainty below the held-out samples' median, {median:.3}");
    let memory = StepMemory::measure(&model, &ual, &data.train, &plan, &device)?;
    if let Some(memory) = memory {
        println!("{memory}");
    }
    plots::reliability(&args.out.join("reliability.svg"), &runs)?;
    plots::losses(&args.out.join("losses.svg"), &runs)?;
    let report = Report {
        arguments: &args,
        data: &data.description,
        vocab: data.vocab,
        parameters,
        median_uncertainty: median,
        plan,
        peak_step_bytes: memory,
        pretraining: pretraining.as_ref(),
        runs: &runs,
    };
    report::save_json(&args.out.join("metrics.json"), &report)?;
    println!(
        "{:.0} s in all; reliability.svg, losses.svg, metrics.json and smoothing_map.json are in {}",
        start.elapsed().as_secs_f64(),
        args.out.display()
    );
    Ok(())
}
