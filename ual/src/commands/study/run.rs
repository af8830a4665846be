//! Evidence: plain fine-tuning, constant smoothing of the same mean, uncertainty-aware smoothing, and the control in which
//! the same uncertainties are dealt to the samples at random, over several seeds; held-out metrics and the clustering of
//! tokens in the last hidden layer, as mean ± deviation over seeds, in a Markdown report with pictures. With `--group` there
//! is a second control, dealt within each kind of samples: what it lacks is what uncertainties say beyond the kind.
//!
//! ```text
//! cargo run --release --example study
//! cargo run --release --example study -- --data scored.jsonl --model MODEL.gguf --lora 8 --limit 200
//! ```
//!
//! All options of the example `finetune` are its own. A seed changes data, batches, the control and the weights that
//! training begins with (of a given model, those of its adapters).

#[path = "../finetune/args.rs"]
#[allow(dead_code)] // of finetune's modules, not everything is used here
mod args;
#[path = "../common/chat.rs"]
mod chat;
#[path = "../finetune/checkpoint.rs"]
mod checkpoint;
mod clusters;
#[path = "../finetune/data.rs"]
mod data;
#[path = "../common/digest.rs"]
mod digest;
#[path = "../finetune/evaluate.rs"]
mod evaluate;
#[path = "../finetune/fused.rs"]
mod fused;
#[path = "../common/gguf.rs"]
mod gguf;
#[path = "../common/gguf_tokenizer.rs"]
mod gguf_tokenizer;
#[path = "../finetune/jsonl.rs"]
mod jsonl;
#[path = "../finetune/linear.rs"]
#[allow(dead_code)]
mod linear;
#[path = "../finetune/metrics.rs"]
mod metrics;
#[path = "../finetune/model.rs"]
#[allow(dead_code)]
mod model;
#[path = "../finetune/ngram.rs"]
mod ngram;
#[path = "../finetune/optimizer.rs"]
mod optimizer;
mod pictures;
#[path = "../finetune/plots.rs"]
mod plots;
#[path = "../finetune/pretrained.rs"]
#[allow(dead_code)]
mod pretrained;
#[path = "../finetune/progress.rs"]
mod progress;
#[path = "../finetune/report.rs"]
#[allow(dead_code)]
mod report;
#[path = "../finetune/separate.rs"]
mod separate;
#[path = "../finetune/setup.rs"]
#[allow(dead_code)]
mod setup;
mod summary;
#[path = "../finetune/synthetic.rs"]
mod synthetic;
#[path = "../finetune/train.rs"]
#[allow(dead_code)]
mod train;

use std::{borrow::Cow, collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use clap::{CommandFactory, FromArgMatches, Parser};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::Serialize;

use crate::{
    args::{Args, device},
    clusters::{Clusters, Points},
    data::{Dataset, Sample},
    model::Config,
    pretrained::Pretrained,
    report::Run,
    setup::Setup,
    train::{Method, Plan},
};

#[derive(Parser)]
struct Options {
    /// How many seeds, from --seed on
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    #[command(flatten)]
    run: Args,
}

/// What the others are compared with.
const UAL: &str = "UAL";
/// The control of `--group`.
const WITHIN: &str = "within kind";

/// A training of a seed, and what it came to.
#[derive(Serialize)]
struct Outcome {
    seed: u64,
    run: Run,
    clusters: Option<Clusters>,
}

/// What the pictures show and the report begins with: of the first seed.
struct First {
    about: String,
    runs: Vec<Run>,
    points: Vec<(&'static str, Points)>,
    /// Uncertainty and smoothing of the training samples.
    smoothing: Vec<(f32, f32)>,
}

/// The uncertainties of `samples`, dealt at random to those of the same `kind`.
fn shuffled(samples: &[Sample], seed: u64, kind: fn(&Sample) -> usize) -> Vec<Sample> {
    let mut kinds: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
    for sample in samples {
        let uncertainties = kinds.entry(kind(sample)).or_default();
        uncertainties.push(sample.uncertainty);
    }
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    for uncertainties in kinds.values_mut() {
        uncertainties.shuffle(&mut rng);
    }
    let deal = |sample: &Sample| {
        let left = kinds.get_mut(&kind(sample)).and_then(Vec::pop);
        Sample {
            uncertainty: left.expect("one for each sample"),
            ..sample.clone()
        }
    };
    samples.iter().map(deal).collect()
}

/// A method, and what it trains on.
struct Arm<'a> {
    name: &'static str,
    method: Method,
    samples: Cow<'a, [Sample]>,
}

fn arms<'a>(data: &'a Dataset, args: &Args) -> Result<Vec<Arm<'a>>> {
    let train = data.train.as_slice();
    let plain = |name, method| Arm {
        name,
        method,
        samples: Cow::Borrowed(train),
    };
    // Each with a map of the same mean: dealt anew, uncertainties meet other lengths of responses.
    let control = |name: &'static str, kind: fn(&Sample) -> usize| -> Result<Arm> {
        let samples = shuffled(train, args.seed, kind);
        let map = setup::fit(&samples, args).with_context(|| format!("the control {name:?}"))?;
        Ok(Arm {
            name,
            method: Method::Ual(map),
            samples: Cow::Owned(samples),
        })
    };
    let mut arms = vec![
        plain("SFT", Method::Sft),
        plain("constant", Method::Constant(args.mean_smoothing)),
        control("shuffled", |_| 0)?,
    ];
    if !data.groups.is_empty() {
        arms.push(control(WITHIN, |sample| sample.group)?);
    }
    arms.push(plain(UAL, Method::Ual(setup::fit(train, args)?)));
    Ok(arms)
}

