//! Which kernel computes a row, and in which geometry: functions of the row's length and type and of the GPU. They see
//! neither the number of rows nor an address, so that a row's bits depend on neither.

use super::abi::{Element, Kernel};

/// What the choice depends on of a GPU. Bytes, unless it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub multiprocessors: usize,
    pub l2: usize,
    pub shared_per_multiprocessor: usize,
    /// Most that a block may have, if it asks.
    pub shared_per_block: usize,
    /// What the system takes of every block's.
    pub shared_reserved: usize,
    /// Blocks a cluster may have; 0 where the on-chip kernels are not compiled for this GPU or cannot run on it.
    pub max_cluster: usize,
    /// The same for blocks so large that each has a multiprocessor to itself.
    pub max_cluster_alone: usize,
    /// Bit n: clusters of n blocks, of [`UNEVEN`], keep the GPU as busy as those of a power of two do.
    pub uneven_clusters: u16,
}

impl Gpu {
    /// Most dynamic shared memory that a block of the on-chip and the fused kernels may have.
    pub fn most_dynamic_shared(&self) -> usize {
        self.shared_per_block.saturating_sub(STATIC_SHARED)
    }

    /// Dynamic shared memory with which so many of their blocks fit on a multiprocessor.
    pub fn dynamic_shared_for(&self, blocks: usize) -> usize {
        (self.shared_per_multiprocessor / blocks)
            .saturating_sub(STATIC_SHARED + self.shared_reserved)
    }
}

/// What tests choose for.
#[cfg(test)]
pub const H200: Gpu = Gpu {
    multiprocessors: 132,
    l2: 50 << 20,
    shared_per_multiprocessor: 228 << 10,
    shared_per_block: 227 << 10,
    shared_reserved: 1 << 10,
    max_cluster: 16,
    max_cluster_alone: 16,
    uneven_clusters: 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7,
};

/// A user's choice, for experiments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forced {
    General,
    /// With so many blocks a row, or as many as would be chosen.
    OnChip(Option<usize>),
}

impl Forced {
    /// From the value of [`OVERRIDE`]: `general`, `on-chip`, or `on-chip:4` for clusters of 4.
    pub fn parse(value: &str) -> Result<Self, String> {
        let cluster = |text: &str| match text.parse() {
            Ok(blocks @ (1..=8 | 16)) => Some(Self::OnChip(Some(blocks))),
            _ => None,
        };
        match value {
            "general" => Some(Self::General),
            "on-chip" => Some(Self::OnChip(None)),
            _ => value.strip_prefix("on-chip:").and_then(cluster),
        }
        .ok_or_else(|| {
            format!(
                "{OVERRIDE}: {value:?}, must be general, on-chip, or on-chip:N with N 1 to 8 or 16"
            )
        })
    }
}

/// Environment variable with a [`Forced`].
pub const OVERRIDE: &str = "CANDLE_CROSS_ENTROPY_KERNEL";

/// Shape of a launch over rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub threads: u32,
    /// Blocks that share a row, and 16-byte groups of the row that each has. General kernels: 1, and all.
    pub blocks_per_row: u32,
    pub groups_per_block: u32,
    pub dynamic_shared: u32,
}

/// Threads a block of the on-chip kernels.
pub const ON_CHIP_THREADS: u32 = 256;
/// Mbarriers and partial results before a slice in shared memory (`OnChip` in kernels/on_chip.cuh), and what the
/// on-chip and the fused kernels have besides, at most: the warps' partial results, and what one warp finds for all.
const ON_CHIP_HEADER: usize = 640;
const STATIC_SHARED: usize = 384;
/// The same of the fused kernel for any target distribution.
const DISTRIBUTION_STATIC_SHARED: usize = 1280;
/// So many blocks a multiprocessor overlap the loads, the arithmetic and the stores of different rows.
pub const BLOCKS_A_MULTIPROCESSOR: usize = 3;
/// Sizes of clusters that are no powers of two, for rows whose slices then still fit so often.
pub const UNEVEN: [usize; 4] = [3, 5, 6, 7];
/// Shorter rows are read again from the caches before anything evicts them, and a cluster would only add latency.
pub const SHORTEST_ON_CHIP: usize = 16 * 1024;
/// 16-byte groups of a chunk, and chunks of a slice, at most (kernels/on_chip.cuh), of which the first may be shorter.
const CHUNK_GROUPS: usize = 2048;
const MAX_CHUNKS: usize = 15;

