//! What a row may have beside its logits: values of the classes, and a probability for each as its target. From these and
//! the exponents of a piece (`row`), the sums that loss and gradient need, and what the gradient subtracts.

use std::{borrow::Cow, ops::Range, sync::OnceLock};

use candle_core::{
    CpuStorage, Layout, Result, Storage, StorageRef, Tensor, backend::BackendStorage, bail,
};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{
    dispatch::{Task, dispatch},
    element::Element,
    memory::{Starts, readable},
    real::Real,
    row::{Extra, LANES, PIECE, Partial, total},
    transform::{Form, Transform},
};
use crate::call::{ClassValues, PerClass, bad_probability};

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
    masses: [f64; 3],
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

/// Rows of probabilities, of any float type.
pub(super) struct Probabilities<'a> {
    values: Floats<'a>,
    starts: Starts,
}

enum Floats<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Probabilities<'a> {
    pub fn new((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Self> {
        let values = match storage {
            CpuStorage::F32(values) => Floats::F32(values),
            CpuStorage::F64(values) => Floats::F64(values),
            CpuStorage::F16(values) => Floats::F16(values),
            CpuStorage::BF16(values) => Floats::BF16(values),
            other => bail!("targets: {:?}, must be a float type", other.dtype()),
        };
        Ok(Self {
            values,
            starts: readable(layout)?,
        })
    }

    /// The address of a column of a row, or beyond it, and the bytes of an element.
    fn at(&self, row: usize, column: usize) -> (*const u8, usize) {
        let (first, size) = match self.values {
            Floats::F32(values) => (values.as_ptr().cast(), 4),
            Floats::F64(values) => (values.as_ptr().cast(), 8),
            Floats::F16(values) => (values.as_ptr().cast(), 2),
            Floats::BF16(values) => (values.as_ptr().cast(), 2),
        };
        let at: *const u8 = first;
        (at.wrapping_add((self.starts.of(row) + column) * size), size)
    }

    /// `columns` of a row, in the buffer if they are not of type `R`.
    fn stretch<'b, R: Real>(
        &'b self,
        row: usize,
        columns: Range<usize>,
        buffer: &'b mut [R; PIECE],
    ) -> &'b [R] {
        let start = self.starts.of(row) + columns.start;
        let here = start..start + columns.len();
        let buffer = &mut buffer[..columns.len()];
        match self.values {
            Floats::F32(values) => {
                let values = &values[here];
                match R::same_f32(values) {
                    Some(values) => return values,
                    None => convert(values, buffer),
                }
            }
            Floats::F64(values) => {
                let values = &values[here];
                match R::same_f64(values) {
                    Some(values) => return values,
                    None => {
                        for (to, &from) in buffer.iter_mut().zip(values) {
                            *to = R::of(from);
                        }
                    }
                }
            }
            Floats::F16(values) => widen(&values[here], buffer),
            Floats::BF16(values) => widen(&values[here], buffer),
        }
        buffer
    }

    /// The error for the first bad one of a row's classes, which are those of the columns.
    pub fn error_in(&self, row: usize, classes: &Range<usize>) -> candle_core::Error {
        let mut value = [0.0f64; PIECE];
        for column in 0..classes.len() {
            let value = self.stretch(row, column..column + 1, &mut value)[0];
            // As f32, which it may be beyond.
            if !((value as f32).is_finite() && value >= 0.0) {
                return bad_probability(row, classes.start + column, value);
            }
        }
        candle_core::Error::Msg(format!(
            "targets: row {row} has probabilities whose sum is not finite, or a bad one for a class of another rank"
        ))
        .bt()
    }
}

fn convert<R: Real>(from: &[f32], to: &mut [R]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = R::of(f64::from(from));
    }
}

fn widen<T: Element<Real = f32>, R: Real>(from: &[T], to: &mut [R]) {
    let mut singles = [0.0f32; 64];
    for (from, to) in from.chunks(64).zip(to.chunks_mut(64)) {
        let singles = &mut singles[..from.len()];
        T::widen_in_order(from, singles);
        match R::same_f32(singles) {
            Some(values) => to.copy_from_slice(values),
            None => convert(singles, to),
        }
    }
}

/// The tensor of probabilities, locked for reading while the rows are at work.
pub(super) struct Locked<'a>(Option<(StorageRef<'a>, &'a Layout)>);

