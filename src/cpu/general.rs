//! What a row may have beside its logits, values of the classes and a probability for each as its target, and what its
//! gradient subtracts for them.

use std::{borrow::Cow, ops::Range, sync::OnceLock};

use rayon::prelude::*;

use super::{
    probabilities::Probabilities,
    real::Real,
    row::{LANES, PIECE, total},
};
use crate::call::{ClassValues, PerClass};

/// All of a call, or of a tile of it.
pub(super) struct General<'a, R: Clone> {
    vectors: ClassVectors<'a, R>,
    probabilities: Option<(&'a Probabilities<'a>, Tile)>,
    /// For rows of the general kind alone.
    ones: OnceLock<Vec<R>>,
}

/// First row and first column.
type Tile = (usize, usize);

/// Values of the classes, `None` for 1.
struct ClassVectors<'a, R: Clone> {
    weights: Option<Cow<'a, [R]>>,
    prior: Option<Cow<'a, [R]>>,
    /// c·u where there are both.
    products: Option<Cow<'a, [R]>>,
    /// Of each piece, [`Beside::masses`].
    masses: Vec<[f64; 3]>,
}

/// What stands beside a piece.
#[derive(Clone, Copy)]
pub(super) struct Beside<'a, R> {
    /// c·u: what smoothing is multiplied by.
    pub shares: Option<&'a [R]>,
    pub weights: Option<&'a [R]>,
    pub prior: Option<&'a [R]>,
    pub target: Option<&'a [R]>,
    /// Σ c·u, Σ u, Σ u² over all of its classes, if they have values.
    pub masses: [f64; 3],
}

/// Runs `$body` for each of `$items` and what is subtracted there of [share, target], as [`Beside::subtrahend`] says. One
/// loop for whatever stands beside, so that each vectorises.
macro_rules! for_each_class {
    ($beside:expr, $factors:expr, $items:expr, $item:pat, $subtracted:ident => $body:expr) => {{
        let [share, target] = $factors;
        match ($beside.shares, $beside.target, $beside.weights) {
            (None, None, _) => {
                let $subtracted = share;
                for $item in $items {
                    $body
                }
            }
            (Some(v), None, _) => {
                for ($item, &v) in $items.zip(v) {
                    let $subtracted = share * v;
                    $body
                }
            }
            // Weights are among the shares.
            (None, Some(t), _) => {
                for ($item, &t) in $items.zip(t) {
                    let $subtracted = target.fma::<FUSED>(t, share);
                    $body
                }
            }
            (Some(v), Some(t), None) => {
                for (($item, &v), &t) in $items.zip(v).zip(t) {
                    let $subtracted = target.fma::<FUSED>(t, share * v);
                    $body
                }
            }
            (Some(v), Some(t), Some(c)) => {
                for ((($item, &v), &t), &c) in $items.zip(v).zip(t).zip(c) {
                    let $subtracted = (target * c).fma::<FUSED>(t, share * v);
                    $body
                }
            }
        }
    }};
}
pub(super) use for_each_class;

impl<R: Real> Beside<'_, R> {
    pub const NOTHING: Self = Self {
        shares: None,
        weights: None,
        prior: None,
        target: None,
        masses: [0.0; 3],
    };

    /// What a row's gradient subtracts from its multiples of probabilities, share·c·u + target·c·t, of class `k`, in f64.
    pub fn subtrahend(&self, k: usize, share: f64, target: f64) -> f64 {
        let at = |values: Option<&[R]>| values.map_or(1.0, |values| values[k].f64());
        let t = self.target.map_or(0.0, |target| target[k].f64());
        share * at(self.shares) + target * at(self.weights) * t
    }
}

