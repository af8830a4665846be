//! The options of the loss: what [`CrossEntropy`]'s builder methods set.

use std::sync::Arc;

use candle_core::Tensor;

use crate::parallel::{Communicator, Ranks};

/// Label smoothing: the share of the target distribution that is spread over all classes, evenly or by a
/// [prior](CrossEntropy::smoothing_prior).
///
/// Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7.
#[derive(Clone, Debug)]
pub enum Smoothing {
    /// One coefficient in \[0, 1\] for all rows.
    Uniform(f32),
    /// A coefficient in \[0, 1\] for each row: a float tensor broadcastable to the targets' shape, for instance
    /// (B, 1) for targets (B, T). It is a constant of the loss: no gradient flows into it.
    PerRow(Tensor),
}

impl From<f32> for Smoothing {
    fn from(value: f32) -> Self {
        Self::Uniform(value)
    }
}

impl From<Tensor> for Smoothing {
    fn from(values: Tensor) -> Self {
        Self::PerRow(values)
    }
}

impl From<&Tensor> for Smoothing {
    fn from(values: &Tensor) -> Self {
        Self::PerRow(values.clone())
    }
}

/// A number for all rows, or one for each.
#[derive(Clone, Debug)]
pub enum RowValue {
    /// One for all rows.
    Uniform(f32),
    /// One for each row: a float tensor broadcastable to the rows' shape, for instance (B, 1) for rows (B, T). It is a
    /// constant of the loss: no gradient flows into it.
    PerRow(Tensor),
}

impl From<f32> for RowValue {
    fn from(value: f32) -> Self {
        Self::Uniform(value)
    }
}

impl From<Tensor> for RowValue {
    fn from(values: Tensor) -> Self {
        Self::PerRow(values)
    }
}

impl From<&Tensor> for RowValue {
    fn from(values: &Tensor) -> Self {
        Self::PerRow(values.clone())
    }
}

/// How row losses become the result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reduction {
    /// No reduction: the result has the targets' shape.
    None,
    /// Σ loss_i.
    Sum,
    /// Σ loss_i / Σ w_i over the rows that are not ignored; 0 where there are none. With
    /// [class weights](CrossEntropy::class_weights) and a class a row, Σ loss_i / Σ w_i·c_y, y the row's class: PyTorch's
    /// rule. A sum of 0 counts as 1.
    Mean,
    /// Σ loss_i / n, n > 0: for gradient accumulation and data parallelism, where n counts the rows of all parts.
    SumOver(f64),
}

/// Cross-entropy loss, configured by builder methods whose defaults are PyTorch's: no smoothing, `ignore_index` −100,
/// mean over the rows that are not ignored. Cheap to clone.
///
/// Logits are (…, V) of type f32, f16 or bf16 (f64 on the CPU), rows with stride 1 inside (other views are copied);
/// targets are (…) of type u8, u32 or i64, or distributions ([`Targets`](crate::Targets)). Everything must be on one device.
///
/// Every entry point fails, naming the argument, what it was and what it must be, when shapes, types, devices or
/// scalars do not fit. Bad values inside tensors (a target outside the vocabulary that is not ignored, ε outside
/// \[0, 1\], a negative weight) fail on the CPU, naming the first such row; on CUDA they make their row NaN, and fail
/// under [`check_inputs`](Self::check_inputs).
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    pub(crate) smoothing: Smoothing,
    pub(crate) row_weights: Option<Tensor>,
    pub(crate) class_weights: Option<Tensor>,
    pub(crate) smoothing_prior: Option<Tensor>,
    pub(crate) entropy_weight: RowValue,
    pub(crate) ignore_index: i64,
    pub(crate) z_loss: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) logit_scale: f32,
    pub(crate) vocab_size: Option<usize>,
    pub(crate) reduction: Reduction,
    pub(crate) inplace_backward: bool,
    pub(crate) check_inputs: bool,
    pub(crate) memory_budget: usize,
    pub(crate) tile_bytes: Option<usize>,
    pub(crate) compact_rows: bool,
    pub(crate) vocab_shard: Option<Shard>,
    pub(crate) data_parallel: Option<Ranks>,
}

/// This rank's part of a vocabulary in slices.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub ranks: Ranks,
    pub first_class: usize,
    pub vocabulary: usize,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self::new()
    }
}

