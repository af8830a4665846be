//! What the library promises, one file a property; [`common`] has the problems, [`accuracy`] the comparisons with the
//! reference.
//!
//! One program: what the files share is compiled once, and the linker runs once.

mod accuracy;
mod bad_input;
mod common;
mod cpu;
mod determinism;
mod distributions;
mod drop_in;
mod gradient;
mod graph;
mod linear;
mod magnitudes;
mod parallel;
mod parallel_errors;
mod properties;
mod pytorch;
mod ranks;
mod reductions;
mod special_values;
mod tcp;
mod threads;
mod ual;
mod ual_rows;