impl<'a, R: Real> General<'a, R> {
    /// Of the classes `columns`, and of probabilities from a row and a column of their tensor on.
    pub fn new(
        classes: &'a ClassValues,
        probabilities: Option<(&'a Probabilities<'a>, Tile)>,
        columns: &Range<usize>,
    ) -> Self {
        let ClassValues { weights, prior } = classes;
        let vector = |values: &'a PerClass| vector(values, columns);
        let (weights, prior) = (weights.as_ref().map(vector), prior.as_ref().map(vector));
        Self {
            vectors: ClassVectors {
                products: match (&weights, &prior) {
                    (Some(c), Some(u)) => {
                        let product = |(c, u): (&R, &R)| R::of(c.f64() * u.f64());
                        Some(c.iter().zip(&**u).map(product).collect())
                    }
                    _ => None,
                },
                masses: masses(weights.as_deref(), prior.as_deref()),
                weights,
                prior,
            },
            probabilities,
            ones: OnceLock::new(),
        }
    }

    /// What smoothing is multiplied by in a piece of `len` classes, c·u or 1.
    pub fn values<'b>(&'b self, beside: &Beside<'b, R>, len: usize) -> &'b [R] {
        let ones = || &self.ones.get_or_init(|| vec![R::ONE; PIECE])[..len];
        beside.shares.unwrap_or_else(ones)
    }

    /// Where the probabilities of a row from `column` on would be, which need not be there, and the bytes of one.
    pub fn target_at(&self, row: usize, column: usize) -> (*const u8, usize) {
        match &self.probabilities {
            Some((values, (first_row, first_class))) => {
                values.at(first_row + row, first_class + column)
            }
            None => (std::ptr::null(), 0),
        }
    }

    /// Of `columns` of a row. `buffer` is scratch memory.
    pub fn piece<'b>(
        &'b self,
        row: usize,
        columns: &Range<usize>,
        buffer: &'b mut [R; PIECE],
    ) -> Beside<'b, R> {
        let ClassVectors {
            weights,
            prior,
            products,
            ..
        } = &self.vectors;
        let (weights, prior) = (part(weights, columns), part(prior, columns));
        let target = match &self.probabilities {
            Some((values, (first_row, first_class))) => {
                let start = first_class + columns.start;
                let columns = start..start + columns.len();
                Some(values.stretch(first_row + row, columns, buffer))
            }
            None => None,
        };
        Beside {
            shares: part(products, columns).or(weights).or(prior),
            weights,
            prior,
            target,
            masses: match self.vectors.masses.get(columns.start / PIECE) {
                Some(masses) => *masses,
                None => [0.0; 3],
            },
        }
    }
}

/// The values of some of the classes as reals.
fn vector<'a, R: Real>(values: &'a PerClass, columns: &Range<usize>) -> Cow<'a, [R]> {
    let same = match values {
        PerClass::F32(values) => R::same_f32(&values[columns.clone()]),
        PerClass::F64(values) => R::same_f64(&values[columns.clone()]),
    };
    match same {
        Some(same) => same.into(),
        None => columns.clone().map(|k| R::of(values.get(k))).collect(),
    }
}

/// [`Beside::masses`] of each piece; none where there are no values.
fn masses<R: Real>(weights: Option<&[R]>, prior: Option<&[R]>) -> Vec<[f64; 3]> {
    let ones = [R::ONE; PIECE];
    let Some(values) = weights.or(prior) else {
        return Vec::new();
    };
    let of_piece = |piece: usize| {
        let start = piece * PIECE;
        let here = start..(start + PIECE).min(values.len());
        let ones = &ones[..here.len()];
        let c = weights.map_or(ones, |c| &c[here.clone()]);
        let u = prior.map_or(ones, |u| &u[here.clone()]);
        [dot(c, u), dot(ones, u), dot(u, u)]
    };
    let pieces = (0..values.len().div_ceil(PIECE)).into_par_iter();
    pieces.map(of_piece).collect()
}

/// In several chains, as one would wait for each addition.
fn dot<R: Real>(a: &[R], b: &[R]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            sums[l] += a[l].f64() * b[l].f64();
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a.f64() * b.f64());
    total(&sums) + rest.sum::<f64>()
}

fn part<'a, R: Clone>(values: &'a Option<Cow<[R]>>, columns: &Range<usize>) -> Option<&'a [R]> {
    match values {
        Some(values) => Some(&values[columns.clone()]),
        None => None,
    }
}
