//! The program `ual`.

use std::process::ExitCode;

use anyhow::Result;
use candle_ual::{
    commands::{
        data::{self, args::What},
        elicit, finetune, probe, study,
    },
    failure,
};
use clap::{Parser, Subcommand};
use counting_allocator::Counting;

/// For the report on memory of `finetune`.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Uncertainty-aware fine-tuning of language models: samples whose right response is uncertain are smoothed more.
#[derive(Parser)]
#[command(
    name = "ual",
    version,
    arg_required_else_help = true,
    after_help = "\
Example, from samples to a model and to evidence:
  ual elicit --data samples.jsonl --out scored.jsonl --local MODEL.gguf
  ual finetune --data scored.jsonl --model MODEL.gguf --lora 8
  ual study --data scored.jsonl --model MODEL.gguf --lora 8

`ual finetune` and `ual study` alone make their data and their model."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Elicit(elicit::args::Args),
    Finetune(finetune::args::Args),
    Study(study::args::Args),
    Probe(probe::args::Args),
    Data(data::args::Args),
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("{}", failure::text(&error));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Elicit(args) => elicit::run::run(&args),
        Command::Finetune(args) => finetune::run::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Study(args) => study::run::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Probe(args) => probe::run::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Data(args) => match args.what {
            What::HumanRatings(args) => data::human_ratings::run(&args).map(|()| ExitCode::SUCCESS),
        },
    }
}
