//! A run of the command: every method over several seeds, then the report.

use std::fs;

use anyhow::{Context, Result};
use candle_core::Device;

use crate::{
    commands::study::{
        args::Args,
        arms::{Arm, Smoothing, UAL, arms, own_entropy},
        choice,
        clusters::{self, Points},
        outcome::{Early, Outcome, entries},
        pictures, summary,
    },
    data::samples::{Dataset, Sample},
    files::Folder,
    model::decoder::Config,
    report::{
        curve::{Curve, Measured},
        plots,
        run::{Run, save_json},
    },
    training::{
        self,
        args::device,
        method::Method,
        plan::Plan,
        ranks::{self, Ranks},
        setup::{self, Loaded, Setup},
    },
};

/// What the report begins with, and what the pictures show beside it: of the first seed.
struct First {
    about: String,
    points: Vec<(&'static str, Points)>,
    /// Uncertainty and smoothing of the training samples.
    smoothing: Vec<(f32, f32)>,
}

fn listed(means: &[f32]) -> String {
    let means: Vec<String> = means.iter().map(f32::to_string).collect();
    means.join(", ")
}

fn about(setup: &Setup, args: &training::args::Args, means: &[f32]) -> String {
    let Config { layers, dim, .. } = setup.model.config();
    let Plan {
        steps,
        batch,
        accumulate,
        learning_rate,
        ..
    } = setup.plan;
    let (train, validation) = (setup.data.train.len(), setup.data.validation.len());
    let aside = match validation {
        0 => String::new(),
        _ => format!(
            "\nOf the training samples {validation} are set aside for validation, {train} are trained on."
        ),
    };
    format!(
        "Data: {}.{aside}\nModel: {layers} layers of width {dim}, {} parameters trained. {steps} steps of {} samples, peak \
         learning rate {learning_rate}, mean smoothing {} where there is any, {} map.",
        setup.data.description,
        setup.parameters,
        batch * accumulate,
        listed(means),
        args.smoothing_map
    )
}

/// Every arm with every mean smoothing, from the same initial weights.
fn of_seed(
    args: &training::args::Args,
    means: &[f32],
    data: Dataset,
    loaded: Option<Loaded>,
    device: &Device,
) -> Result<(Vec<Outcome>, First)> {
    let _locked = Folder::make(&args.out)?;
    let alone = Ranks::alone();
    let setup = Setup::new(args, data, loaded, &alone, device)?;
    let mut arms = arms(&setup.data, args);
    let own = own_entropy(&setup, args)?; // ahead of any fine-tuning
    own.check(means, args)?;
    arms.insert(arms.len() - 1, own);
    let mut outcomes = Vec::new();
    let mut first = First {
        about: about(&setup, args, means),
        points: Vec::new(),
        smoothing: Vec::new(),
    };
    for arm in &arms {
        let (of_arm, points) = of_arm(args, &setup, arm, means)?;
        first.points.push((arm.name, points));
        let curves: Vec<&Curve> = of_arm.iter().map(|o| &o.run.training).collect();
        if let (UAL, Some(choice)) = (arm.name, choice::at_end(&curves)) {
            let mean = of_arm[choice.training].smoothing;
            if let Method::Ual(map) = arm.method(mean, args)? {
                for &Sample { uncertainty, .. } in &setup.data.train {
                    let smoothing = map.smoothing(uncertainty)?;
                    first.smoothing.push((uncertainty, smoothing));
                }
            }
        }
        outcomes.extend(of_arm);
    }
    Ok((outcomes, first))
}

/// An arm with each mean smoothing, and the states of the one that is chosen at the end.
fn of_arm(
    args: &training::args::Args,
    setup: &Setup,
    arm: &Arm,
    means: &[f32],
) -> Result<(Vec<Outcome>, Points)> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut pictured = Points::default();
    for mean in arm.means(means) {
        let method = setup.spread(&arm.method(mean, args)?, arm.prior)?;
        let several = means.len() > 1 && arm.smoothing != Smoothing::Nothing;
        let name = match several {
            true => format!("{} {mean}", arm.name), // each has checkpoints of its own
            false => arm.name.to_string(),
        };
        let mut training = setup.train(&name, &method, &arm.samples)?;
        let stopped = training.stopped.take().map(Early::from);
        let Measured { groups, units } = setup.measure()?;
        let batch = setup.plan.batch;
        let points = clusters::points(&setup.model, &setup.data.held_out, batch)?;
        outcomes.push(Outcome {
            seed: args.seed,
            smoothing: mean,
            run: Run {
                method: arm.name,
                mean_smoothing: method.mean_smoothing(&arm.samples)?,
                groups,
                training,
            },
            stopped,
            clusters: points.clusters(),
            units,
        });
        let curves: Vec<&Curve> = outcomes.iter().map(|o| &o.run.training).collect();
        let chosen = choice::at_end(&curves).map(|choice| choice.training);
        if chosen.is_none_or(|chosen| chosen + 1 == outcomes.len()) {
            pictured = points;
        }
    }
    forget_units(&mut outcomes);
    Ok((outcomes, pictured))
}

