//! Command-line arguments, and the checks of those that are not a training's.

use anyhow::{Result, ensure};

use crate::training;

/// Compares the trainings over several seeds with controls, and writes a report with pictures
///
/// The trainings are plain, with constant smoothing, and with uncertainty-aware smoothing of the same mean, spread evenly, by
/// the tokens' frequencies and over the tokens of responses, and by the model's own entropy; in the control the same
/// uncertainties are dealt to the samples at random. With --smoothings and --validation each is compared at its best.
#[derive(clap::Args, Debug)]
#[command(
    mut_arg("out", |out| out.default_value("out/study")), // not the folder of `ual finetune`
    mut_arg("smoothing_prior", |prior| prior.default_value("even")), // which others are compared with
    after_help = "\
Examples:
  ual study
  ual study --smoothings 0.03,0.1,0.3 --validation 0.2
  ual study --data scored.jsonl --model MODEL.gguf --lora 8 --limit 200"
)]
pub struct Args {
    /// How many seeds, from --seed on
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// Every arm that smooths is trained with each of these mean smoothings; the one with the least validation NLL is reported
    /// [default: that of --mean-smoothing alone]
    #[arg(
        long,
        value_name = "E,…",
        value_delimiter = ',',
        conflicts_with = "mean_smoothing"
    )]
    pub smoothings: Vec<f32>,
    /// Share of the training samples that is not trained on, but used to choose each arm's smoothing and when to stop it
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub validation: f64,
    #[command(flatten)]
    pub training: training::args::Args,
}

impl Args {
    /// The mean smoothings, at least one.
    pub fn means(&self) -> Vec<f32> {
        match self.smoothings.is_empty() {
            true => vec![self.training.mean_smoothing],
            false => self.smoothings.clone(),
        }
    }

    /// Of all options.
    pub fn check(&self) -> Result<()> {
        self.training.check()?;
        ensure!(
            self.seeds > 0,
            "--seeds is 0; it must be at least 1, and 3 for a deviation that means something"
        );
        let share = self.validation;
        ensure!(
            (0.0..1.0).contains(&share),
            "--validation is {share}; it must be at least 0 and below 1"
        );
        let max = self.training.max_smoothing;
        for (i, mean) in self.smoothings.iter().enumerate() {
            ensure!(
                (0.0..=max).contains(mean),
                "--smoothings has {mean}; each must be in [0, {max}], {max} being --max-smoothing"
            );
            ensure!(
                !self.smoothings[..i].contains(mean),
                "--smoothings has {mean} twice"
            );
        }
        ensure!(
            self.smoothings.len() < 2 || share > 0.0,
            "--smoothings has several values; to choose among them needs --validation above 0, 0.2 for instance"
        );
        Ok(())
    }
}
