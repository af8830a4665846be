//! The seam between candle's graph and the devices: what a device does for the loss. `cpu` and `cuda` implement [`Backend`]
//! and [`LinearBackend`] and know neither the graph nor each other; `op` and `linear` choose one and keep what its forward
//! leaves for its backward.

use std::{
    any::Any,
    sync::{Mutex, OnceLock},
};

use candle_core::{DType, Layout, Result, Storage, Tensor, backend::BackendStorage, bail};

use crate::{call::Call, results::RowStats, tiles::Plan};

/// The loss of logits on one kind of device. Logits are (…, V) with rows that [`row_offsets`](crate::rows::row_offsets) takes.
pub(crate) trait Backend {
    type Storage: BackendStorage;
    /// Normalisers of the rows, from the forward to the backward.
    type Saved: Any + Send + Sync;

    fn forward(
        call: &Call,
        logits: &Self::Storage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Forward<Self::Storage, Self::Saved>>;

    /// The gradient, contiguous. `upstream` is that of the result, contiguous: a value, or one a row.
    fn backward(
        call: &Call,
        saved: &Self::Saved,
        upstream: &Tensor,
        logits: &Self::Storage,
        layout: &Layout,
    ) -> Result<Self::Storage>;

    /// The gradient over the logits, whose rows share no element.
    fn backward_inplace(
        call: &Call,
        saved: &Self::Saved,
        upstream: &Tensor,
        logits: &mut Self::Storage,
        layout: &Layout,
    ) -> Result<()>;

    /// Forward and backward at once: the gradient of the reduced loss, contiguous.
    fn loss_and_grad(
        call: &Call,
        logits: &Self::Storage,
        layout: &Layout,
        stats: bool,
    ) -> Result<(Self::Storage, Fused)>;

    /// The same over the logits, whose rows share no element.
    fn loss_and_grad_inplace(
        call: &Call,
        logits: &mut Self::Storage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Fused>;
}

/// The loss of hidden states and an output projection, tile by tile of the logits.
pub(crate) trait LinearBackend: Backend {
    /// Normalisers of the rows and the tiles that were kept, from the forward to the backward.
    type LinearSaved: Any + Send + Sync;

    /// Bytes of logits in a tile, unless the caller wants others.
    const TILE_BYTES: usize;
    /// Rows of a tile start at multiples of so many elements.
    const TILE_PITCH: usize;
    /// Type of a tile's logits, which are products of factors of this type.
    fn tile_dtype(factors: DType) -> DType;

    /// The storage, if it is this device's.
    fn storage(storage: &Storage) -> Option<&Self::Storage>;
    fn into_storage(storage: Self::Storage) -> Storage;

    fn forward_linear(
        call: &Call,
        plan: &Plan,
        operands: &Operands<Self::Storage>,
        stats: bool,
    ) -> Result<Forward<Self::Storage, Self::LinearSaved>>;

    /// Gradients of hidden, weight and bias, those that are wanted; `upstream` as of [`backward`](Backend::backward).
    fn backward_linear(
        call: &Call,
        plan: &Plan,
        saved: &Self::LinearSaved,
        upstream: &Tensor,
        operands: &Operands<Self::Storage>,
        wanted: Wanted,
    ) -> Result<[Option<Self::Storage>; 3]>;
}

/// What a forward returns, of a backend's storage and what it keeps for the backward.
pub(crate) struct Forward<Storage, Saved> {
    /// Of [`Call::loss_shape`].
    pub loss: Storage,
    pub stats: Option<RowStats>,
    pub saved: Saved,
}

/// What forward and backward at once return beside the gradient.
pub(crate) struct Fused {
    pub loss: Tensor,
    pub stats: Option<RowStats>,
}

/// Storages of the arguments: hidden (N, D), weight (V, D), bias (V).
pub(crate) struct Operands<'a, Storage> {
    pub hidden: (&'a Storage, &'a Layout),
    pub weight: (&'a Storage, &'a Layout),
    pub bias: Option<(&'a Storage, &'a Layout)>,
}

/// Gradients that someone asks for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub hidden: bool,
    pub weight: bool,
    pub bias: bool,
}

/// Logits of the first tiles. The first backward takes them, a second one computes them again.
pub(crate) struct KeptTiles<Storage>(Mutex<Vec<Storage>>);

impl<Storage> KeptTiles<Storage> {
    pub fn new(tiles: Vec<Storage>) -> Self {
        Self(Mutex::new(tiles))
    }

    pub fn take(&self) -> impl Iterator<Item = Storage> + use<Storage> {
        let mut tiles = self.0.lock().unwrap_or_else(|e| e.into_inner());
        std::mem::take(&mut *tiles).into_iter()
    }
}

/// What an operation of candle's keeps from its forward, of whichever backend ran.
#[derive(Default)]
pub(crate) struct Past {
    saved: OnceLock<Box<dyn Any + Send + Sync>>,
    stats: OnceLock<RowStats>,
}

impl Past {
    /// Keeps all but the loss.
    pub fn keep<Storage, Saved: Any + Send + Sync>(
        &self,
        forward: Forward<Storage, Saved>,
    ) -> Storage {
        let _ = self.saved.set(Box::new(forward.saved));
        if let Some(stats) = forward.stats {
            let _ = self.stats.set(stats);
        }
        forward.loss
    }

    pub fn stats(&self) -> Option<RowStats> {
        self.stats.get().cloned()
    }

    /// What a backend's forward left for its backward.
    pub fn saved<Saved: Any>(&self) -> Result<&Saved> {
        let saved = self.saved.get().expect("the forward ran");
        match saved.downcast_ref() {
            Some(saved) => Ok(saved),
            None => bail!("cross-entropy: forward and backward on different devices"),
        }
    }
}