impl<'a> Locked<'a> {
    pub fn of(probabilities: Option<&'a Tensor>) -> Self {
        Self(probabilities.map(|values| values.storage_and_layout()))
    }

    pub fn rows(&self) -> Result<Option<Probabilities<'_>>> {
        let Some((storage, layout)) = &self.0 else {
            return Ok(None);
        };
        match &**storage {
            Storage::Cpu(storage) => Ok(Some(Probabilities::new((storage, layout))?)),
            _ => bail!("targets: on another device than the logits"),
        }
    }
}

/// Sums over the classes of a stretch of a row against what stands beside them, relative to the largest logit as in
/// [`Partial`]. Masked classes count in nothing but the target's masses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Dots {
    /// Of c·u.
    pub shares: Sum,
    /// Σ u, Σ u·exp d, Σ u².
    pub prior: [f64; 3],
    /// Of the target's probabilities t, and of c·t.
    pub target: Sum,
    pub weighted_target: Sum,
    /// Σ t·exp d, Σ t², Σ t·u.
    pub target_products: [f64; 3],
    /// Whether a masked class has a probability above 0.
    pub out_of_reach: bool,
    /// Whether a probability is negative or not finite.
    pub bad: bool,
}

/// Σ a and Σ a·d.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub mass: f64,
    pub linear: f64,
}

impl Sum {
    fn relative(self, by: f64) -> Self {
        let shift = if self.mass == 0.0 {
            0.0
        } else {
            by * self.mass
        };
        Self {
            linear: self.linear + shift,
            ..self
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            mass: self.mass + other.mass,
            linear: self.linear + other.linear,
        }
    }
}

impl Dots {
    /// The same sums of a stretch with the partial result `of`, relative to the largest logit of `all`, of which it is a part.
    pub fn related<const FORM: Form>(
        self,
        of: &Partial,
        all: &Partial,
        transform: &Transform<f64>,
    ) -> Self {
        if of.classes == 0 {
            return self;
        }
        let reference = transform.relative_to::<FORM, true>(all.largest);
        let (by, _) = transform.difference::<FORM, true>(of.largest, &reference);
        self.relative(by)
    }

    /// The same sums relative to a logit beyond theirs, by which exponents change.
    fn relative(self, by: f64) -> Self {
        if by == 0.0 {
            return self;
        }
        let factor = by.exp();
        let ([u, u_exp, u_squares], [t_exp, t_squares, t_u]) = (self.prior, self.target_products);
        Self {
            shares: self.shares.relative(by),
            prior: [u, u_exp * factor, u_squares],
            target: self.target.relative(by),
            weighted_target: self.weighted_target.relative(by),
            target_products: [t_exp * factor, t_squares, t_u],
            ..self
        }
    }

    pub fn plus(self, other: Self) -> Self {
        let add = |a: [f64; 3], b: [f64; 3]| [a[0] + b[0], a[1] + b[1], a[2] + b[2]];
        Self {
            shares: self.shares.plus(other.shares),
            prior: add(self.prior, other.prior),
            target: self.target.plus(other.target),
            weighted_target: self.weighted_target.plus(other.weighted_target),
            target_products: add(self.target_products, other.target_products),
            out_of_reach: self.out_of_reach || other.out_of_reach,
            bad: self.bad || other.bad,
        }
    }

    /// The masses of the target's probabilities of masked classes.
    fn add_masked_target<R: Real>(&mut self, beside: &Beside<R>, x: &[R]) {
        for (k, _) in x.iter().enumerate().filter(|(_, x)| **x == R::NEG_INFINITY) {
            let at = |values: Option<&[R]>| values.map_or(1.0, |values| values[k].f64());
            let t = at(beside.target);
            self.out_of_reach |= t != 0.0;
            self.target.mass += t;
            self.weighted_target.mass += at(beside.weights) * t;
        }
    }

    pub fn is_finite(&self) -> bool {
        let sums = [self.shares, self.target, self.weighted_target];
        sums.iter().all(|sum| sum.linear.is_finite())
    }
}

/// The logits x of a piece; their exponents d, 0 for masked classes and for a target that is left out; their exponentials e,
/// −0 for these.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a, R> {
    pub x: &'a [R],
    pub d: &'a [R],
    pub e: &'a [R],
    /// Whether any of its classes is masked or left out.
    pub masked: bool,
}

