//! Command-line arguments.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::model::pretrained::Overrides;

/// Compares the trainings on a small head over a frozen model's hidden states, many seeds and sizes in minutes
///
/// The model reads every prompt once. A head, which gives the response, is then trained on few samples and on many, each way
/// and with each mean smoothing, to overfit and beyond; what is chosen is chosen on a validation part.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Example:
  pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
  ual data human-ratings --archive vaderSentiment-3.3.2.tar.gz --out ratings.jsonl --exact 8980
  ual probe --data ratings.jsonl --model MODEL.gguf")]
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
    /// Width of the head's hidden layer
    #[arg(long, default_value_t = 64)]
    pub width: usize,
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        Ok(())
    }
}
