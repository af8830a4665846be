//! Samples: where they come from, and batches of them.

pub mod batches;
pub mod conversation;
pub mod form;
pub mod input;
pub mod jsonl;
pub mod lines;
pub mod ngram;
pub mod packing;
mod parquet;
pub mod ratings;
pub mod response_counts;
pub mod samples;
pub mod synthetic;
