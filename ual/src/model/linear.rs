//! A linear map: trained, frozen, or frozen with a low-rank adapter.

use candle_core::{
    CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, Var, backend::BackendStorage,
    bail,
};

/// y = x·W, or x·W + scale·(x·A)·B: LoRA, Hu et al., arXiv 2106.09685.
pub struct Linear {
    /// (in, out); a variable where it is trained itself.
    weight: Tensor,
    adapter: Option<Adapter>,
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
            weight: weight.as_tensor().clone(),
            adapter: None,
        }
    }

    /// `weight` stays as it is.
    pub fn adapted(weight: Tensor, down: &Var, up: &Var, scale: f64) -> Self {
        Self {
            weight,
            adapter: Some(Adapter {
                down: down.as_tensor().clone(),
                up: up.as_tensor().clone(),
                scale,
            }),
        }
    }

    /// (in, out), the adapter merged.
    pub fn merged(&self) -> Result<Tensor> {
        match &self.adapter {
            Some(Adapter { down, up, scale }) => &self.weight + (down.matmul(up)? * *scale)?,
            None => Ok(self.weight.clone()),
        }
    }

    /// x (N, in) to (N, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(Adapter { down, up, scale }) = &self.adapter else {
            return x.matmul(&self.weight);
        };
        let frozen = x.contiguous()?.apply_op1(Frozen(self.weight.clone()))?;
        frozen + (x.matmul(down)? * *scale)?.matmul(up)?
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