/// Threads a block of the general kernels for a row of `width` elements of `element_size` bytes: a whole number of warps,
/// and no more than leave each the four 16-byte vectors that it takes at once.
fn threads_per_row(width: usize, element_size: usize) -> u32 {
    let vectors = (width * element_size).div_ceil(16);
    (vectors.div_ceil(8).next_power_of_two() as u32).clamp(32, 256)
}

/// For loss and statistics of rows of `width` elements, `vocab` of them classes. An error where the forced kernel cannot
/// run.
pub fn forward(
    (element, stats, softcap): (Element, bool, bool),
    (vocab, width): (usize, usize),
    gpu: &Gpu,
    forced: Option<Forced>,
) -> Result<(Kernel, Geometry), String> {
    Ok(match on_chip_if_chosen(element, vocab, gpu, forced)? {
        Some(geometry) => (
            Kernel::OnChipForward {
                element,
                stats,
                softcap,
            },
            geometry,
        ),
        None => (
            Kernel::Forward {
                element,
                stats,
                softcap,
            },
            once(element, width),
        ),
    })
}

/// For a tile of the logits with `width` classes of each row: it comes from the caches anyway.
pub fn forward_of_tile(
    (element, stats, softcap): (Element, bool, bool),
    width: usize,
) -> (Kernel, Geometry) {
    let kernel = Kernel::Forward {
        element,
        stats,
        softcap,
    };
    (kernel, once(element, width))
}

/// For the gradient given the forward's normalisers: no row needs to stay anywhere.
pub fn backward(element: Element, softcap: bool, width: usize) -> (Kernel, Geometry) {
    (Kernel::Backward { element, softcap }, once(element, width))
}

/// For loss and gradient, as [`forward`].
pub fn loss_and_gradient(
    (element, stats, softcap): (Element, bool, bool),
    (vocab, width): (usize, usize),
    gpu: &Gpu,
    forced: Option<Forced>,
) -> Result<(Kernel, Geometry), String> {
    Ok(match on_chip_if_chosen(element, vocab, gpu, forced)? {
        Some(geometry) => (
            Kernel::OnChipFused {
                element,
                stats,
                softcap,
            },
            geometry,
        ),
        None => (
            Kernel::Fused {
                element,
                stats,
                softcap,
            },
            twice(element, width, gpu, STATIC_SHARED),
        ),
    })
}

/// [`forward`], of all logits or of a tile, for any target distribution.
pub fn distribution_forward(element: Element, softcap: bool, width: usize) -> (Kernel, Geometry) {
    let kernel = Kernel::DistributionForward { element, softcap };
    (kernel, once(element, width))
}

/// As [`backward`].
pub fn distribution_backward(element: Element, softcap: bool, width: usize) -> (Kernel, Geometry) {
    let kernel = Kernel::DistributionBackward { element, softcap };
    (kernel, once(element, width))
}

/// As [`loss_and_gradient`].
pub fn distribution_loss_and_gradient(
    element: Element,
    softcap: bool,
    width: usize,
    gpu: &Gpu,
) -> (Kernel, Geometry) {
    let kernel = Kernel::DistributionFused { element, softcap };
    let geometry = twice(element, width, gpu, DISTRIBUTION_STATIC_SHARED);
    (kernel, geometry)
}

fn on_chip_if_chosen(
    element: Element,
    vocab: usize,
    gpu: &Gpu,
    forced: Option<Forced>,
) -> Result<Option<Geometry>, String> {
    match forced {
        Some(Forced::General) => Ok(None),
        Some(Forced::OnChip(blocks)) => match on_chip(element, vocab, gpu, blocks) {
            Some(geometry) => Ok(Some(geometry)),
            None => Err(format!(
                "{OVERRIDE}: a row of {vocab} {} does not fit on this GPU's chip so",
                element.name()
            )),
        },
        None if vocab * element.size() < SHORTEST_ON_CHIP => Ok(None),
        None => Ok(on_chip(element, vocab, gpu, None)),
    }
}

fn once(element: Element, width: usize) -> Geometry {
    Geometry {
        threads: threads_per_row(width, element.size()),
        blocks_per_row: 1,
        groups_per_block: (width * element.size()).div_ceil(16) as u32,
        dynamic_shared: 0,
    }
}

/// Dynamic shared memory of a block with so many groups. A slice may start inside a word, and then ends in one more.
pub fn on_chip_dynamic_shared(groups_per_block: usize) -> usize {
    ON_CHIP_HEADER + (groups_per_block + 1) * 16
}

