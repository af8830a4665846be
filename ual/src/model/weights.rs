//! A model's weights, put together from the tensors of its files.

use std::{collections::HashSet, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, quantized::QTensor};

use crate::model::{
    decoder::{LayerWeights, Weights},
    linear::{Affine, Matrix},
    names::{Names, bias},
};

/// What a model has beside what every one has.
pub struct Parts {
    /// The embedding is the output projection.
    pub tied: bool,
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    /// Of all three matrices.
    pub mlp_bias: bool,
}

/// A tensor as it is stored, matrices (out, in).
pub enum Stored {
    Full(Tensor),
    Quantised(Arc<QTensor>),
}

impl Stored {
    /// In f32. Fails where a number is not finite.
    fn full(&self, device: &Device) -> Result<Tensor> {
        let tensor = match self {
            Self::Full(tensor) => tensor.to_device(device)?.to_dtype(DType::F32)?,
            Self::Quantised(tensor) => tensor.dequantize(device)?.to_dtype(DType::F32)?,
        };
        // Zero times anything else is zero.
        let zero = (&tensor * 0.0)?.sum_all()?.to_scalar::<f32>()?;
        ensure!(
            zero == 0.0,
            "it has a number that is not finite; the file is damaged, or its training had failed"
        );
        Ok(tensor)
    }
}

/// `read` gives a tensor by its name. Matrices of layers stay quantised where they are `quantised` and may.
pub fn collect(
    names: &Names,
    layers: usize,
    parts: &Parts,
    quantised: bool,
    device: &Device,
    mut read: impl FnMut(&str) -> Result<Stored>,
) -> Result<Weights> {
    let mut stored = |name: &str| {
        let stored = read(name).and_then(|stored| Ok((stored.full(device)?, stored)));
        stored.with_context(|| name.to_string())
    };
    let mut layer = |i: usize| -> Result<LayerWeights> {
        let prefix = (names.layer)(i);
        let mut vector = |name: &str| Ok::<_, anyhow::Error>(stored(&format!("{prefix}{name}"))?.0);
        let (attention_norm, mlp_norm) = (vector(names.attention_norm)?, vector(names.mlp_norm)?);
        let qk_norm = match (parts.qk_norm, names.qk_norm) {
            (true, [q, k]) => Some([vector(q)?, vector(k)?]),
            (false, _) => None,
        };
        // (out, in) parts, one below another, to (in, out).
        let mut map = |rows: &[&str], with_bias: bool| -> Result<Affine> {
            let (mut full, mut kept) = (Vec::new(), Vec::new());
            for name in rows {
                let (tensor, stored) = stored(&format!("{prefix}{name}"))?;
                match stored {
                    Stored::Quantised(tensor) if quantised => kept.push(tensor),
                    _ => full.push(tensor),
                }
            }
            let matrix = match kept.is_empty() {
                true => Matrix::Full(Tensor::cat(&full, 0)?.t()?.contiguous()?),
                false => Matrix::Quantised(kept),
            };
            let bias = match with_bias {
                true => {
                    let parts = rows
                        .iter()
                        .map(|name| Ok(stored(&format!("{prefix}{}", bias(name)))?.0));
                    Some(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
                }
                false => None,
            };
            Ok(Affine { matrix, bias })
        };
        Ok(LayerWeights {
            attention_norm,
            qkv: map(&names.qkv, parts.qkv_bias)?,
            qk_norm,
            output: map(&[names.output], parts.output_bias)?,
            mlp_norm,
            gate_up: map(&names.gate_up, parts.mlp_bias)?,
            down: map(&[names.down], parts.mlp_bias)?,
        })
    };
    let layers = (0..layers).map(&mut layer).collect::<Result<_>>()?;
    Ok(Weights {
        layers,
        embedding: stored(names.embedding)?.0,
        norm: stored(names.norm)?.0,
        projection: match parts.tied {
            true => None,
            false => Some(stored(names.projection)?.0),
        },
        rope_factors: None,
    })
}

/// The names of a file's tensors that were not read yet.
pub struct Unread(HashSet<String>);

impl Unread {
    pub fn new<'a>(names: impl IntoIterator<Item = &'a String>) -> Self {
        Self(names.into_iter().cloned().collect())
    }

    pub fn read(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// That nothing was left: an expert, say, that the model would lack.
    pub fn check(self) -> Result<()> {
        let count = self.0.len();
        if let Some(first) = self.0.into_iter().min() {
            bail!("{count} of its tensors have no place in such a model, {first} among them");
        }
        Ok(())
    }
}
