//! What the trainings that are compared have in common: data, the initial model and the plan.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::ual::SmoothingMap;

use crate::{
    data::{
        jsonl,
        samples::{Dataset, Sample},
        synthetic,
    },
    model::{
        decoder::{Config, Decoder, Last, Trained},
        pretrained::{self, Pretrained, Purpose},
        states::States,
    },
    report::{
        curve::{Curve, Measured},
        metrics,
        run::Run,
    },
    training::{
        args::{Args, plans},
        checkpoint::Checkpoints,
        method::Method,
        plan::Plan,
        ranks::Ranks,
        smoothing::{self, Prior},
        train::Training,
        watch::Watch,
    },
};

pub struct Setup<'a> {
    pub data: Dataset,
    /// Of the held-out samples' uncertainties: certain below it, else uncertain.
    pub threshold: f32,
    /// Fitted on the training samples.
    pub map: SmoothingMap,
    pub model: Decoder,
    /// How many numbers are trained.
    pub parameters: usize,
    pub plan: Plan,
    pub pretraining: Option<Curve>,
    /// What every training begins with.
    initial: Vec<Tensor>,
    checkpoints: Checkpoints,
    ranks: &'a Ranks,
}

/// With the mean smoothing over the rows of the samples' responses: the loss is a mean over rows, so a long response
/// counts more than a short one.
pub fn fit(samples: &[Sample], args: &Args) -> Result<SmoothingMap> {
    let (map, mean, max) = (args.smoothing_map, args.mean_smoothing, args.max_smoothing);
    smoothing::fit(&weighted(samples), map, mean, max)
}

fn weighted(samples: &[Sample]) -> Vec<smoothing::Weighted> {
    samples.iter().map(|s| (s.uncertainty, s.rows())).collect()
}

/// The model of `--model`.
#[derive(Clone)]
pub struct Loaded {
    pub model: Pretrained,
    /// A hash of the files with its weights.
    digest: String,
    /// With `--train-last`, for all that is trained from this model.
    states: Option<Arc<States>>,
}

pub fn pretrained(args: &Args, device: &Device) -> Result<Option<Loaded>> {
    let purpose = Purpose::Training(args.max_tokens);
    let load = |path: &PathBuf| {
        let model = pretrained::load(path, &args.overrides, purpose, device)?;
        if let Some(last) = args.train_last {
            let layers = model.config.layers;
            ensure!(
                (1..=layers).contains(&last),
                "--train-last is {last}; it must be at least 1 and at most {layers}, the model's layers"
            );
        }
        Ok(Loaded {
            digest: pretrained::digest(path)?,
            states: args.train_last.map(|_| Arc::default()),
            model,
        })
    };
    args.model.as_ref().map(load).transpose()
}

impl<'a> Setup<'a> {
    /// Without a `loaded` model makes one, which it pre-trains. `--out` is the caller's [`Folder`](crate::files::Folder).
    pub fn new(
        args: &Args,
        data: Dataset,
        loaded: Option<Loaded>,
        ranks: &'a Ranks,
        device: &Device,
    ) -> Result<Self> {
        let map = fit(&data.train, args)?;
        let threshold = data.held_out.iter().map(|sample| sample.uncertainty);
        let threshold = metrics::threshold(threshold.collect()).context("no held-out samples")?;
        if ranks.is_first() {
            println!("{}", data.description);
            if let Some(warning) = smoothing::warning(&weighted(&data.train)) {
                eprintln!("{warning}");
            }
        }

        let of_model = loaded.is_some();
        let fingerprint = format!(
            "{} of data {} and model {}",
            args.fingerprint(),
            data.digest(),
            loaded.as_ref().map_or("none", |loaded| &loaded.digest)
        );
        ranks.check_alike("arguments, data or model", &fingerprint)?;
        let model = decoder(args, loaded, &data, device)?;
        let parameters = model.vars().iter().map(|var| var.elem_count()).sum();
        let Config { layers, dim, .. } = model.config();
        if ranks.is_first() {
            println!("model: {layers} layers of width {dim}, {parameters} parameters trained");
            if let Some(last) = args.train_last {
                let sequences = data.sequences();
                let tokens: usize = sequences.iter().map(|tokens| tokens.len()).sum();
                println!(
                    "trained of the layers: the last {last}; what enters them is kept, {} bytes of {} samples at most",
                    tokens * dim * DType::F32.size_in_bytes(),
                    sequences.len()
                );
            }
            println!();
        }
        let (plan, pretraining_plan) = plans(args, &data);
        let checkpoints = Checkpoints {
            folder: args.out.clone(),
            every: args.checkpoint_every,
            resume: args.resume,
            fingerprint,
        };
        let pretraining = if of_model {
            None
        } else {
            let name = "pre-training";
            let training = Training {
                name,
                model: &model,
                method: &Method::Sft,
                samples: &data.pretrain,
                watch: Watch::default(),
                plan: &pretraining_plan,
                checkpoints: &checkpoints,
                ranks,
            };
            Some(training.run()?)
        };
        Ok(Self {
            initial: model.weights()?,
            data,
            threshold,
            map,
            model,
            parameters,
            plan,
            pretraining,
            checkpoints,
            ranks,
        })
    }

