//! A run of the command: every method over several seeds, then the report.

use std::fs;

use anyhow::{Context, Result, ensure};
use candle_core::Device;

use crate::{
    commands::study::{
        args::Args,
        arms::arms,
        clusters::{self, Points},
        outcome::Outcome,
        pictures, summary,
    },
    data::samples::{Dataset, Sample},
    files::Folder,
    model::decoder::Config,
    report::{
        plots,
        run::{Run, save_json},
    },
    training::{
        self,
        args::device,
        plan::Plan,
        ranks::{self, Ranks},
        setup::{self, Loaded, Setup},
    },
};

/// What the pictures show and the report begins with: of the first seed.
struct First {
    about: String,
    runs: Vec<Run>,
    points: Vec<(&'static str, Points)>,
    /// Uncertainty and smoothing of the training samples.
    smoothing: Vec<(f32, f32)>,
}

fn about(setup: &Setup, args: &training::args::Args) -> String {
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
    args: &training::args::Args,
    data: Dataset,
    loaded: Option<Loaded>,
    device: &Device,
) -> Result<(Vec<Outcome>, First)> {
    let _locked = Folder::make(&args.out)?;
    let setup = Setup::new(args, data, loaded, &Ranks::alone(), device)?;
    let mut outcomes = Vec::new();
    let mut first = First {
        about: about(&setup, args),
        runs: Vec::new(),
        points: Vec::new(),
        smoothing: Vec::new(),
    };
    for arm in arms(&setup.data, args)? {
        let method = setup.spread(&arm.method, arm.prior);
        let run = setup.run(
            args,
            arm.name,
            &method,
            &arm.samples,
            &Ranks::alone(),
            device,
        )?;
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

pub fn run(args: &Args) -> Result<()> {
    ranks::refuse("study")?;
    let training = &args.training;
    training.check()?;
    ensure!(
        args.seeds > 0,
        "--seeds is 0; it must be at least 1, and 3 for a deviation that means something"
    );
    let folder = training.out.clone();
    let device = device(&training.device)?;
    let mut locked = Folder::existing(&folder)?;
    let seeds = (0..args.seeds).map(|seed| training::args::Args {
        seed: training.seed + seed,
        out: folder.join(format!("seed-{}", training.seed + seed)),
        ..training.clone()
    });
    let seeds: Vec<_> = seeds.collect();
    let loaded = setup::pretrained(training, &device)?;
    // What the last seed's data would not allow is said before the first has trained.
    let mut data = Vec::new();
    for training in &seeds {
        let of_seed = setup::dataset(training, loaded.as_ref())?;
        arms(&of_seed, training).with_context(|| format!("seed {}", training.seed))?;
        data.push(of_seed);
    }
    if locked.is_none() {
        locked = Some(Folder::make(&folder)?); // only now: what is refused leaves nothing
    }
    let mut outcomes = Vec::new();
    let mut first = None;
    for (training, data) in seeds.iter().zip(data) {
        let (of_seed, pictured) = of_seed(training, data, loaded.clone(), &device)?;
        outcomes.extend(of_seed);
        first.get_or_insert(pictured);
        save_json(&folder.join("outcomes.json"), &outcomes)?;
    }
    let first = first.context("there is a seed")?;
    plots::losses(&folder.join("losses.svg"), &first.runs)?;
    plots::reliability(&folder.join("reliability.svg"), &first.runs)?;
    pictures::smoothing(&folder.join("smoothing.svg"), &first.smoothing)?;
    let name = |token: u32| {
        let text = |loaded: &Loaded| {
            let encoder = &loaded.model.encoder;
            let id = token.checked_sub(encoder.offset)?;
            let text = encoder.tokenizer.decode(&[id], false).ok()?;
            (!text.contains('\u{fffd}')).then(|| format!("{text:?}"))
        };
        let text = loaded.as_ref().and_then(text);
        text.unwrap_or_else(|| format!("token {token}"))
    };
    pictures::projections(&folder.join("clusters.svg"), &first.points, name)?;
    let text = summary::markdown(&outcomes, args.seeds as usize, &first.about);
    let path = folder.join("report.md");
    fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{text}");
    println!(
        "report.md, its pictures and outcomes.json are in {}",
        folder.display()
    );
    drop(locked);
    Ok(())
}
