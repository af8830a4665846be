//! Distillation from what a teacher stored: of every token its k most probable classes and their probabilities.
//!
//! ```sh
//! cargo run --release --example distillation
//! ```

use candle_core::{D, DType, Device, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Targets};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};

const TOKENS: usize = 256;
const DIM: usize = 32;
const VOCAB: usize = 1000;
const K: usize = 16;

fn main() -> Result<()> {
    let device = &Device::Cpu;
    let hidden = Tensor::randn(0f32, 1f32, (TOKENS, DIM), device)?;

    // The teacher, once: a file of classes (N, k) u32 and probabilities (N, k), 128 bytes a token here, where its logits
    // have 4000. Entries of −100 in classes of i64 would be absent, so rows may have fewer than k.
    let teacher = Tensor::randn(0f32, 1f32, (VOCAB, DIM), device)?;
    let probabilities = candle_nn::ops::softmax(&hidden.matmul(&teacher.t()?)?, D::Minus1)?;
    let (sorted, order) = probabilities.sort_last_dim(false)?;
    let stored = (order.narrow(1, 0, K)?, sorted.narrow(1, 0, K)?);
    let mass = stored.1.sum(D::Minus1)?.mean_all()?.to_scalar::<f32>()?;
    println!("the {K} most probable of {VOCAB} classes have {mass:.3} of the teacher's mass");

    // The student: its loss takes what was stored as it is, and never holds its own logits.
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, device);
    let student = candle_nn::linear_no_bias(DIM, VOCAB, builder)?;
    let parameters = ParamsAdamW {
        lr: 0.05,
        ..Default::default()
    };
    let mut optimizer = AdamW::new(weights.all_vars(), parameters)?;
    let targets = Targets::top_k(&stored.0, &stored.1);
    for step in 0..=100 {
        let loss = CrossEntropy::new().forward_linear(&hidden, student.weight(), None, &targets)?;
        optimizer.backward_step(&loss)?;
        if step % 25 == 0 {
            // What it aims at: KL of the teacher's whole distribution from the student's.
            let log_p = candle_nn::ops::log_softmax(&student.forward(&hidden)?, D::Minus1)?;
            let terms = (&probabilities * (probabilities.log()? - log_p)?)?;
            let kl = terms.sum(D::Minus1)?.mean_all()?.to_scalar::<f32>()?;
            println!(
                "step {step:3}: loss {:.4}, KL {kl:.4}",
                loss.to_scalar::<f32>()?
            );
        }
    }
    Ok(())
}
