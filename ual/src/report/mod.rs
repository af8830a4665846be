//! What trainings come to, for a reader: metrics, tables and pictures, and how far a job is.

pub mod curve;
pub mod markdown;
pub mod meter;
pub mod metrics;
pub mod plots;
pub mod run;
pub mod statistics;
pub mod units;
