//! What the kernels in `kernels/` are given: the Rust twin of `kernels/params.cuh`, field for field.

use bytemuck::{Pod, Zeroable};

/// Leading dimensions a view may keep, after merging, before its rows are copied to be contiguous.
pub const MAX_ROW_DIMS: usize = 4;

/// Element offset of row i of a view (…, V): mixed-radix digits of i times strides, innermost first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct RowOffsets {
    /// Dimensions in use, at least 1; `sizes[dims − 1]` is not read.
    pub dims: u64,
    pub sizes: [u64; MAX_ROW_DIMS],
    /// In elements.
    pub strides: [u64; MAX_ROW_DIMS],
}

/// The row's normaliser, written by the forward kernel and read by the backward kernel.
///
/// `lse` = z of the largest logit + `log2_sum`·ln 2, kept in two parts so that a large offset of the row costs no precision.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct RowState {
    /// The row's largest logit (0 where all are masked, NaN in a row that is NaN).
    pub largest: f32,
    /// log2 Σ exp2 d, of the exponents d that kernels/partial.cuh forms.
    pub log2_sum: f32,
    /// 1 / Σ exp2 d.
    pub inverse_sum: f32,
    /// K: classes that are not masked.
    pub classes: u32,
}

/// [`RowState`] of a row with any target distribution: the bytes of the struct in kernels/distribution.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct DistributionState(pub [u32; 16]);

/// A row between the tiles of `forward_linear`, of which the forward kernel sees one at a time, or of the slices that ranks have:
/// the bytes of `Running` in kernels/partial.cuh. The first tile writes it without reading it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Running(pub [u32; 12]);

/// [`Running`] of a row with any target distribution: the bytes of `AllClasses` in kernels/distribution.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct DistributionRunning(pub [u32; 28]);

/// A logit's gradient that is written once the others of its row are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct NamedGradient {
    pub gradient: f32,
    /// Negative: there is none.
    pub column: i32,
}

/// What the kernel found that reads the classes' values.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct ClassCheck {
    /// 1, or NaN where a value is bad.
    pub good: f32,
    /// What brings the largest value of the prior to 1.
    pub prior_scale: f32,
    /// Of all values, where there are ranks.
    pub digest: u32,
}

