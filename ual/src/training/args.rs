//! What a training can be told on the command line, the checks of it, and what follows: `ual finetune` and `ual study` share
//! it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use serde::Serialize;

use crate::{
    data::samples::Dataset,
    model::pretrained::Overrides,
    training::{
        plan::{Loss, Plan},
        smoothing::{self, Map, Prior},
    },
};

// Not a doc comment: clap would show it in place of the command's own.
#[derive(clap::Args, Clone, Debug, Serialize)]
pub struct Args {
    /// Real data: a line a sample, {"prompt": "…", "response": "…", "uncertainty": 0.3}. The uncertainty is in [0, 1];
    /// where no sample has one it is estimated: the rank, among the training samples, of the response's cross-entropy under a
    /// trigram model of the other training samples. A JSON array, Parquet and other forms of samples do as well. Without this
    /// option the data are synthetic
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: Option<PathBuf>,
    /// A model of the Llama family to begin with, in place of a small one that is pre-trained here: a GGUF file, or a folder
    /// with config.json, tokenizer.json and safetensors. Needs --data
    #[arg(long, value_name = "FILE.gguf", requires = "data", conflicts_with_all = ["dim", "layers", "heads", "vocab", "pretrain_steps"])]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
    /// With --model: train low-rank adapters of this rank (LoRA) instead of all weights
    #[arg(long, value_name = "RANK", requires = "model")]
    pub lora: Option<usize>,
    /// With --lora: the adapters' products are multiplied by ALPHA/RANK [default: twice the rank]
    #[arg(long, value_name = "ALPHA", requires = "lora")]
    pub lora_alpha: Option<f64>,
    /// With --model: train only the last N layers, all their weights and the final norm, or with --lora their adapters. The
    /// layers before, the embedding and the output projection are frozen. What enters the first trained layer is computed once
    /// for each sample and kept in memory: 4 bytes times the model's width for each token
    #[arg(long, value_name = "N", requires = "model")]
    pub train_last: Option<usize>,
    /// Folder for results, checkpoints and the trained model
    #[arg(long, value_name = "FOLDER", default_value = "out/finetune")]
    pub out: PathBuf,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Steps of each training [default: 300; with --data three epochs; with --model 100]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Steps of next-token prediction that make the common starting point [default: 600; with --data five epochs]
    #[arg(long)]
    pub pretrain_steps: Option<usize>,
    /// Samples in a batch [default: 32; with --data 8; with --model 4]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Batches whose gradients make a step
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// Steps from one checkpoint of a training to the next; 0 for none
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    pub checkpoint_every: usize,
    /// Go on from the checkpoints in the folder --out
    #[arg(long)]
    pub resume: bool,
    /// How the trainings compute their loss. The results differ by rounding alone
    #[arg(long, value_enum, default_value_t)]
    pub loss: Loss,
    /// Mean smoothing over the training samples' response tokens, of the constant and of the uncertainty-aware training
    #[arg(long, default_value_t = smoothing::MEAN)]
    pub mean_smoothing: f32,
    /// Largest smoothing of a sample
    #[arg(long, default_value_t = smoothing::MAX)]
    pub max_smoothing: f32,
    /// How a sample's smoothing follows its uncertainty, of the uncertainty-aware training
    #[arg(long, value_enum, default_value_t)]
    pub smoothing_map: Map,
    /// What smoothing is spread over
    #[arg(long, value_enum, default_value_t)]
    pub smoothing_prior: Prior,
    /// Peak learning rate, after a warm-up of a tenth of the steps and before a cosine down to a tenth of it
    /// [default: 3e-3; with --model 2e-5, with --lora 2e-4]
    #[arg(long)]
    pub lr: Option<f64>,
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Largest norm of the gradients
    #[arg(long, default_value_t = 1.0)]
    pub clip: f64,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Width of the model
    #[arg(long, default_value_t = 128)]
    pub dim: usize,
    #[arg(long, default_value_t = 2)]
    pub layers: usize,
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// With --data: use only so many samples, drawn at random
    #[arg(long, requires = "data")]
    pub limit: Option<usize>,
    /// With --data: the field that says of what kind a sample is. Results are given for each kind too, and the study has a
    /// second control, in which uncertainties are dealt to samples of the same kind
    #[arg(long, value_name = "FIELD", requires = "data")]
    pub group: Option<String>,
    /// With --data: share of the samples that are held out, where they have no field "held_out", true or false, that says it
    #[arg(long, default_value_t = 0.2)]
    pub held_out: f64,
    /// With --data: vocabulary of the tokeniser, which is trained on the training samples
    #[arg(long, default_value_t = 2000)]
    pub vocab: usize,
    /// With --data: tokens of a sample; longer ones are cut
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
}

