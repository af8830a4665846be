//! Checks the CUDA path on a GPU against the f64 reference, then times it against a device copy.
//!
//! One self-contained program: build it anywhere with `scripts/gpu-check.sh`, run it where the GPU is with
//! `scripts/gpu-run.sh`. `--device cpu` runs the same checks on the CPU path, which rehearses the program itself.

mod bad_values;
mod cases;
#[cfg(feature = "cuda")]
mod device;
mod linear;
mod properties;
mod ranks;
mod report;
mod targets;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use candle_core::Device;
use clap::{Parser, ValueEnum};

use report::Report;

#[derive(Parser)]
#[command(
    about = "Checks candle-cross-entropy on a GPU against its f64 reference and times it against a device copy"
)]
struct Args {
    /// Where to compute; `cpu` rehearses the checks on the CPU path, without timings.
    #[arg(long, value_enum, default_value_t = Where::default())]
    device: Where,
    /// Fewer and smaller cases and no timings, for runs under compute-sanitizer.
    #[arg(long)]
    reduced: bool,
    /// No timings.
    #[arg(long)]
    no_timing: bool,
    /// No CUDA graphs of forward_linear. Graphs allocate and free memory at one address in several sizes, of which
    /// compute-sanitizer's memcheck (CUDA 13.0) knows one, and takes a use of the others for an access out of bounds.
    #[cfg(feature = "cuda")]
    #[arg(long)]
    no_linear_graphs: bool,
    /// Nothing but the timings, and a look at a few rows of each shape before it is timed.
    #[arg(long, conflicts_with_all = ["reduced", "no_timing"])]
    timing_only: bool,
    /// What is timed.
    #[cfg(feature = "cuda")]
    #[arg(long, value_enum, default_value_t = device::Timed::All)]
    timed: device::Timed,
    /// Nothing but steps of this kind, for who counts what they do.
    #[cfg(feature = "cuda")]
    #[arg(long, value_enum, requires = "steps")]
    step: Option<device::steps::Step>,
    #[cfg(feature = "cuda")]
    #[arg(long, requires = "step")]
    steps: Option<usize>,
    /// Writes the timings here as JSON, and what was checked: after each shape that is timed, and at the end.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Commit that the JSON names.
    #[arg(long, default_value = option_env!("GPU_CHECK_COMMIT").unwrap_or("unknown"))]
    commit: String,
}

#[derive(Clone, Copy, Default, PartialEq, ValueEnum)]
enum Where {
    #[cfg_attr(not(feature = "cuda"), default)]
    Cpu,
    #[cfg(feature = "cuda")]
    #[default]
    Cuda,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let device = match args.device {
        Where::Cpu => Device::Cpu,
        #[cfg(feature = "cuda")]
        Where::Cuda => Device::new_cuda(0)?,
    };
    ensure!(
        !(args.timing_only && device.is_cpu()),
        "--timing-only needs a GPU: `cargo bench --bench cpu` times the CPU path"
    );
    #[cfg(feature = "cuda")]
    if let (Some(step), Some(count)) = (args.step, args.steps) {
        device::steps::run(step, count, &device)?;
        return Ok(ExitCode::SUCCESS);
    }
    let out = args.out.as_deref();
    let mut report = Report::default();
    if !args.timing_only {
        cases::run(&device, args.reduced, &mut report);
        properties::run(&device, args.reduced, &mut report);
        linear::run(&device, args.reduced, &mut report);
        ranks::run(&device, args.reduced, &mut report);
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        if !args.timing_only {
            device::graph::check(&device, !args.no_linear_graphs, &mut report);
            if !args.reduced {
                device::memory::check_linear(&device, &mut report);
            }
        }
        if !args.reduced && !args.no_timing {
            device::time(args.timed, &device, &args.commit, &mut report, out)?;
        }
    }
    report.finish(out)
}
