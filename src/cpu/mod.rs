//! The CPU path: rows in parallel, or pieces of rows where rows are few, each vectorised for the instruction set
//! found at run time.

mod dispatch;
mod dots;
mod element;
mod finish;
mod general;
mod gradient;
mod linear;
mod logits;
mod memory;
mod parallel;
mod probabilities;
mod real;
mod results;
mod row;
mod rows;
mod running;
mod tasks;
mod transform;

/// Its `Backend` is in [`logits`], its `LinearBackend` in [`linear`].
pub(crate) struct Cpu;