/// Keeps an arm's units where they are reported: of the chosen trainings. The others' would be most of the memory.
fn forget_units(outcomes: &mut [Outcome]) {
    let curves: Vec<&Curve> = outcomes.iter().map(|o| &o.run.training).collect();
    let [at_end, early] = [choice::at_end(&curves), choice::early(&curves)]
        .map(|choice| choice.map(|choice| choice.training));
    for (training, outcome) in outcomes.iter_mut().enumerate() {
        if at_end != Some(training) {
            outcome.units = Vec::new();
        }
        if let Some(stopped) = outcome.stopped.as_mut().filter(|_| early != Some(training)) {
            stopped.units = Vec::new();
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    ranks::refuse("study")?;
    let training = &args.training;
    args.check()?;
    let means = args.means();
    let folder = training.out.clone();
    let device = device(&training.device)?;
    let mut locked = Folder::existing(&folder)?;
    let seeds = (0..args.seeds).map(|seed| training::args::Args {
        seed: training.seed + seed,
        out: folder.join(format!("seed-{}", training.seed + seed)),
        mean_smoothing: means[0],
        ..training.clone()
    });
    let seeds: Vec<_> = seeds.collect();
    let loaded = setup::pretrained(training, &device)?;
    // What the last seed's data would not allow is said before the first has trained.
    let mut data = Vec::new();
    for training in &seeds {
        let mut of_seed = setup::dataset(training, loaded.as_ref())?;
        let named = || format!("seed {}", training.seed);
        if args.validation > 0.0 {
            let parted = of_seed.set_aside(args.validation, training.seed);
            parted.with_context(named)?;
        }
        for arm in arms(&of_seed, training) {
            arm.check(&means, training).with_context(named)?;
        }
        data.push(of_seed);
    }
    if locked.is_none() {
        locked = Some(Folder::make(&folder)?); // only now: what is refused leaves nothing
    }
    let mut outcomes = Vec::new();
    let mut first = None;
    for (training, data) in seeds.iter().zip(data) {
        let (of_seed, pictured) = of_seed(training, &means, data, loaded.clone(), &device)?;
        outcomes.extend(of_seed);
        first.get_or_insert(pictured);
        save_json(&folder.join("outcomes.json"), &outcomes)?;
    }
    let first = first.context("there is a seed")?;
    let entries = entries(&outcomes)?;
    let runs = entries.iter().filter(|entry| !entry.early);
    let runs: Vec<Run> = runs.map(|e| e.seeds[0].outcome.run.clone()).collect();
    plots::losses(&folder.join("losses.svg"), &runs)?;
    plots::reliability(&folder.join("reliability.svg"), &runs)?;
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
    let text = summary::markdown(&outcomes, &entries, &first.about);
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
