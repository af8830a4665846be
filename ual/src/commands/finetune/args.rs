//! Command-line arguments.

use crate::training;

/// Fine-tunes a small language model three ways, and compares them on held-out samples
///
/// Plainly (SFT), with constant label smoothing, and uncertainty-aware (UAL).
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ual finetune
  ual finetune --data scored.jsonl
  ual finetune --data scored.jsonl --model MODEL.gguf --lora 8
  mpirun -n 4 ual finetune --data scored.jsonl --model MODEL.gguf --lora 8   (compiled with --features mpi)")]
pub struct Args {
    #[command(flatten)]
    pub training: training::args::Args,
}