/// The smallest cluster of which several blocks fit on a multiprocessor, or one more of a cluster up to a third larger, which
/// an H200 takes less time with (docs/performance.md); else the largest there may be, if it fits.
fn on_chip(element: Element, vocab: usize, gpu: &Gpu, blocks: Option<usize>) -> Option<Geometry> {
    let groups = (vocab * element.size()).div_ceil(16);
    // Whole cache lines: slices of an aligned row are aligned to them.
    let slice = |blocks: usize| groups.div_ceil(blocks).next_multiple_of(8);
    let block_size =
        |blocks: usize| on_chip_dynamic_shared(slice(blocks)) + STATIC_SHARED + gpu.shared_reserved;
    let fit_at_once = |blocks: usize| gpu.shared_per_multiprocessor / block_size(blocks);
    let allowed = |&blocks: &usize| {
        let largest = if fit_at_once(blocks) >= BLOCKS_A_MULTIPROCESSOR {
            gpu.max_cluster
        } else {
            gpu.max_cluster_alone
        };
        let even = !UNEVEN.contains(&blocks)
            || gpu.uneven_clusters >> blocks & 1 == 1
                && fit_at_once(blocks) >= BLOCKS_A_MULTIPROCESSOR;
        even && blocks <= largest
            && block_size(blocks) - gpu.shared_reserved <= gpu.shared_per_block
            && slice(blocks) <= CHUNK_GROUPS * (MAX_CHUNKS - 1)
    };
    let possible = (1..=8).chain([16]).filter(allowed);
    let smallest = |fit: usize| possible.clone().find(|&b| fit_at_once(b) >= fit);
    let blocks = match blocks {
        Some(blocks) => possible.clone().find(|&b| b == blocks)?,
        None => match smallest(BLOCKS_A_MULTIPROCESSOR) {
            Some(several) => smallest(BLOCKS_A_MULTIPROCESSOR + 1)
                .filter(|more| 3 * more <= 4 * several)
                .unwrap_or(several),
            None => possible.clone().next_back()?,
        },
    };
    Some(Geometry {
        threads: ON_CHIP_THREADS,
        blocks_per_row: blocks as u32,
        groups_per_block: slice(blocks) as u32,
        dynamic_shared: on_chip_dynamic_shared(slice(blocks)) as u32,
    })
}

