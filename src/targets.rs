//! What a row should be: the `targets` argument of every entry point.

use candle_core::Tensor;

/// The rows' target distributions t. Constants of the loss: no gradient flows into them.
///
/// Every entry point takes `impl Into<Targets>`: a tensor of integers (…) is [`Classes`](Self::Classes), one of floats
/// (…, V) [`Probabilities`](Self::Probabilities), and [`Targets::top_k`] names a few classes a row.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_cross_entropy::{CrossEntropy, Targets};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::randn(0f32, 1f32, (2, 10), &Device::Cpu)?;
/// let classes = Tensor::new(&[[3u32, 7], [0, 1]], &Device::Cpu)?; // what a teacher stored of each row
/// let probabilities = Tensor::new(&[[0.75f32, 0.125], [0.5, 0.5]], &Device::Cpu)?;
/// let loss = CrossEntropy::new().forward(&logits, Targets::top_k(&classes, &probabilities))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub enum Targets {
    /// One class a row: (…) of u8, u32 or i64.
    Classes(Tensor),
    /// A probability t_k ≥ 0 for every class: (…, V) of floats, rows with stride 1 inside (other views are copied). They
    /// are used as they are and need not sum to 1. No row is ignored.
    Probabilities(Tensor),
    /// A few classes a row with their probabilities: (…, k) of u8, u32 or i64, and (…, k) of floats.
    ///
    /// They need not sum to 1. An entry whose class is the `ignore_index` is absent, whatever its probability; a class
    /// named twice has the sum; a row without entries is ignored.
    TopK {
        /// The classes, (…, k).
        classes: Tensor,
        /// Their probabilities, (…, k).
        probabilities: Tensor,
    },
}

impl Targets {
    /// [`Targets::TopK`] of classes (…, k) and probabilities (…, k).
    pub fn top_k(classes: &Tensor, probabilities: &Tensor) -> Self {
        Self::TopK {
            classes: classes.clone(),
            probabilities: probabilities.clone(),
        }
    }

    /// The same with every tensor given to `f`.
    pub(crate) fn try_map(
        &self,
        f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        Ok(match self {
            Self::Classes(classes) => Self::Classes(f(classes)?),
            Self::Probabilities(probabilities) => Self::Probabilities(f(probabilities)?),
            Self::TopK {
                classes,
                probabilities,
            } => Self::TopK {
                classes: f(classes)?,
                probabilities: f(probabilities)?,
            },
        })
    }
}

impl<T: AsRef<Tensor>> From<T> for Targets {
    fn from(targets: T) -> Self {
        let targets = targets.as_ref().clone();
        if targets.dtype().is_float() {
            Self::Probabilities(targets)
        } else {
            Self::Classes(targets)
        }
    }
}

impl From<&Targets> for Targets {
    fn from(targets: &Targets) -> Self {
        targets.clone()
    }
}
