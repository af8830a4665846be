//! In candle-nn's place: whatever its cross-entropy takes, with the same result.

use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction, cross_entropy};

use crate::common::*;

/// A problem of candle-nn's: (N, C) logits, N classes.
fn problem(dtype: DType) -> (Tensor, Tensor) {
    let logits = tensor(normal(&mut rng(7), 6 * 11, 3.0), &[6, 11], dtype);
    (logits, Tensor::new(&[3u8, 0, 10, 7, 7, 1], CPU).unwrap())
}

#[test]
fn targets_of_every_type_that_gather_takes() {
    let (logits, targets) = problem(DType::F32);
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let targets = targets.to_dtype(dtype).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let ours = cross_entropy(&logits, &targets).unwrap();
        let theirs = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
        assert_close(scalar(&ours), scalar(&theirs), 1e-6);
        let [ours, theirs] = [ours, theirs].map(|loss| loss.backward().unwrap());
        assert_all_close(
            ours.get(&logits).unwrap(),
            theirs.get(&logits).unwrap(),
            1e-6,
        );
    }
}

/// `nll(log_softmax(x), y)` is one call, for targets of any shape.
#[test]
fn log_softmax_and_nll_are_one_call() {
    let (logits, targets) = problem(DType::F32);
    let log_probabilities = candle_nn::ops::log_softmax(&logits, 1).unwrap();
    let theirs = candle_nn::loss::nll(&log_probabilities, &targets).unwrap();
    let (x, y) = (logits.reshape((2, 3, 11)), targets.reshape((2, 3)));
    let ours = cross_entropy(&x.unwrap(), y.unwrap()).unwrap();
    assert_close(scalar(&ours), scalar(&theirs), 1e-6);
}

/// A mean over the rows that a mask of zeros and ones keeps.
#[test]
fn a_mask_of_u8_is_row_weights() {
    let (logits, targets) = problem(DType::F32);
    let mask = Tensor::new(&[1u8, 0, 1, 1, 0, 1], CPU).unwrap();
    let losses = CrossEntropy::new().reduction(Reduction::None);
    let losses = values(&losses.forward(&logits, &targets).unwrap());
    let kept: Vec<f64> = [0, 2, 3, 5].map(|i| losses[i]).to_vec();
    let mean = kept.iter().sum::<f64>() / kept.len() as f64;
    let masked = CrossEntropy::new().row_weights(&mask);
    assert_close(
        scalar(&masked.forward(&logits, &targets).unwrap()),
        mean,
        1e-6,
    );
    let as_floats = CrossEntropy::new().row_weights(&mask.to_dtype(DType::F32).unwrap());
    let [a, b] = [masked, as_floats].map(|loss| loss.loss_and_grad(&logits, &targets).unwrap());
    assert_eq!(bits(&a.grad), bits(&b.grad));
}

/// f32 for 16-bit logits: an auxiliary loss in bf16 is brought to that.
#[test]
fn the_loss_of_bf16_logits_is_f32() {
    let (logits, targets) = problem(DType::BF16);
    let loss = cross_entropy(&logits, &targets).unwrap();
    assert_eq!(loss.dtype(), DType::F32);
    let auxiliary = logits.sqr().unwrap().mean_all().unwrap();
    assert!((&loss + &auxiliary).is_err());
    assert!((loss + auxiliary.to_dtype(DType::F32).unwrap()).is_ok());
}

/// A habit from other libraries, and the README's line that makes a masked class of it.
#[test]
fn the_lowest_finite_value_is_no_mask_but_becomes_one() {
    let logits = Tensor::new(&[[1f32, f32::MIN, 2.0, f32::MIN]], CPU).unwrap();
    let targets = Tensor::new(&[0u32], CPU).unwrap();
    let loss = CrossEntropy::new().smoothing(0.1);
    assert!(scalar(&loss.forward(&logits, &targets).unwrap()) > 1e37);
    let masked = Tensor::full(f32::NEG_INFINITY, logits.shape(), logits.device()).unwrap();
    let masked = logits
        .lt(-1e30)
        .unwrap()
        .where_cond(&masked, &logits)
        .unwrap();
    let others = Tensor::new(&[[1f32, 2.0]], CPU).unwrap();
    let [a, b] = [masked, others].map(|x| scalar(&loss.forward(&x, &targets).unwrap()));
    assert_close(a, b, 1e-6);
}

/// 0, and not −0, which prints as such.
#[test]
fn nothing_gives_0() {
    for dtype in FLOATS {
        let logits = Tensor::zeros((0, 5), dtype, CPU).unwrap();
        let targets = Tensor::zeros(0, DType::U32, CPU).unwrap();
        for reduction in [Reduction::Mean, Reduction::Sum, Reduction::SumOver(3.0)] {
            let loss = CrossEntropy::new().reduction(reduction);
            let results = [
                loss.forward(&logits, &targets).unwrap(),
                loss.loss_and_grad(&logits, &targets).unwrap().loss,
                loss.reference(&logits, &targets).unwrap().loss,
            ];
            for loss in results {
                assert_eq!(bits(&loss), [0], "{dtype:?} {reduction:?}");
            }
        }
    }
}
