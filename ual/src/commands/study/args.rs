//! Command-line arguments.

use crate::training;

/// Compares the trainings over several seeds with a control, and writes a report with pictures
///
/// The trainings are plain, with constant smoothing, and with uncertainty-aware smoothing of the same mean, spread evenly and
/// by the tokens' frequencies; in the control the same uncertainties are dealt to the samples at random.
#[derive(clap::Args, Debug)]
#[command(
    mut_arg("out", |out| out.default_value("out/study")), // not the folder of `ual finetune`
    after_help = "\
Examples:
  ual study
  ual study --data scored.jsonl --model MODEL.gguf --lora 8 --limit 200"
)]
pub struct Args {
    /// How many seeds, from --seed on
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    #[command(flatten)]
    pub training: training::args::Args,
}