impl Args {
    /// What a training's result depends on of the arguments.
    pub fn fingerprint(&self) -> String {
        let mut arguments = serde_json::json!(self);
        if let Some(arguments) = arguments.as_object_mut() {
            for name in ["out", "device", "checkpoint_every", "resume"] {
                arguments.remove(name);
            }
        }
        arguments.to_string()
    }

    pub fn check(&self) -> Result<()> {
        ensure!(
            self.model.is_some() || self.overrides.are_none(),
            "--tokenizer and --chat-template are of the model of --model, which is not given"
        );
        let positive = [
            ("--steps", self.steps.unwrap_or(1)),
            ("--batch", self.batch.unwrap_or(1)),
            ("--layers", self.layers),
            ("--heads", self.heads),
            ("--accumulate", self.accumulate),
            ("--lora", self.lora.unwrap_or(1)),
        ];
        for (name, value) in positive {
            ensure!(value > 0, "{name} is 0; it must be at least 1");
        }
        let above_0 = [
            ("--lr", self.lr.unwrap_or(1.0)),
            ("--clip", self.clip),
            ("--lora-alpha", self.lora_alpha.unwrap_or(1.0)),
        ];
        for (name, value) in above_0 {
            ensure!(
                value.is_finite() && value > 0.0,
                "{name} is {value}; it must be above 0"
            );
        }
        let (decay, held_out) = (self.weight_decay, self.held_out);
        ensure!(
            decay.is_finite() && decay >= 0.0,
            "--weight-decay is {decay}; it must be at least 0"
        );
        ensure!(
            held_out > 0.0 && held_out < 1.0,
            "--held-out is {held_out}; it must be above 0 and below 1"
        );
        let (mean, max) = (self.mean_smoothing, self.max_smoothing);
        ensure!(
            (0.0..=1.0).contains(&max),
            "--max-smoothing is {max}; it must be in [0, 1]"
        );
        ensure!(
            (0.0..=max).contains(&mean),
            "--mean-smoothing is {mean}; it must be in [0, {max}], {max} being --max-smoothing"
        );
        let (dim, twice_heads) = (self.dim, self.heads.saturating_mul(2));
        ensure!(
            dim > 0 && dim.is_multiple_of(twice_heads),
            "--dim is {dim}; it must be a multiple of {twice_heads}, twice --heads",
        );
        let (vocab, max_tokens) = (self.vocab, self.max_tokens);
        ensure!(
            vocab >= 300,
            "--vocab is {vocab}; it must be at least 300: bytes alone take 256"
        );
        ensure!(
            max_tokens >= 8,
            "--max-tokens is {max_tokens}; it must be at least 8"
        );
        Ok(())
    }
}

pub fn device(name: &str) -> Result<Device> {
    let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
    match (kind, ordinal.parse::<usize>()) {
        ("cpu", _) if name == "cpu" => Ok(Device::Cpu),
        ("cuda", Ok(_)) if !cfg!(feature = "cuda") => {
            bail!(
                "--device is {name}, but this program was compiled without CUDA: add --features cuda to cargo's"
            )
        }
        ("cuda", Ok(ordinal)) => {
            Device::new_cuda(ordinal).with_context(|| format!("--device is {name}"))
        }
        _ => bail!("--device is {name:?}; it must be cpu, cuda or cuda:N"),
    }
}

/// Plans of the fine-tuning and of the pre-training.
pub fn plans(args: &Args, data: &Dataset) -> (Plan, Plan) {
    let (real, given) = (args.data.is_some(), args.model.is_some());
    let choose = |of_model, of_data, synthetic| match (given, real) {
        (true, _) => of_model,
        (false, true) => of_data,
        (false, false) => synthetic,
    };
    let batch = args.batch.unwrap_or(choose(4, 8, 32));
    let epoch = data.train.len().div_ceil(batch * args.accumulate);
    let rate = match (given, args.lora) {
        (true, Some(_)) => 2e-4,
        (true, None) => 2e-5,
        (false, _) => 3e-3,
    };
    let tuning = Plan {
        steps: args.steps.unwrap_or(choose(100, 3 * epoch, 300)),
        batch,
        accumulate: args.accumulate,
        loss: args.loss,
        learning_rate: args.lr.unwrap_or(rate),
        weight_decay: args.weight_decay,
        clip: args.clip,
        seed: args.seed.wrapping_add(1),
        points: choose(10, 15, 15),
        curve_samples: choose(16, 128, 128),
    };
    let steps = args.pretrain_steps.unwrap_or(choose(0, 5 * epoch, 600));
    (
        tuning,
        Plan {
            steps,
            accumulate: 1,
            seed: args.seed.wrapping_add(2),
            ..tuning
        },
    )
}