/// Argument of every kernel. Pointers are device addresses; 0 where the description says "or null".
///
/// All pointers come first: the emulation relocates the words before [`Params::logits_rows`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Params {
    /// (…, width) of the kernel's element type.
    pub logits: u64,
    /// (…, width) of the same type; may be `logits`.
    pub grad: u64,
    /// (rows, `entries`) u32 or i64: classes that a row's target names.
    pub targets: u64,
    /// f32, at `smoothing_rows`, or null: `uniform_smoothing`.
    pub smoothing: u64,
    /// f32, at `weight_rows`, or null: 1.
    pub weights: u64,
    /// Backward: f32 gradient of the result, (rows) or a scalar, or null: 1.
    pub upstream: u64,
    /// Scalar f32 that gradients are divided by (0 counts as 1), or null: 1. Reduction: in place of the total weight, which is
    /// then not written, or null.
    pub divisor: u64,
    /// (rows) f32: the weighted loss of each row.
    pub loss: u64,
    /// (rows) of [`RowState`], or of [`DistributionState`]; null when the forward need not keep it.
    pub state: u64,
    /// Statistics, (rows) each; used by kernels compiled with statistics.
    pub nll: u64,
    pub lse: u64,
    pub entropy: u64,
    pub max_prob: u64,
    pub grad_norm_sq: u64,
    /// u32.
    pub predicted: u64,
    /// Reduction: scalar f32 result, or null when only the weights are to be summed.
    pub reduced: u64,
    /// Reduction: scalar f32 Σ w over rows that are not ignored.
    pub total_weight: u64,
    /// u64, preset to all ones: the smallest `row + 1` of rows with a bad value, or 0 where a class has one. Or null.
    pub first_error: u64,
    /// Forward of a slice of the vocabulary: (rows) of [`Running`] or [`DistributionRunning`]. Null where `logits` has whole
    /// rows, which it has never where there are ranks.
    pub running: u64,
    /// From here on read by the kernels of target distributions, and some by the reduction.
    ///
    /// f32, at `entropy_rows`, or null: `uniform_entropy_weight`.
    pub entropy_weights: u64,
    /// (`vocab`) f32, or null: 1.
    pub class_weights: u64,
    /// (`vocab`) f32, or null: an even one.
    pub prior: u64,
    /// [`ClassCheck`], or null where classes have no values.
    pub class_check: u64,
    /// (rows, `entries`) f32, or null: 1. Without entries (…, at least `vocab`) of `probability_type`, at `probability_rows`.
    pub probabilities: u64,
    /// Gradient: (rows, `entries`) of [`NamedGradient`].
    pub named: u64,
    /// Merge of the ranks' slices: (`ranks`, rows) of [`Running`] or [`DistributionRunning`].
    pub gathered: u64,

    pub logits_rows: RowOffsets,
    pub grad_rows: RowOffsets,
    /// Where a row's smoothing and its weight are: one value may serve several rows.
    pub smoothing_rows: RowOffsets,
    pub weight_rows: RowOffsets,
    pub entropy_rows: RowOffsets,
    pub probability_rows: RowOffsets,
    pub rows: u64,
    pub ignore_index: i64,
    /// Classes; columns from here on are padding.
    pub vocab: u32,
    /// Length of a row of `logits` and `grad`.
    pub width: u32,
    /// 1 for i64 targets, 0 for u32.
    pub targets_are_i64: u32,
    /// 1 when `upstream` has one value a row.
    pub upstream_per_row: u32,
    /// Reduction: 1 divides the sum by the total weight.
    pub mean: u32,
    pub uniform_smoothing: f32,
    pub z_loss: f32,
    pub logit_scale: f32,
    /// Read by kernels compiled with a softcap only.
    pub softcap: f32,
    /// [`inner_factors`] of scale and softcap, for the same kernels.
    pub inner: [f32; 2],
    /// Constant factor of all gradients; of the reduced loss too.
    pub result_scale: f32,
    /// On chip: blocks that share a row, and 16-byte groups of the row that each of them has.
    pub blocks_per_row: u32,
    pub groups_per_block: u32,
    /// Of a tile of the logits: its first row, which is the first in `logits` and `grad` but has this number in all
    /// other arrays, and the class of its first column. The general kernels know them; 0 for all logits.
    pub first_row: u32,
    pub first_column: u32,
    /// Classes that a row's target names; 0 where it has a probability for each class.
    pub entries: u32,
    /// [`Element::number`]
    pub probability_type: u32,
    pub uniform_entropy_weight: f32,
    /// The classes of this rank, of the vocabulary, on whose logits the general kernels work: 0 and `vocab` for all.
    pub first_class: u32,
    pub end_class: u32,
    /// How many ranks have a slice of the vocabulary each; 0 where this one has all.
    pub ranks: u32,
}

/// 2·scale / cap, what tanh's argument is twice the logit's multiple by, as two factors that are in range whatever the two
/// are. Where the product is, the second is 1 and rounds nothing.
pub fn inner_factors(scale: f32, cap: f32) -> [f32; 2] {
    let inner = 2.0 * f64::from(scale) / f64::from(cap);
    let first = match (1e-30..1e30).contains(&inner) {
        true => inner,
        false => inner.sqrt().clamp(1e-38, 1e38),
    } as f32;
    [first, (inner / f64::from(first)).min(1e38) as f32]
}

/// Threads of the single block that reduces row losses, and of the one that checks the classes' values.
pub const REDUCE_THREADS: u32 = 1024;

/// Threads of a block that merges what ranks have of a row.
pub const MERGE_THREADS: u32 = 32;

/// Element type of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    F16,
    BF16,
}

