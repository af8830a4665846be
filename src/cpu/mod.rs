//! The CPU path: rows in parallel, or pieces of rows where rows are few, each vectorised for the instruction set
//! found at run time.

mod element;
mod general;
mod linear;
mod logits;
mod memory;
mod parallel;
mod real;
mod results;
mod row;
mod tasks;

/// Its `Backend` is in [`logits`], its `LinearBackend` in [`linear`].
pub(crate) struct Cpu;
