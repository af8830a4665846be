//! The sums of a row of the general kind: its exponents and exponentials (`row`) against what stands beside its logits
//! (`general`).

use super::{
    dispatch::{Task, dispatch},
    general::Beside,
    real::Real,
    row::{Extra, LANES, PIECE, Partial, total},
    transform::{Form, Transform},
};

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
