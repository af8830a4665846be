//! A training step with a smoothing of its own for every sample:
//!
//! ```sh
//! cargo run --release --example training_step
//! ```

use candle_core::{DType, Device, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, ual::SmoothingMap};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};

const VOCAB: usize = 100;
const DIM: usize = 32;
/// Not trained on: prompts and padding.
const IGNORED: i64 = -100;

fn main() -> Result<()> {
    let device = Device::Cpu;
    // Stands for a language model: of each token alone it predicts the next.
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, &device);
    let embedding = candle_nn::embedding(VOCAB, DIM, builder.pp("embedding"))?;
    let output = candle_nn::linear_no_bias(DIM, VOCAB, builder.pp("output"))?;
    let mut optimizer = AdamW::new(weights.all_vars(), ParamsAdamW::default())?;

    // Two samples (B = 2) of five tokens (T = 5). Targets are the next tokens; the first two are of the prompt.
    let inputs = Tensor::new(&[[1u32, 2, 3, 4, 5], [1, 6, 7, 8, 0]], &device)?;
    let targets = Tensor::new(
        &[
            [IGNORED, IGNORED, 4, 5, 9],
            [IGNORED, IGNORED, 8, 9, IGNORED],
        ],
        &device,
    )?;

    // How uncertain the right response is, in [0, 1]: of the second sample more. The map is fitted on all samples of a
    // training set, here on these two; smoothing is 0.1 in the mean and 0.5 at most.
    let uncertainties = [0.2, 0.7];
    let map = SmoothingMap::fit(&uncertainties, 0.1, 0.5)?;
    let smoothing = map.smoothing_values(&uncertainties)?;
    println!("smoothing of the two samples: {smoothing:?}");
    let smoothing = Tensor::from_vec(smoothing, (2, 1), &device)?; // (B, 1): the same for all tokens of a sample

    for step in 1..=50 {
        let hidden = embedding.forward(&inputs)?; // (B, T, D)
        // The mean over the targets that are not ignored. From hidden states, so that the logits (B, T, V) are never in
        // memory; with logits at hand it is `forward(&logits, &targets)`.
        let loss = CrossEntropy::new()
            .ignore_index(IGNORED)
            .smoothing(&smoothing)
            .forward_linear(&hidden, output.weight(), None, &targets)?;
        optimizer.backward_step(&loss)?;
        if step % 10 == 0 {
            println!("step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    Ok(())
}