impl CrossEntropy {
    /// No smoothing, `ignore_index` −100, [`Reduction::Mean`].
    pub fn new() -> Self {
        Self {
            smoothing: Smoothing::Uniform(0.0),
            row_weights: None,
            class_weights: None,
            smoothing_prior: None,
            entropy_weight: RowValue::Uniform(0.0),
            ignore_index: -100,
            z_loss: 0.0,
            softcap: None,
            logit_scale: 1.0,
            vocab_size: None,
            reduction: Reduction::Mean,
            inplace_backward: false,
            check_inputs: false,
            memory_budget: 256 << 20,
            tile_bytes: None,
            compact_rows: false,
            vocab_shard: None,
            data_parallel: None,
        }
    }

    /// Label smoothing ε in \[0, 1\]: one f32 for all rows, or a tensor with a value a row (see [`Smoothing`]).
    ///
    /// ε is spread over all K classes, the target among them, evenly or by a
    /// [prior](Self::smoothing_prior). For the convention that spreads it over the K − 1
    /// others, pass ε·K/(K − 1).
    pub fn smoothing(mut self, smoothing: impl Into<Smoothing>) -> Self {
        self.smoothing = smoothing.into();
        self
    }

    /// Weight w_i ≥ 0 of every row's loss: a tensor of floats, or a mask of u8, broadcastable to the targets' shape.
    /// [`Reduction::Mean`] divides by the sum, so with a mask it is the mean over what the mask keeps. A constant of the
    /// loss: no gradient flows into it (multiply the losses of [`Reduction::None`] where one should).
    pub fn row_weights(mut self, weights: &Tensor) -> Self {
        self.row_weights = Some(weights.clone());
        self
    }

    /// Weight c_k ≥ 0 of every class: floats (V), by which each class's part of the loss, Σ_k c_k·q_k·(lse − z_k), is
    /// multiplied, as in PyTorch. With class weights [`Reduction::Mean`] divides by what the rows' classes weigh. A
    /// constant of the loss: no gradient flows into it. Statistics do not know class weights.
    pub fn class_weights(mut self, weights: &Tensor) -> Self {
        self.class_weights = Some(weights.clone());
        self
    }

    /// What ε is spread by, instead of evenly: floats u_k ≥ 0 (V), for instance the classes' frequencies. They need not sum
    /// to 1: a row's smoothing is ε·u_k/Σu over its classes that are not masked (nothing where all of these have 0). A
    /// constant of the loss: no gradient flows into it.
    ///
    /// Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output Distributions", arXiv 1701.06548,
    /// smooth so, by the classes' frequencies.
    pub fn smoothing_prior(mut self, prior: &Tensor) -> Self {
        self.smoothing_prior = Some(prior.clone());
        self
    }

    /// Adds β·H to every row's loss, H = −Σ p log p the entropy of its prediction in nats: a penalty on uncertainty where β
    /// is positive (entropy minimisation, Wang et al., "Tent", arXiv 2006.10726), on confidence where it is negative (the
    /// entropy bonus of policy gradients). One f32 for all rows, or a tensor with a value a row (see [`RowValue`]); finite.
    pub fn entropy_weight(mut self, weight: impl Into<RowValue>) -> Self {
        self.entropy_weight = weight.into();
        self
    }

    /// Target value of rows that take no part: loss, gradient and statistics 0, not counted. Default −100, which u8 and u32
    /// targets cannot hold: there `u32::MAX.into()`, say.
    pub fn ignore_index(mut self, index: i64) -> Self {
        self.ignore_index = index;
        self
    }

    /// Adds λ·lse² to every row's loss (λ ≥ 0, finite), which keeps the normaliser near 1: the z-loss of PaLM,
    /// arXiv 2204.02311, section 5.
    pub fn z_loss(mut self, lambda: f32) -> Self {
        self.z_loss = lambda;
        self
    }

    /// Bounds logits by c·tanh(z / c), c > 0 and finite: the soft-capping of Gemma 2, arXiv 2408.00118, section 2.
    pub fn softcap(mut self, c: f32) -> Self {
        self.softcap = Some(c);
        self
    }

    /// Multiplies logits by s > 0 (finite), before the softcap: an inverse temperature.
    pub fn logit_scale(mut self, s: f32) -> Self {
        self.logit_scale = s;
        self
    }

    /// Number of classes where it is below the rows' length: the columns past it are padding, never read, and their
    /// gradient is 0.
    pub fn vocab_size(mut self, v: usize) -> Self {
        self.vocab_size = Some(v);
        self
    }

