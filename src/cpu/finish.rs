//! Loss, statistics and normaliser of a row, once its pieces are merged.

use super::{
    dispatch::{Task, dispatch},
    dots::{Dots, Sum},
    real::Real,
    row::{LANES, Partial},
    transform::{Form, Transform},
};
use crate::call::{Call, ClassValues, Row, RowTarget};

/// What the gradient of a row needs besides its logits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Normaliser {
    /// The largest logit, 0 where all are masked.
    pub(super) largest: f64,
    /// log Σ exp(z − z'), over all classes, z' that of the largest.
    pub(super) log_sum: f64,
    /// z' + log_sum.
    pub(super) lse: f64,
    /// Whether a class was left out of the sums, and its p and p − 1: each keeps its digits.
    pub(super) has_left_out: bool,
    pub(super) target_p: f64,
    pub(super) target_p_minus_1: f64,
    /// p − 1 of a class with the largest logit.
    pub(super) largest_p_minus_1: f64,
    pub(super) classes: usize,
    /// C = Σ c·q.
    pub(super) mass: f64,
    /// Σ u over the classes that are not masked.
    pub(super) prior_mass: f64,
    /// Σ p·d.
    pub(super) mean: f64,
}

/// Loss and statistics of a row; all zero for an ignored one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowResult {
    pub loss: f64,
    pub nll: f64,
    pub lse: f64,
    pub entropy: f64,
    pub max_prob: f64,
    pub grad_norm_sq: f64,
    pub predicted: u32,
    /// Whether a probability of its target is negative or not finite.
    pub bad: bool,
}

/// What a class's value of the prior is multiplied by; a prior of masked classes alone spreads nothing.
pub(super) fn smoothed_part(smoothing: f64, prior_mass: f64) -> f64 {
    if prior_mass == 0.0 {
        0.0
    } else {
        smoothing / prior_mass
    }
}

/// A class that a row's target names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named {
    pub class: usize,
    /// Its probability in the target.
    pub t: f64,
    pub logit: f64,
    /// Whether it was left out of the sums.
    pub left_out: bool,
    /// The logit's exponent d relative to the row's largest, −∞ for a masked class, and e^d: by [`set_exponents`].
    pub d: f64,
    pub e: f64,
}

impl Named {
    pub fn new(class: usize, t: f64, logit: f64, left_out: bool) -> Self {
        Self {
            class,
            t,
            logit,
            left_out,
            d: f64::NEG_INFINITY,
            e: 0.0,
        }
    }
}

/// Exponents and exponentials of classes in a row whose largest logit is `largest`: of several at a time, as one by one they take
/// longer than all else that is done with them.
pub(super) fn set_exponents<const FORM: Form>(
    named: &mut [Named],
    largest: f64,
    transform: &Transform<f64>,
) {
    dispatch(Exponents::<FORM> {
        named,
        largest,
        transform,
    });
}

struct Exponents<'a, const FORM: Form> {
    named: &'a mut [Named],
    largest: f64,
    transform: &'a Transform<f64>,
}

impl<const FORM: Form> Task for Exponents<'_, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
        // A copy, as what the loops write might be behind the reference.
        let transform = *self.transform;
        let reference = transform.relative_to::<FORM, FUSED>(self.largest);
        for named in self.named.chunks_mut(LANES) {
            let mut logits = [0.0; LANES];
            for (logit, named) in logits.iter_mut().zip(&*named) {
                *logit = named.logit;
            }
            let (mut exponents, mut exponentials) = ([0.0; LANES], [0.0; LANES]);
            for l in 0..LANES {
                let (d, _) = transform.difference::<FORM, FUSED>(logits[l], &reference);
                let masked = logits[l] == f64::NEG_INFINITY;
                exponents[l] = if masked { f64::NEG_INFINITY } else { d };
                exponentials[l] = Real::exp::<FUSED>(exponents[l]);
            }
            for (l, named) in named.iter_mut().enumerate() {
                (named.d, named.e) = (exponents[l], exponentials[l]);
            }
        }
    }
}