fn about(setup: &Setup, args: &Args) -> String {
    let Config { layers, dim, .. } = setup.model.config();
    let Plan {
        steps,
        batch,
        accumulate,
        learning_rate,
        ..
    } = setup.plan;
    format!(
        "Data: {}.\nModel: {layers} layers of width {dim}, {} parameters trained. {steps} steps of {} samples, peak \
         learning rate {learning_rate}, mean smoothing {} where there is any.",
        setup.data.description,
        setup.parameters,
        batch * accumulate,
        args.mean_smoothing
    )
}

/// Every method from the same initial weights.
fn of_seed(
    args: &Args,
    data: Dataset,
    loaded: Option<Pretrained>,
    device: &Device,
) -> Result<(Vec<Outcome>, First)> {
    let setup = Setup::new(args, data, loaded, device)?;
    let mut outcomes = Vec::new();
    let mut first = First {
        about: about(&setup, args),
        runs: Vec::new(),
        points: Vec::new(),
        smoothing: Vec::new(),
    };
    for arm in arms(&setup.data, args)? {
        let run = setup.run(args, arm.name, &arm.method, &arm.samples, device)?;
        let batch = setup.plan.batch;
        let points = clusters::points(&setup.model, &setup.data.held_out, batch, device)?;
        first.runs.push(run.clone());
        outcomes.push(Outcome {
            seed: args.seed,
            run,
            clusters: points.clusters(),
        });
        first.points.push((arm.name, points));
    }
    for &Sample { uncertainty, .. } in &setup.data.train {
        let smoothing = setup.map.smoothing(uncertainty)?;
        first.smoothing.push((uncertainty, smoothing));
    }
    Ok((outcomes, first))
}

fn main() -> Result<()> {
    // Not the folder of `finetune`.
    let command = Options::command().mut_arg("out", |out| out.default_value("out/study"));
    let options = Options::from_arg_matches(&command.get_matches())?;
    options.run.check()?;
    ensure!(
        options.seeds > 0,
        "--seeds is 0; it must be at least 1, and 3 for a deviation that means something"
    );
    let folder = options.run.out.clone();
    let device = device(&options.run.device)?;
    let seeds = (0..options.seeds).map(|seed| Args {
        seed: options.run.seed + seed,
        out: folder.join(format!("seed-{}", options.run.seed + seed)),
        ..options.run.clone()
    });
    let seeds: Vec<Args> = seeds.collect();
    let loaded = setup::pretrained(&options.run, &device)?;
    // What the last seed's data would not allow is said before the first has trained.
    let mut data = Vec::new();
    for args in &seeds {
        let of_seed = setup::dataset(args, loaded.as_ref())?;
        arms(&of_seed, args).with_context(|| format!("seed {}", args.seed))?;
        data.push(of_seed);
    }
    let mut outcomes = Vec::new();
    let mut first = None;
    for (args, data) in seeds.iter().zip(data) {
        let (of_seed, pictured) = of_seed(args, data, loaded.clone(), &device)?;
        outcomes.extend(of_seed);
        first.get_or_insert(pictured);
        report::save_json(&folder.join("outcomes.json"), &outcomes)?;
    }
    let first = first.context("there is a seed")?;
    plots::losses(&folder.join("losses.svg"), &first.runs)?;
    plots::reliability(&folder.join("reliability.svg"), &first.runs)?;
    pictures::smoothing(&folder.join("smoothing.svg"), &first.smoothing)?;
    pictures::projections(&folder.join("clusters.svg"), &first.points)?;
    let text = summary::markdown(&outcomes, options.seeds as usize, &first.about);
    let path = folder.join("report.md");
    fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{text}");
    println!(
        "report.md, its pictures and outcomes.json are in {}",
        folder.display()
    );
    Ok(())
}