    /// How row losses become the result. Default [`Reduction::Mean`].
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// Lets `backward()` write the gradient over the logits: one tensor of the logits' size less at the peak. Only
    /// for logits that nothing else reads after the loss, neither the caller nor another operation's backward.
    /// Off by default; without effect where no gradient is asked for.
    pub fn inplace_backward(mut self, on: bool) -> Self {
        self.inplace_backward = on;
        self
    }

    /// On CUDA, reads the device's error flag after the launch and fails on bad values inside tensors as the CPU
    /// does. Costs a synchronisation. Off by default.
    pub fn check_inputs(mut self, on: bool) -> Self {
        self.check_inputs = on;
        self
    }

    /// Bytes of logits that [`forward_linear`](Self::forward_linear) may keep for its backward, which computes the others
    /// again: three matrix products in all where everything fits, four where nothing does. Default 256 MiB. Results do
    /// not depend on it, not even in their last bit.
    pub fn memory_budget(mut self, bytes: usize) -> Self {
        self.memory_budget = bytes;
        self
    }

    /// Bytes of logits that [`forward_linear`](Self::forward_linear) works on at a time, instead of its own choice: 8 MiB
    /// on the CPU, 112 MiB on CUDA, or more where the tiles would get narrower than 512. For experiments: sums are taken
    /// in another order.
    pub fn tile_bytes(mut self, bytes: usize) -> Self {
        self.tile_bytes = Some(bytes);
        self
    }

    /// On CUDA, lets [`forward_linear`](Self::forward_linear) leave rows that are ignored or have weight 0 out of its
    /// products, as it does on the CPU. Their number has to be known on the host: costs a synchronisation. Off by
    /// default; then hidden states of such rows that are not finite make the weight's gradient NaN, as whole logits would.
    pub fn compact_rows(mut self, on: bool) -> Self {
        self.compact_rows = on;
        self
    }

    /// This rank has the logits of classes `first_class` and on, of a `vocabulary` that the ranks of `comm` share out: as
    /// many as a row has columns (`vocab_size` leaves padding out). Slices may be uneven, and in any order. Logits, rows of
    /// the output projection, bias, and probabilities as targets (…, this rank's classes) are this rank's part. Everything
    /// else is the same on all ranks: hidden states, targets with class numbers of the whole vocabulary, smoothing, weights,
    /// class weights and a prior (`vocabulary`), options.
    ///
    /// Loss and statistics are those of the whole vocabulary, with the same bits on every rank; the gradient of the logits is
    /// this rank's part. A forward takes one all-gather of 48 bytes a row, on the CPU 72 with statistics; where something stands
    /// beside the logits or targets are distributions, of 112 bytes on CUDA, and on the CPU of 176 and 8 more for each class that
    /// [`Targets::TopK`](crate::Targets) names; and of 512 bytes, which on CUDA are exchanged apart, by tensors on the CPU. The
    /// backward of logits takes none, that of [`forward_linear`](Self::forward_linear) an all-reduce of the hidden states'
    /// gradient, if there is one; so ranks that run one must all run it.
    ///
    /// Slices that overlap or leave a gap, arguments that differ, and a rank's bad input are an error on every rank. What only
    /// the device knows, values of targets, smoothing, weights, classes, is compared there: rows of which ranks were given
    /// different ones are NaN, and with [`check_inputs`](Self::check_inputs) an error too. `loss_and_grad` reads the logits a
    /// second time, after the exchange. The idea is Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3), whose two or three collectives
    /// are one here.
    pub fn vocab_shard(
        mut self,
        comm: Arc<dyn Communicator>,
        first_class: usize,
        vocabulary: usize,
    ) -> Self {
        self.vocab_shard = Some(Shard {
            ranks: Ranks(comm),
            first_class,
            vocabulary,
        });
        self
    }

    /// Each rank of `comm` has rows of its own. [`Reduction::Mean`] then divides by the rows (their weights) of all ranks,
    /// however unequal: the ranks' losses and gradients add up to those of all rows at once. So gradients are to be
    /// **summed** over the ranks, not averaged. Without effect on other reductions, but every forward exchanges 512 bytes (twice
    /// where targets are probabilities, or on CUDA with [`check_inputs`](Self::check_inputs)), so that a rank's bad input is an
    /// error on every rank; on CUDA a mean all-reduces 4 bytes on the device.
    ///
    /// The mean of ranks' means, which this is not, weighs rows by how few their rank has.
    pub fn data_parallel(mut self, comm: Arc<dyn Communicator>) -> Self {
        self.data_parallel = Some(Ranks(comm));
        self
    }
}
