//! Training: [`setup`] prepares what the methods that are compared have in common, [`train`] runs one of them.

pub mod args;
pub mod checkpoint;
pub mod evaluate;
pub mod method;
pub mod optimizer;
pub mod plan;
pub mod progress;
pub mod ranks;
pub mod setup;
pub mod slice;
pub mod smoothing;
pub mod train;
pub mod watch;