/// The sums of a piece of a row whose target names classes; `extra` is what came with the partial result.
pub(super) fn dots_of_values<R: Real>(beside: &Beside<R>, extra: &Extra<R>) -> Dots {
    let [mass, prior_mass, prior_squares] = extra.visible.unwrap_or(beside.masses);
    Dots {
        shares: Sum {
            mass,
            linear: extra.linear,
        },
        prior: [prior_mass, extra.with_exp, prior_squares],
        ..Dots::default()
    }
}

/// The sums of a piece of a row of which no class is left out. `buffer` is scratch memory.
pub(super) fn dots<R: Real>(beside: &Beside<R>, piece: Piece<R>, buffer: &mut [R; PIECE]) -> Dots {
    let mut dots = Dots::default();
    dispatch(Add {
        beside,
        piece,
        buffer,
        dots: &mut dots,
    });
    dots
}

/// [`dots`] as work for the instruction set, apart from what depends on the logits' type.
struct Add<'a, R> {
    beside: &'a Beside<'a, R>,
    piece: Piece<'a, R>,
    buffer: &'a mut [R; PIECE],
    dots: &'a mut Dots,
}

impl<R: Real> Task for Add<'_, R> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
        let Self {
            beside,
            piece,
            buffer,
            dots,
        } = self;
        if piece.masked {
            add::<R, true, FUSED>(beside, piece, buffer, dots);
        } else {
            add::<R, false, FUSED>(beside, piece, buffer, dots);
        }
    }
}

/// `MASKED` says that there are masked classes, or one that is left out.
#[inline(always)]
fn add<R: Real, const MASKED: bool, const FUSED: bool>(
    beside: &Beside<R>,
    piece: Piece<R>,
    buffer: &mut [R; PIECE],
    dots: &mut Dots,
) {
    if let Some(prior) = beside.prior {
        let all = all_sums::<R, MASKED, FUSED>(prior, piece);
        dots.prior = [all.sum.mass, all.with_exp, all.squares];
        dots.shares = all.sum;
    }
    if let (Some(shares), Some(_)) = (beside.shares, beside.weights) {
        dots.shares = weigh::<R, MASKED, FUSED>(shares, piece);
    }
    if let Some(target) = beside.target {
        let all = all_sums::<R, MASKED, FUSED>(target, piece);
        let t_u = match beside.prior {
            Some(prior) => add_product::<R, MASKED, FUSED>(target, prior, piece.x),
            None => all.sum.mass,
        };
        dots.target = all.sum;
        dots.target_products = [all.with_exp, all.squares, t_u];
        dots.weighted_target = all.sum;
        if let Some(weights) = beside.weights {
            let weighted = &mut buffer[..target.len()];
            for ((to, &t), &c) in weighted.iter_mut().zip(target).zip(weights) {
                *to = t * c;
            }
            dots.weighted_target = weigh::<R, MASKED, FUSED>(weighted, piece);
        }
        if MASKED {
            dots.add_masked_target(beside, piece.x);
        }
        dots.bad = all.least < R::ZERO || !dots.target.mass.is_finite();
    }
}

/// Takes the sums of products with d in f64: exponents may be beyond the type.
#[cold]
pub(super) fn resum<R: Real, const FORM: Form>(
    dots: &mut Dots,
    beside: &Beside<R>,
    x: &[R],
    transform: &Transform<f64>,
    largest: f64,
) {
    let reference = transform.relative_to::<FORM, true>(largest);
    let [mut shares, mut target, mut weighted] = [0.0; 3];
    for (k, &x) in x.iter().enumerate() {
        if x == R::NEG_INFINITY {
            continue;
        }
        let (d, _) = transform.difference::<FORM, true>(x.f64(), &reference);
        let at = |values: Option<&[R]>| values.map_or(1.0, |values| values[k].f64());
        let add = |sum: &mut f64, a: f64| *sum += if a == 0.0 { 0.0 } else { a * d };
        add(&mut shares, at(beside.shares));
        add(&mut target, at(beside.target));
        add(&mut weighted, at(beside.target) * at(beside.weights));
    }
    dots.shares.linear = shares;
    dots.target.linear = target;
    dots.weighted_target.linear = weighted;
}

