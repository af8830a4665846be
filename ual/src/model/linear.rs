//! A linear map: trained, frozen, or frozen with a low-rank adapter.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor, Var, backend::BackendStorage,
    bail, quantized::QTensor,
};

#[derive(Clone)]
pub enum Matrix {
    /// (in, out), f32.
    Full(Tensor),
    /// (out, in) each, their outputs side by side. They become f32 when their turn comes: that costs little beside the
    /// product with a whole text's positions, and the f32 product is faster than candle's quantised ones.
    Quantised(Vec<Arc<QTensor>>),
}

impl Matrix {
    /// (in, out)
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Full(matrix) => matrix.dims2(),
            Self::Quantised(parts) => {
                let dims: Vec<_> = parts
                    .iter()
                    .map(|part| part.shape().dims2())
                    .collect::<Result<_>>()?;
                match &dims[..] {
                    [(_, input), rest @ ..] if rest.iter().all(|(_, other)| other == input) => {
                        Ok((*input, dims.iter().map(|(output, _)| output).sum()))
                    }
                    _ => bail!("parts of a matrix are {dims:?}, which do not go together"),
                }
            }
        }
    }

    /// (in, out)
    pub fn full(&self) -> Result<Tensor> {
        match self {
            Self::Full(matrix) => Ok(matrix.clone()),
            Self::Quantised(parts) => {
                let parts = parts.iter().map(|part| part.dequantize(&part.device()));
                let stacked = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
                stacked.t()?.contiguous()
            }
        }
    }

    /// x (N, in) to (N, out), as a constant.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(matrix) => x.contiguous()?.apply_op1(Frozen(matrix.clone())),
            Self::Quantised(parts) => {
                let outputs = parts.iter().map(|part| {
                    let part = part.dequantize(x.device())?;
                    x.contiguous()?.apply_op1(Frozen(part.t()?))
                });
                Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, D::Minus1)
            }
        }
    }
}

/// A linear map as it comes from a file.
#[derive(Clone)]
pub struct Affine {
    pub matrix: Matrix,
    /// (out)
    pub bias: Option<Tensor>,
}

/// y = x·W + b, or x·W + scale·(x·A)·B + b: LoRA, Hu et al., arXiv 2106.09685.
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

enum Weight {
    /// A variable (in, out).
    Trained(Tensor),
    Frozen(Matrix),
}

struct Adapter {
    /// (in, rank)
    down: Tensor,
    /// (rank, out), zeros at first.
    up: Tensor,
    scale: f64,
}

impl Linear {
    pub fn trained(weight: &Var) -> Self {
        Self {
            weight: Weight::Trained(weight.as_tensor().clone()),
            bias: None,
            adapter: None,
        }
    }

    pub fn frozen(weight: Matrix) -> Self {
        Self {
            weight: Weight::Frozen(weight),
            bias: None,
            adapter: None,
        }
    }

    /// `weight` stays as it is.
    pub fn adapted(weight: Matrix, down: &Var, up: &Var, scale: f64) -> Self {
        Self {
            adapter: Some(Adapter {
                down: down.as_tensor().clone(),
                up: up.as_tensor().clone(),
                scale,
            }),
            ..Self::frozen(weight)
        }
    }

    /// `bias` (out), a variable or not.
    pub fn with_bias(self, bias: Option<Tensor>) -> Self {
        Self { bias, ..self }
    }

    /// Without adapter, and without the graph.
    pub fn merged(&self) -> Result<Affine> {
        let matrix = match &self.weight {
            Weight::Trained(weight) => weight.clone(),
            Weight::Frozen(matrix) => matrix.full()?,
        };
        let matrix = match &self.adapter {
            Some(Adapter { down, up, scale }) => (matrix + (down.matmul(up)? * *scale)?)?,
            None => matrix,
        };
        Ok(Affine {
            matrix: Matrix::Full(matrix.detach()),
            bias: self.bias.as_ref().map(Tensor::detach),
        })
    }

    /// x (N, in) to (N, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = match &self.weight {
            Weight::Trained(weight) => x.matmul(weight)?,
            Weight::Frozen(matrix) => matrix.forward(x)?,
        };
        if let Some(Adapter { down, up, scale }) = &self.adapter {
            y = (y + (x.matmul(down)? * *scale)?.matmul(up)?)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// A product with a constant: candle's own computes and keeps a gradient of both factors.
struct Frozen(Tensor);

impl Frozen {
    fn apply<S: BackendStorage>(&self, x: &S, layout: &Layout, weight: &S) -> Result<(S, Shape)> {
        let (rows, depth) = layout.shape().dims2()?;
        let (_, columns) = self.0.dims2()?;
        let product = x.matmul(weight, (1, rows, columns, depth), layout, self.0.layout())?;
        Ok((product, (rows, columns).into()))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.0.storage_and_layout().0 {
            Storage::Cpu(weight) => self.apply(x, layout, weight),
            _ => bail!("a weight is not on the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match &*self.0.storage_and_layout().0 {
            Storage::Cuda(weight) => self.apply(x, layout, weight),
            _ => bail!("a weight is not on the CUDA device"),
        }
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gradient.detach().matmul(&self.0.t()?)?))
    }
}
