//! What only a GPU can do: capture a step in a CUDA graph, measure the memory it takes, and time kernels.

pub mod graph;
mod linear;
pub mod memory;
pub mod steps;
mod timer;
mod timing;

use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use clap::ValueEnum;

use crate::report::Report;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Timed {
    /// Entry points that take logits.
    Logits,
    /// `forward_linear`.
    Linear,
    All,
}

/// Times what was asked for next to what bounds it. Writes what it has to `out` after each shape: a run that is cut off
/// keeps it.
pub fn time(
    what: Timed,
    device: &Device,
    commit: &str,
    report: &mut Report,
    out: Option<&Path>,
) -> Result<()> {
    let timer = timer::Timer::new(device, commit)?;
    if what != Timed::Linear {
        timing::run(&timer, device, report, out)?;
    }
    if what != Timed::Logits {
        linear::run(&timer, device, report, out)?;
    }
    Ok(())
}
