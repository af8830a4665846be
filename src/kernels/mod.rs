//! The CUDA kernels as Rust sees them: what they are given and which of them is chosen.
//!
//! Also compiled into the emulation tests, so nothing here may depend on CUDA or on the rest of the crate.

pub mod abi;
pub mod select;
