//! Command-line arguments.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::{commands::probe::trainings::validation, model::pretrained::Overrides};

/// Compares the trainings on a small head over a frozen model's hidden states, many seeds and sizes in minutes
///
/// The model reads every prompt once. A head, which gives the response, is then trained on few samples and on many, each way
/// and with each mean smoothing, to overfit and beyond; what is chosen is chosen on a validation part.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
  ual data human-ratings --archive vaderSentiment-3.3.2.tar.gz --out ratings.jsonl --exact 8000 --easy 8000
  RAYON_NUM_THREADS=1 ual probe --data ratings.jsonl --group kind --limit 15000 --model MODEL.gguf

Trainings take a core a seed; with more threads than RAYON_NUM_THREADS=1 allows, those of one get in the way of another's.")]
pub struct Args {
    /// Samples of one prompt and one of a few responses each, as `ual data` makes them, with "uncertainty", "held_out" and,
    /// where that is true, "response_counts"
    #[arg(long, value_name = "FILE.jsonl")]
    pub data: PathBuf,
    /// A model of the Llama family: a GGUF file, or a folder with config.json, tokenizer.json and safetensors
    #[arg(long, value_name = "FILE.gguf")]
    pub model: PathBuf,
    #[command(flatten)]
    pub overrides: Overrides,
    /// Folder for the report and for hidden.safetensors, the hidden states, which a later run with the same data and model takes
    #[arg(long, value_name = "FOLDER", default_value = "out/probe")]
    pub out: PathBuf,
    /// Use only so many samples, drawn at random
    #[arg(long)]
    pub limit: Option<usize>,
    /// How many samples a head is trained on, a study each
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [50, 100, 200, 500, 2000, 10_000])]
    pub sizes: Vec<usize>,
    /// How many seeds, from --seed on: of the samples drawn, the controls, the weights and the batches
    #[arg(long, default_value_t = 20)]
    pub seeds: u64,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Mean smoothings, of which every training has the best on its validation part
    #[arg(long, value_name = "E,…", value_delimiter = ',', default_values_t = [0.01, 0.03, 0.1, 0.2, 0.4])]
    pub smoothings: Vec<f32>,
    /// Epochs of a training on up to 500 samples; larger ones have fewer, by the square root of the size
    #[arg(long, default_value_t = 64)]
    pub epochs: usize,
    /// The field that says of what kind a sample is; with it there is a control in which uncertainties are dealt to samples
    /// of the same kind
    #[arg(long, value_name = "FIELD")]
    pub group: Option<String>,
    /// Outputs of the heads whose smoothing is spread over a vocabulary; those that are no response are never right
    #[arg(long, default_value_t = 128)]
    pub outputs: usize,
    /// Samples of each stretch of uncertainties that are trained on alone, for which smoothing is best there; 0 for no such trainings
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub stretch_size: usize,
    /// Width of the head's hidden layer
    #[arg(long, default_value_t = 32)]
    pub width: usize,
    /// Learning rate, constant
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("--seeds", self.seeds as usize),
            ("--epochs", self.epochs),
            ("--width", self.width),
        ];
        for (name, value) in positive {
            ensure!(value > 0, "{name} is 0; it must be at least 1");
        }
        for &size in &self.sizes {
            ensure!(size > 0, "--sizes has 0; a size must be at least 1");
        }
        for &mean in &self.smoothings {
            ensure!(
                mean > 0.0 && mean < 1.0,
                "--smoothings has {mean}; a mean smoothing must be above 0 and below 1"
            );
        }
        ensure!(
            self.lr.is_finite() && self.lr > 0.0,
            "--lr is {}; it must be above 0",
            self.lr
        );
        Ok(())
    }

    /// Of data with so many samples to train on and so many responses.
    pub fn check_sizes(&self, samples: usize, responses: usize) -> Result<()> {
        for &size in &self.sizes {
            let needed = size + validation(size);
            ensure!(
                needed <= samples,
                "--sizes has {size}: with a validation part {needed} samples are needed, and there are {samples} to train on"
            );
        }
        ensure!(
            self.outputs >= responses,
            "--outputs is {}; there are {responses} responses",
            self.outputs
        );
        Ok(())
    }
}