    /// The method with its smoothing spread so.
    pub fn spread(&self, method: &Method, prior: Prior) -> candle_core::Result<Method> {
        let vocab = self.model.output_projection().dim(0)?;
        let shares = prior.shares(&self.data.train, vocab, self.model.device())?;
        Ok(match (shares, method) {
            (None, _) | (_, Method::Sft) => method.clone(),
            (Some(shares), _) => Method::Spread(Box::new(method.clone()), shares),
        })
    }

    /// What is measured along a training.
    fn watch(&self) -> Watch<'_> {
        Watch {
            held_out: &self.data.held_out,
            validation: &self.data.validation,
            threshold: self.threshold,
            groups: &self.data.groups,
        }
    }

    /// The model as it is, on the held-out samples.
    pub fn measure(&self) -> Result<Measured> {
        self.watch().measure(&self.model, self.plan.batch)
    }

    /// Trains on `samples` from the initial weights; the model keeps what it learned.
    pub fn train(&self, name: &str, method: &Method, samples: &[Sample]) -> Result<Curve> {
        self.model.set_weights(&self.initial)?;
        let training = Training {
            name,
            model: &self.model,
            method,
            samples,
            watch: self.watch(),
            plan: &self.plan,
            checkpoints: &self.checkpoints,
            ranks: self.ranks,
        };
        training.run()
    }

    /// [`train`](Self::train), and evaluates.
    pub fn run(&self, name: &'static str, method: &Method, samples: &[Sample]) -> Result<Run> {
        let training = self.train(name, method, samples)?;
        Ok(Run {
            method: name,
            mean_smoothing: method.mean_smoothing(samples)?,
            groups: self.measure()?.groups,
            training,
        })
    }
}

/// Loads or makes the data.
pub fn dataset(args: &Args, loaded: Option<&Loaded>) -> Result<Dataset> {
    let &Args {
        seed,
        held_out,
        vocab,
        max_tokens,
        limit,
        ..
    } = args;
    let Some(path) = &args.data else {
        return Ok(synthetic::generate(seed));
    };
    let options = jsonl::Options {
        seed,
        held_out,
        vocab,
        max_tokens,
        limit,
        group: args.group.as_deref(),
    };
    jsonl::load(
        path,
        loaded.map(|loaded| loaded.model.encoder.clone()),
        &options,
    )
}

fn decoder(
    args: &Args,
    loaded: Option<Loaded>,
    data: &Dataset,
    device: &Device,
) -> Result<Decoder> {
    let Some(loaded) = loaded else {
        let shape = (args.dim, args.layers, args.heads);
        let config = Config::small(data.vocab, shape, data.longest());
        return Ok(Decoder::new(config, args.seed, device)?);
    };
    let trained = args.lora.map_or(Trained::All, |rank| Trained::Lora {
        rank,
        scale: args.lora_alpha.unwrap_or(2.0 * rank as f64) / rank as f64,
    });
    let (config, weights) = (loaded.model.config, loaded.model.weights);
    let Some(layers) = args.train_last else {
        return Ok(Decoder::from_weights(
            config, weights, trained, args.seed, device,
        )?);
    };
    if let Some(states) = &loaded.states {
        states.retain(&data.sequences()); // what another seed drew as well
    }
    let last = Last {
        layers,
        states: loaded.states,
    };
    Ok(Decoder::training_last(
        config,
        weights,
        (trained, last),
        args.seed,
        device,
    )?)
}