impl Element {
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    /// Of a type of probabilities, as kernels know it.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 2,
        }
    }

    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Loss of every row; one block a row.
    Forward {
        element: Element,
        stats: bool,
        softcap: bool,
    },
    /// Gradient of every row from its [`RowState`]; one block a row.
    Backward {
        element: Element,
        softcap: bool,
    },
    /// Loss and gradient of every row; one block a row.
    Fused {
        element: Element,
        stats: bool,
        softcap: bool,
    },
    /// The same two, a cluster of blocks a row, which stays on chip. They need sm_90.
    OnChipForward {
        element: Element,
        stats: bool,
        softcap: bool,
    },
    OnChipFused {
        element: Element,
        stats: bool,
        softcap: bool,
    },
    /// The first three for rows with any target distribution.
    DistributionForward {
        element: Element,
        softcap: bool,
    },
    DistributionBackward {
        element: Element,
        softcap: bool,
    },
    DistributionFused {
        element: Element,
        softcap: bool,
    },
    /// What a [`Forward`](Self::Forward) of each rank's slice left, gathered, to loss and statistics of every row; one warp a row.
    Merge {
        stats: bool,
        softcap: bool,
    },
    /// The same for rows with any target distribution.
    DistributionMerge {
        softcap: bool,
    },
    /// Looks at the classes' values, [`ClassCheck`]; one block.
    Classes,
    /// Row losses to a scalar, or total weight; one block.
    Reduce,
}

impl Kernel {
    /// Symbol in the compiled module.
    pub fn symbol(self) -> String {
        let variant = |stats: bool, softcap: bool| {
            let stats = if stats { "_stats" } else { "" };
            let softcap = if softcap { "_softcap" } else { "" };
            format!("{stats}{softcap}")
        };
        let name = |work: &str, element: Element, stats: bool, softcap: bool| {
            format!("ce_{work}_{}{}", element.name(), variant(stats, softcap))
        };
        match self {
            Self::Forward {
                element,
                stats,
                softcap,
            } => name("forward", element, stats, softcap),
            Self::Backward { element, softcap } => name("backward", element, false, softcap),
            Self::Fused {
                element,
                stats,
                softcap,
            } => name("fused", element, stats, softcap),
            Self::OnChipForward {
                element,
                stats,
                softcap,
            } => name("onchip_forward", element, stats, softcap),
            Self::OnChipFused {
                element,
                stats,
                softcap,
            } => name("onchip_fused", element, stats, softcap),
            Self::DistributionForward { element, softcap } => {
                name("distribution_forward", element, false, softcap)
            }
            Self::DistributionBackward { element, softcap } => {
                name("distribution_backward", element, false, softcap)
            }
            Self::DistributionFused { element, softcap } => {
                name("distribution_fused", element, false, softcap)
            }
            Self::Merge { stats, softcap } => format!("ce_merge{}", variant(stats, softcap)),
            Self::DistributionMerge { softcap } => {
                format!("ce_distribution_merge{}", variant(false, softcap))
            }
            Self::Classes => "ce_classes".into(),
            Self::Reduce => "ce_reduce".into(),
        }
    }

    pub fn is_on_chip(self) -> bool {
        matches!(self, Self::OnChipForward { .. } | Self::OnChipFused { .. })
    }

    /// Every kernel there is.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Classes, Self::Reduce];
        for softcap in [false, true] {
            all.push(Self::DistributionMerge { softcap });
            all.extend([false, true].map(|stats| Self::Merge { stats, softcap }));
        }
        for element in Element::ALL {
            for softcap in [false, true] {
                all.push(Self::Backward { element, softcap });
                all.push(Self::DistributionForward { element, softcap });
                all.push(Self::DistributionBackward { element, softcap });
                all.push(Self::DistributionFused { element, softcap });
                for stats in [false, true] {
                    all.push(Self::Forward {
                        element,
                        stats,
                        softcap,
                    });
                    all.push(Self::Fused {
                        element,
                        stats,
                        softcap,
                    });
                    all.push(Self::OnChipForward {
                        element,
                        stats,
                        softcap,
                    });
                    all.push(Self::OnChipFused {
                        element,
                        stats,
                        softcap,
                    });
                }
            }
        }
        all
    }
}