/// Σ a and Σ a·d, over the classes that are not masked.
#[inline(always)]
fn weigh<R: Real, const MASKED: bool, const FUSED: bool>(a: &[R], piece: Piece<R>) -> Sum {
    let zero = R::ZERO;
    let (mut mass, mut linear) = ([zero; LANES], [zero; LANES]);
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (x, x_rest) = piece.x.as_chunks::<LANES>();
    let (d, d_rest) = piece.d.as_chunks::<LANES>();
    for ((a, x), d) in a.iter().zip(x).zip(d) {
        for l in 0..LANES {
            let masked = MASKED && x[l] == R::NEG_INFINITY;
            mass[l] = mass[l] + if masked { zero } else { a[l] };
            linear[l] = a[l].fma::<FUSED>(d[l], linear[l]);
        }
    }
    let (mut mass, mut linear) = (total(&mass), total(&linear));
    for ((&a, &x), &d) in a_rest.iter().zip(x_rest).zip(d_rest) {
        mass += if x == R::NEG_INFINITY { 0.0 } else { a.f64() };
        linear += (a * d).f64();
    }
    Sum { mass, linear }
}

/// Sums over the classes that are not masked.
struct AllSums<R> {
    sum: Sum,
    /// Σ a·e, Σ a².
    with_exp: f64,
    squares: f64,
    /// The least a of all classes, if it is below 0.
    least: R,
}

#[inline(always)]
fn all_sums<R: Real, const MASKED: bool, const FUSED: bool>(
    a: &[R],
    piece: Piece<R>,
) -> AllSums<R> {
    let zero = R::ZERO;
    let (mut mass, mut linear, mut least) = ([zero; LANES], [zero; LANES], [zero; LANES]);
    let (mut with_exp, mut squares) = ([zero; LANES], [zero; LANES]);
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (x, x_rest) = piece.x.as_chunks::<LANES>();
    let (d, d_rest) = piece.d.as_chunks::<LANES>();
    let (e, e_rest) = piece.e.as_chunks::<LANES>();
    for (((a, x), d), e) in a.iter().zip(x).zip(d).zip(e) {
        for l in 0..LANES {
            let masked = MASKED && x[l] == R::NEG_INFINITY;
            let counted = if masked { zero } else { a[l] };
            mass[l] = mass[l] + counted;
            linear[l] = counted.fma::<FUSED>(d[l], linear[l]);
            with_exp[l] = counted.fma::<FUSED>(e[l], with_exp[l]);
            squares[l] = counted.fma::<FUSED>(counted, squares[l]);
            least[l] = if a[l] < least[l] { a[l] } else { least[l] };
        }
    }
    let mut sum = Sum {
        mass: total(&mass),
        linear: total(&linear),
    };
    let (mut with_exp, mut squares) = (total(&with_exp), total(&squares));
    let mut smallest = zero;
    for a in least {
        smallest = if a < smallest { a } else { smallest };
    }
    for (((&a, &x), &d), &e) in a_rest.iter().zip(x_rest).zip(d_rest).zip(e_rest) {
        smallest = if a < smallest { a } else { smallest };
        let counted = if x == R::NEG_INFINITY { zero } else { a };
        sum.mass += counted.f64();
        sum.linear += (counted * d).f64();
        with_exp += (counted * e).f64();
        squares += (counted * counted).f64();
    }
    AllSums {
        sum,
        with_exp,
        squares,
        least: smallest,
    }
}

/// Σ a·b over the classes that are not masked.
#[inline(always)]
fn add_product<R: Real, const MASKED: bool, const FUSED: bool>(a: &[R], b: &[R], x: &[R]) -> f64 {
    let zero = R::ZERO;
    let mut sum = [zero; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b[..x.len()].as_chunks::<LANES>();
    let (x, x_rest) = x.as_chunks::<LANES>();
    for ((a, b), x) in a.iter().zip(b).zip(x) {
        for l in 0..LANES {
            let masked = MASKED && x[l] == R::NEG_INFINITY;
            let counted = if masked { zero } else { a[l] };
            sum[l] = counted.fma::<FUSED>(b[l], sum[l]);
        }
    }
    let mut sum = total(&sum);
    for ((&a, &b), &x) in a_rest.iter().zip(b_rest).zip(x_rest) {
        sum += if x == R::NEG_INFINITY {
            0.0
        } else {
            (a * b).f64()
        };
    }
    sum
}
