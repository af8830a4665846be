//! How `forward_linear` cuts its logits into tiles that fit in memory: slices of the vocabulary, or blocks of rows
//! where there are more rows than classes.
//!
//! Along the side that is cut, gradients of a tile are complete in one product. Along the other they are accumulated
//! over all tiles, so that is the smaller one: 4·min(N, V)·D bytes of f32.

use std::ops::Range;

/// All rows and some classes, or some rows and all classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    pub rows: Range<usize>,
    pub classes: Range<usize>,
}

impl Tile {
    pub fn len(&self) -> usize {
        self.rows.len() * self.classes.len()
    }

    /// Elements from a row to the next where rows start at multiples of `step`.
    pub fn pitch(&self, step: usize) -> usize {
        self.classes.len().next_multiple_of(step)
    }
}

/// What the backends do, in which order.
pub(crate) struct Plan {
    pub tiles: Tiles,
    /// Tiles, from the first on, whose logits the forward keeps for the backward.
    pub keep: usize,
}

/// The tiles of N rows of V classes. Nothing here depends on the memory budget, so that no result does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    rows: usize,
    classes: usize,
    pub by_rows: bool,
    /// Classes of a slice, or rows of a block; the last tile may have fewer.
    extent: usize,
}

/// Tiles are cut at multiples of this, and have at least twice as much, so that their products run near full speed.
const STEP: usize = 256;

impl Tiles {
    /// `logit_size` is the size of a logit in a tile and `bytes` what a tile should take. `exact` drops the minimum that
    /// keeps products fast.
    pub fn new(
        (rows, classes): (usize, usize),
        logit_size: usize,
        bytes: usize,
        exact: bool,
    ) -> Self {
        let by_rows = rows > classes;
        let (cut, other) = if by_rows {
            (rows, classes)
        } else {
            (classes, rows)
        };
        let most = bytes / (other.max(1) * logit_size);
        let (most, step) = if exact {
            (most.max(1), 1)
        } else {
            (most.max(2 * STEP), STEP)
        };
        // As many tiles as that takes, all of about one size.
        let tiles = cut.div_ceil(most / step * step).max(1);
        Self {
            rows,
            classes,
            by_rows,
            extent: cut.div_ceil(tiles).next_multiple_of(step).max(1),
        }
    }

    pub fn iter(self) -> impl Iterator<Item = Tile> {
        let cut = match self.rows {
            0 => 0,
            rows if self.by_rows => rows,
            _ => self.classes,
        };
        (0..cut).step_by(self.extent).map(move |start| {
            let cut = start..(start + self.extent).min(cut);
            if self.by_rows {
                Tile {
                    rows: cut,
                    classes: 0..self.classes,
                }
            } else {
                Tile {
                    rows: 0..self.rows,
                    classes: cut,
                }
            }
        })
    }

    /// How many tiles, from the first on, may be kept in `budget` bytes; `bytes` is a tile's size.
    pub fn kept(self, budget: usize, bytes: impl Fn(&Tile) -> usize) -> usize {
        let mut left = budget;
        self.iter()
            .take_while(|tile| {
                let size = bytes(tile);
                let fits = size <= left;
                left = left.saturating_sub(size);
                fits
            })
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn shape(tiles: Tiles) -> (bool, usize, usize) {
        (tiles.by_rows, tiles.extent, tiles.iter().count())
    }

    #[test]
    fn the_longer_side_is_cut() {
        let tiles = |rows, classes| shape(Tiles::new((rows, classes), 2, 112 * MIB, false));
        assert_eq!(tiles(8192, 128256), (false, 7168, 18));
        assert_eq!(tiles(1 << 20, 32000), (true, 1792, 586));
        // Never so narrow that products are slow; one tile where all fits.
        assert_eq!(tiles(128256, 128256), (false, 512, 251));
        assert_eq!(tiles(100, 1000), (false, 1024, 1));
    }

    #[test]
    fn tiles_cover_everything_once() {
        for rows in [0, 1, 7, 300, 2000] {
            for classes in [1, 2, 33, 257, 1000] {
                for (bytes, exact) in [(0, true), (1000, true), (4 * 2000, true), (10_000, false)] {
                    let tiles = Tiles::new((rows, classes), 4, bytes, exact);
                    let mut seen = vec![0; rows * classes];
                    for tile in tiles.iter() {
                        for row in tile.rows {
                            for class in tile.classes.clone() {
                                seen[row * classes + class] += 1;
                            }
                        }
                    }
                    assert!(seen.iter().all(|&n| n == 1), "{rows}×{classes}");
                }
            }
        }
    }

    #[test]
    fn kept_tiles_fit_the_budget() {
        let tiles = Tiles::new((10, 100), 4, 10 * 30 * 4, true); // 25 classes each, by the evenness rule
        assert_eq!(shape(tiles), (false, 25, 4));
        for (budget, kept) in [(0, 0), (999, 0), (1000, 1), (3999, 3), (4000, 4), (9999, 4)] {
            let bytes = |tile: &Tile| 4 * tile.len();
            assert_eq!(tiles.kept(budget, bytes), kept, "{budget}");
        }
    }
}
