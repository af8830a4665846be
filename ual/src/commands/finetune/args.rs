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
  ual finetune --data scored.jsonl --model MODEL.gguf --lora 8 --train-last 4
  mpirun -n 4 ual finetune --data scored.jsonl --model MODEL.gguf --lora 8   (compiled with --features mpi)
  mpirun -n 4 ual finetune --data scored.jsonl --model MODEL.gguf --lora 8 --vocab-parallel")]
pub struct Args {
    #[command(flatten)]
    pub training: training::args::Args,
    /// Under mpirun: each process takes some of the output projection's classes, and the whole of every batch, instead of all
    /// classes and a part of the batch. The results differ by rounding alone. One process has all classes
    #[arg(long)]
    pub vocab_parallel: bool,
}
