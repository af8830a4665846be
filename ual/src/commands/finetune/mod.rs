//! `ual finetune` fine-tunes a small language model three times from the same weights and the same batches: plainly (SFT),
//! with a constant label smoothing, and uncertainty-aware (UAL), where a sample's smoothing grows with its uncertainty and
//! has the constant's mean. Reports how well each predicts held-out samples, certain and uncertain ones apart, and how much
//! memory a batch takes with the loss from hidden states and from logits (`--loss`).
//!
//! Without `--data` the program makes its data, whose true answer distributions are known: see
//! [`synthetic`](crate::data::synthetic). With it, a line of the file is a sample: see [`jsonl`](crate::data::jsonl), and
//! [`ngram`](crate::data::ngram) for how uncertainties are estimated where there are none. With `--model` the weights and
//! the tokeniser are a model's of the Llama family (see [`pretrained`](crate::model::pretrained)), all of which or adapters
//! of which are trained; what UAL made of it is saved in the same form. With `--checkpoint-every` a run that was cut off
//! goes on exactly where it was (`--resume`).
//!
//! Started as several processes (`mpirun`, feature `mpi`) it trains as one: each takes its part of every batch, see
//! [`ranks`](crate::training::ranks), or with `--vocab-parallel` some classes, see [`slice`](crate::training::slice).
//!
//! The same arguments give the same numbers on one machine with the same number of threads (`RAYON_NUM_THREADS`): how
//! candle splits a matrix product, and so how it rounds, depends on both.

pub mod args;
pub mod memory;
pub mod run;