/// For the general kernel that goes over a row twice: no more rows at work than half of the L2 holds, so that the
/// second read finds them there. Unused shared memory keeps further blocks away.
fn twice(element: Element, width: usize, gpu: &Gpu, static_shared: usize) -> Geometry {
    let rows = gpu.l2 / 2 / (width * element.size()).max(1);
    let dynamic_shared = match rows / gpu.multiprocessors.max(1) {
        // Where not even a row a multiprocessor fits, there is nothing to gain; where more fit than ever run at once,
        // nothing to keep away.
        0 | 8.. => 0,
        blocks => gpu
            .dynamic_shared_for(blocks)
            .min(gpu.most_dynamic_shared())
            .saturating_sub(static_shared - STATIC_SHARED),
    };
    Geometry {
        dynamic_shared: dynamic_shared as u32,
        ..once(element, width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A100: Gpu = Gpu {
        multiprocessors: 108,
        l2: 40 << 20,
        shared_per_multiprocessor: 164 << 10,
        shared_per_block: 163 << 10,
        shared_reserved: 1 << 10,
        max_cluster: 0,
        max_cluster_alone: 0,
        uneven_clusters: 0,
    };

    fn choose(element: Element, vocab: usize, gpu: &Gpu) -> (Kernel, Geometry) {
        loss_and_gradient((element, true, false), (vocab, vocab), gpu, None)
            .expect("nothing is forced")
    }

    /// Blocks a row; 0 for the general kernel.
    fn blocks(element: Element, vocab: usize, gpu: &Gpu) -> u32 {
        match choose(element, vocab, gpu) {
            (Kernel::OnChipFused { .. }, geometry) => geometry.blocks_per_row,
            _ => 0,
        }
    }

    #[test]
    fn table_for_an_h200() {
        let vocabularies = [
            1000, 8191, 8192, 32000, 50257, 128256, 151936, 202048, 262144,
        ];
        let table = |element| vocabularies.map(|vocab| blocks(element, vocab, &H200));
        assert_eq!(table(Element::BF16), [0, 0, 1, 1, 2, 5, 6, 8, 7]);
        assert_eq!(table(Element::F16), table(Element::BF16));
        assert_eq!(table(Element::F32), [0, 1, 1, 2, 4, 7, 16, 16, 16]);
        let powers = Gpu {
            uneven_clusters: 0,
            ..H200
        };
        let table = |element| vocabularies.map(|vocab| blocks(element, vocab, &powers));
        assert_eq!(table(Element::BF16), [0, 0, 1, 1, 2, 4, 8, 8, 8]);
        assert_eq!(table(Element::F32), [0, 1, 1, 2, 4, 8, 16, 16, 16]);
    }

    #[test]
    fn every_choice_fits() {
        for element in Element::ALL {
            for vocab in (1..20)
                .map(|i| 3 * i)
                .chain((12..23).flat_map(|i| [(1 << i) - 1, 1 << i, (1 << i) + 1]))
            {
                for max_cluster in [0, 1, 8, 16] {
                    let gpu = Gpu {
                        max_cluster,
                        max_cluster_alone: max_cluster,
                        ..H200
                    };
                    let (kernel, g) = choose(element, vocab, &gpu);
                    let row = (vocab * element.size()).div_ceil(16);
                    assert!(
                        (g.blocks_per_row * g.groups_per_block) as usize >= row,
                        "{vocab}"
                    );
                    assert!(
                        g.dynamic_shared as usize + STATIC_SHARED <= gpu.shared_per_block,
                        "{vocab}"
                    );
                    assert!(g.blocks_per_row as usize <= max_cluster.max(1), "{vocab}");
                    if kernel.is_on_chip() {
                        let image = ON_CHIP_HEADER + 16 * (g.groups_per_block as usize + 1);
                        assert!(image <= g.dynamic_shared as usize, "{vocab}");
                        assert!(
                            g.groups_per_block as usize <= CHUNK_GROUPS * (MAX_CHUNKS - 1),
                            "{vocab}"
                        );
                    }
                }
            }
        }
    }

    /// With 16 blocks not allowed, or not with a multiprocessor each, rows that are too long for 8 go the general way.
    #[test]
    fn rows_that_do_not_fit() {
        let gpu = Gpu {
            max_cluster_alone: 8,
            ..H200
        };
        assert_eq!(blocks(Element::F32, 262144, &gpu), 16);
        assert_eq!(blocks(Element::F32, 400_000, &gpu), 8);
        assert_eq!(blocks(Element::F32, 1 << 19, &gpu), 0);
        assert_eq!(blocks(Element::F32, 1 << 19, &H200), 16);
        assert_eq!(blocks(Element::F32, 1 << 20, &H200), 0);
        assert_eq!(blocks(Element::BF16, 50257, &A100), 0);
    }

    /// What is at work of the general kernel stays in half of the L2 where that is possible at all.
    #[test]
    fn rows_at_work_fit_in_the_l2() {
        let at_work = |element, vocab| {
            let (_, g) = choose(element, vocab, &A100);
            let block = g.dynamic_shared as usize + STATIC_SHARED + A100.shared_reserved;
            A100.shared_per_multiprocessor / block
        };
        assert_eq!(at_work(Element::BF16, 32000), 3);
        assert_eq!(at_work(Element::BF16, 50257), 1);
        // 108 such rows are more than the L2: nothing is kept away.
        assert_eq!(choose(Element::F32, 262144, &A100).1.dynamic_shared, 0);
        assert_eq!(choose(Element::BF16, 4096, &A100).1.dynamic_shared, 0);
    }

    /// So that the loss has the same bits with and without a gradient.
    #[test]
    fn forward_divides_rows_as_the_gradient_does() {
        for element in Element::ALL {
            for vocab in [1000, 32000, 50257, 262144] {
                let kind = (element, true, false);
                let (kernel, geometry) =
                    forward(kind, (vocab, vocab), &H200, None).expect("nothing is forced");
                assert_eq!((kernel.is_on_chip(), geometry), {
                    let (kernel, geometry) = choose(element, vocab, &H200);
                    let no_throttle = Geometry {
                        dynamic_shared: if kernel.is_on_chip() {
                            geometry.dynamic_shared
                        } else {
                            0
                        },
                        ..geometry
                    };
                    (kernel.is_on_chip(), no_throttle)
                });
            }
        }
    }

    #[test]
    fn forced() {
        let force = |value: &str, vocab| {
            let forced = Some(Forced::parse(value)?);
            loss_and_gradient((Element::BF16, true, false), (vocab, vocab), &H200, forced)
        };
        assert!(matches!(
            force("general", 50257),
            Ok((Kernel::Fused { .. }, _))
        ));
        assert_eq!(force("on-chip", 100).expect("fits").1.blocks_per_row, 1);
        assert_eq!(force("on-chip:8", 50257).expect("fits").1.blocks_per_row, 8);
        assert!(force("on-chip:1", 262144).is_err_and(|error| error.contains("262144")));
        for bad in ["", "fused", "on-chip:", "on-chip:9", "on-chip:32"] {
            assert!(
                force(bad, 100).is_err_and(|error| error.contains(OVERRIDE)),
                "{bad}"
            );
        }
    }
}
