//! Cross-entropy over large vocabularies for [candle](https://docs.rs/candle-core), with a label-smoothing
//! coefficient of its own for every row, fused into one pass over the logits.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_cross_entropy::CrossEntropy;
//!
//! # fn main() -> candle_core::Result<()> {
//! let device = Device::Cpu;
//! let logits = Var::randn(0f32, 1f32, (4, 8, 1000), &device)?; // (batch, sequence, vocabulary)
//! let targets = Tensor::zeros((4, 8), candle_core::DType::U32, &device)?;
//! let smoothing = Tensor::new(&[[0.0f32], [0.1], [0.05], [0.2]], &device)?; // a coefficient a sample
//! let loss = CrossEntropy::new().smoothing(&smoothing).forward(&logits, &targets)?;
//! let gradients = loss.backward()?;
//! # assert!(gradients.get(&logits).is_some());
//! # Ok(())
//! # }
//! ```
//!
//! # Mathematics
//!
//! Row i has logits x_k for k in \[0, V), a target y, a smoothing ε_i in \[0, 1\] and a weight w_i ≥ 0. With a logit
//! scale s and a softcap c,
//!
//! ```text
//! z_k    = s·x_k,  or  c·tanh(s·x_k / c) with a softcap
//! lse    = log Σ_k exp(z_k)           p_k = exp(z_k − lse)
//! nll    = lse − z_y                  smooth = lse − (1/K) Σ_k z_k
//! loss_i = w_i · [ (1−ε_i)·nll + ε_i·smooth + λ·lse² ]
//! ```
//!
//! In general a row has a target distribution t ([`Targets`]), a prior u that ε is spread by (even, or
//! [one of the caller's](CrossEntropy::smoothing_prior), renormalised over the row's classes that are not masked),
//! [class weights](CrossEntropy::class_weights) c and a [weight β of its entropy](CrossEntropy::entropy_weight)
//! H = −Σ p log p:
//!
//! ```text
//! q_k    = (1−ε)·t_k + ε·u_k                C = Σ_k c_k q_k
//! loss_i = w_i · [ Σ_k c_k q_k (lse − z_k) + λ·lse² + β·H ]
//! dz_k   = w_i · [ (C + 2λ·lse)·p_k − c_k q_k − β·p_k·(log p_k + H) ]
//! ```
//!
//! Probabilities are used as they are and need not sum to 1. A probability above 0 of a masked class makes the loss +inf.
//!
//! * ε is spread over all K classes, the target among them (PyTorch's convention).
//! * A logit of −inf is a masked class: probability and gradient 0, no smoothing mass; K counts the others. A masked
//!   target has loss +inf, a row with every class masked has loss +inf and gradient 0. The lowest finite value is a class
//!   like any other, and with ε > 0 a loss of up to ε·3.4e38/K: make it −inf by
//!   `logits.lt(-1e30)?.where_cond(&minus_infinities, &logits)?`.
//! * NaN or +inf in a row makes that row NaN, and no other.
//! * An ignored row has loss, gradient and statistics 0 and does not count. A row of weight 0 has loss and gradient 0.
//! * Finite logits of any magnitude, under any scale and softcap, give what the formulas say: exponents are formed from
//!   differences of logits.
//! * The same input gives the same bits, and a row's results do not depend on the rows beside it.
//!
//! [`CrossEntropy::reference`] computes all of this in f64 with plain loops; the fast paths are tested against it.
//!
//! # Features
//!
//! * `cuda`: the CUDA kernels; needs nvcc of CUDA 12.1 or newer when building.
//! * `nvtx`: names every kernel launch in an `nsys` timeline.
//! * `nccl`: ranks that have a GPU each ([`parallel`]); needs NCCL when linking.
//! * `mpi`: ranks that are processes under MPI; needs an MPI library and libclang when building.
//! * `gemm-avx512` (default): AVX-512 kernels in the gemm crate, and so in all of candle in the program, with the same bits.
//!
//! It works with candle 0.11.1.
//!
//! # Where to look
//!
//! [`CrossEntropy`] is the loss, [`ual`] turns uncertainties into smoothing values, [`parallel`] has ranks that share a loss.
//! Inside, from the top:
//!
//! * `options`, `targets` and `results` are what a caller sets and gets, `loss` the entry points; `reference` is the oracle.
//! * `call` checks the arguments of one call and brings them to the form that everything below reads; `rows` finds rows
//!   in memory; `shard` is what ranks tell each other about it.
//! * `op` ties the loss of logits into candle's graph, `linear` that of hidden states; `tiles` cuts the latter's logits.
//! * `backend` is what a device does for them. `cpu` is the vectorised path, `cuda` launches the kernels in `kernels/`.
//! * `kernels` is what these are given, and chooses among them; `blas` puts products into BLAS's terms.
//!
//! `docs/architecture.md` follows a call through them and says where changes go.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_docs)]

mod backend;
mod blas;
mod call;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
// without, the emulation tests use what is left
mod kernels;
mod linear;
mod loss;
mod op;
mod options;
pub mod parallel;
mod reference;
mod results;
mod rows;
mod shard;
mod targets;
mod tiles;
pub mod ual;

/// Their code must compile.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/guide.md")]
    struct Guide;
    #[doc = include_str!("../docs/parallel.md")]
    struct Parallel;
}

pub use loss::cross_entropy;
pub use options::{CrossEntropy, Reduction, RowValue, Smoothing};
pub use results::{LossAndGrad, RowStats};
pub use targets::Targets;