/// What is known of a row once its pieces are merged.
pub(super) struct Sums<'a> {
    pub others: &'a Partial,
    /// Of rows of the general kind.
    pub dots: &'a Dots,
    /// The classes that the target names, with their exponents.
    pub named: &'a [Named],
    /// The column of the largest.
    pub predicted: u32,
}

/// Loss, statistics and normaliser of a row. What classes that the target names contribute, on which the loss rests, is
/// computed in f64.
pub(super) fn finish<const FORM: Form>(
    call: &Call,
    values: &ClassValues,
    row: &Row,
    sums: &Sums,
    transform: &Transform<f64>,
) -> (RowResult, Normaliser) {
    let &Sums {
        others,
        dots,
        named,
        predicted,
    } = sums;
    let eps = row.smoothing;
    let weighted = |loss: f64| {
        if row.weight == 0.0 {
            0.0
        } else {
            row.weight * loss
        }
    };
    let left_out = named.iter().find(|named| named.left_out);
    let nothing = Named::new(0, 0.0, f64::NEG_INFINITY, false);
    let &Named {
        class: y,
        logit: x_y,
        d: d_y,
        e: e_y,
        ..
    } = left_out.unwrap_or(&nothing);
    let target_counts = x_y != f64::NEG_INFINITY;
    let classes = others.classes + usize::from(target_counts);
    let others_exp = others.all_exp();
    let sum = others_exp + e_y;
    if sum.is_nan() {
        let nan = f64::NAN;
        let normaliser = Normaliser {
            largest: nan,
            log_sum: nan,
            lse: nan,
            has_left_out: left_out.is_some(),
            target_p: nan,
            target_p_minus_1: nan,
            largest_p_minus_1: nan,
            classes,
            mass: nan,
            prior_mass: nan,
            mean: nan,
        };
        let result = RowResult {
            loss: weighted(nan),
            nll: nan,
            lse: nan,
            entropy: nan,
            max_prob: nan,
            grad_norm_sq: nan,
            predicted: 0,
            bad: dots.bad,
        };
        return (result, normaliser);
    }
    if classes == 0 {
        let inf = f64::INFINITY;
        return (
            RowResult {
                loss: weighted(inf),
                nll: inf,
                lse: -inf,
                bad: dots.bad,
                ..Default::default()
            },
            Normaliser::default(),
        );
    }

    // Where one class with the largest logit is not in the sum, that is 1 and a little: log1p keeps the little.
    let target_is_largest = target_counts && x_y == others.largest;
    let rest = if target_is_largest {
        Some(others_exp / e_y)
    } else {
        let more = others.largest_classes.checked_sub(1);
        more.map(|more| others.exp + more as f64 + e_y)
    };
    let log_sum = match rest {
        Some(rest) if target_is_largest => d_y + rest.ln_1p(),
        Some(rest) => rest.ln_1p(),
        None => sum.ln(),
    };
    let lse = transform.z::<FORM>(others.largest) + log_sum;
    let k = classes as f64;

    // Of all classes that are not masked, now with the one that was left out: Σ c·u, Σ c·u·d, Σ u.
    let left_out_term = |value: f64| if target_counts { value } else { 0.0 };
    let has_values = values.weights.is_some() || values.prior.is_some();
    let shares = match has_values {
        true => {
            let v = left_out_term(values.weight(y) * values.prior(y));
            Sum {
                mass: dots.shares.mass + v,
                linear: dots.shares.linear + if v == 0.0 { 0.0 } else { v * d_y },
            }
        }
        false => Sum {
            mass: k,
            linear: others.linear + if target_counts { d_y } else { 0.0 },
        },
    };
    let prior_mass = match values.prior {
        Some(_) => dots.prior[0] + left_out_term(values.prior(y)),
        None => k,
    };
    // Σ t, Σ c·t, and their sums with −log p.
    let is_probabilities = matches!(row.target, RowTarget::Probabilities);
    let (target_mass, weighted_mass, nll, weighted_nll, out_of_reach) = if is_probabilities {
        let surprisal = |sum: Sum| sum.mass * log_sum - sum.linear;
        let (target, weighted) = (dots.target, dots.weighted_target);
        (
            target.mass,
            weighted.mass,
            surprisal(target),
            surprisal(weighted),
            dots.out_of_reach,
        )
    } else {
        let mut sums = (0.0, 0.0, 0.0, 0.0, false);
        for named in named.iter().filter(|named| named.t > 0.0) {
            let (c, t) = (values.weight(named.class), named.t);
            let surprisal = log_sum - named.d;
            sums.0 += t;
            sums.1 += c * t;
            sums.2 += t * surprisal;
            sums.3 += if c == 0.0 { 0.0 } else { c * t * surprisal };
            sums.4 |= named.logit == f64::NEG_INFINITY;
        }
        sums
    };
    let smoothed_part = smoothed_part(eps, prior_mass);
    let mass = (1.0 - eps) * weighted_mass + smoothed_part * shares.mass;

    let mean = (others.weighted + if e_y == 0.0 { 0.0 } else { d_y * e_y }) / sum;
    let entropy = (log_sum - mean).max(0.0);
    let lambda = f64::from(call.z_loss);
    let part = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { weight * value };
    let loss = if out_of_reach {
        f64::INFINITY
    } else {
        part(1.0 - eps, weighted_nll)
            + part(smoothed_part, shares.mass * log_sum - shares.linear)
            + part(lambda, lse * lse)
            + part(row.entropy_weight, entropy)
    };

    let p_y = e_y / sum;
    let target_p_minus_1 = -others_exp / sum;
    let largest_p_minus_1 = match rest {
        Some(_) if target_is_largest => target_p_minus_1,
        Some(rest) => -rest / sum,
        None => 1.0 / sum - 1.0,
    };
    // Σ (total·p − q)², expanded, without class weights; of the class that was left out by itself.
    let u = |class: usize| smoothed_part * values.prior(class);
    let total = (1.0 - eps) * target_mass + smoothed_part * prior_mass;
    let (u_exp, u_squares) = match values.prior {
        Some(_) => (dots.prior[1], dots.prior[2]),
        None => (others_exp, others.classes as f64),
    };
    let mut norm = total * total * others.squares / (sum * sum)
        - 2.0 * total * smoothed_part * u_exp / sum
        + smoothed_part * smoothed_part * u_squares;
    if is_probabilities {
        let [t_exp, t_squares, t_u] = dots.target_products;
        norm += (1.0 - eps)
            * ((1.0 - eps) * t_squares + 2.0 * smoothed_part * t_u - 2.0 * total * t_exp / sum);
    }
    let mut left_out_norm = 0.0;
    for named in named {
        let (t, u) = ((1.0 - eps) * named.t, u(named.class));
        if named.logit == f64::NEG_INFINITY {
            continue;
        }
        if named.left_out {
            left_out_norm = (total * target_p_minus_1 + (total - t - u)).powi(2);
        } else {
            norm += t * (t - 2.0 * (total * (named.e / sum) - u));
        }
    }
    let result = RowResult {
        loss: weighted(loss),
        nll: if out_of_reach { f64::INFINITY } else { nll },
        lse,
        entropy,
        max_prob: if target_is_largest { p_y } else { 1.0 / sum },
        grad_norm_sq: norm.max(0.0) + left_out_norm,
        predicted,
        bad: dots.bad,
    };
    (
        result,
        Normaliser {
            largest: others.largest,
            log_sum,
            lse,
            has_left_out: left_out.is_some(),
            target_p: p_y,
            target_p_minus_1,
            largest_p_minus_1,
            classes,
            mass,
            prior_mass,
            mean,
        },
    )
}
