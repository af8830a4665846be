//! Every entry point against the f64 reference, under the crate's stated tolerances; the largest errors are kept.

use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{LossAndGrad, RowStats, Targets};

use crate::common::{Problem, address, bits, loss_dtype, values};

impl Problem {
    /// Compares every entry point with the reference.
    pub fn check(&self) -> Accuracy {
        let (logits, targets) = (&self.logits, &self.given());
        let loss = self.loss();
        let expected = self.reference();
        let untouched = bits(logits);
        let mut accuracy = Accuracy::new(logits.dtype());
        let context = || {
            format!(
                "{} {:?} {} {:?}",
                logits.dtype().as_str(),
                logits.dims(),
                match &self.distribution {
                    None => "",
                    Some(Targets::TopK { .. }) => "top k",
                    Some(_) => "probabilities",
                },
                self.setup
            )
        };

        let actual = loss.forward(logits, targets).unwrap();
        accuracy.loss(&actual, &expected.loss, || {
            format!("forward, {}", context())
        });

        let (actual, stats) = loss.forward_with_stats(logits, targets).unwrap();
        accuracy.loss(&actual, &expected.loss, || {
            format!("forward_with_stats, {}", context())
        });
        accuracy.stats(&stats, &expected.stats, || {
            format!("forward_with_stats, {}", context())
        });

        let actual = loss.loss_and_grad(logits, targets).unwrap();
        accuracy.all(self, &actual, &expected, || {
            format!("loss_and_grad, {}", context())
        });
        let (value, grad) = loss.loss_and_grad_without_stats(logits, targets).unwrap();
        let same = |value: &Tensor, grad: &Tensor, entry_point: &str| {
            assert_eq!(
                bits(value),
                bits(&actual.loss),
                "{entry_point}: {}",
                context()
            );
            assert_eq!(
                bits(grad),
                bits(&actual.grad),
                "{entry_point}: {}",
                context()
            );
        };
        same(&value, &grad, "loss_and_grad_without_stats");
        assert_eq!(bits(logits), untouched, "logits written: {}", context());
        let memory = logits.copy().unwrap();
        let (value, grad) = loss
            .loss_and_grad_inplace_without_stats(memory.clone(), targets)
            .unwrap();
        same(&value, &grad, "loss_and_grad_inplace_without_stats");
        if logits.elem_count() > 0 {
            assert_eq!(
                address(&grad),
                address(&memory),
                "the logits' memory: {}",
                context()
            );
        }

        let memory = logits.copy().unwrap();
        let actual = loss.loss_and_grad_inplace(memory.clone(), targets).unwrap();
        accuracy.all(self, &actual, &expected, || {
            format!("loss_and_grad_inplace, {}", context())
        });
        if logits.elem_count() > 0 {
            assert_eq!(
                address(&actual.grad),
                address(&memory),
                "the logits' memory: {}",
                context()
            );
        }

        let logits = Var::from_tensor(logits).unwrap();
        let actual = loss.forward(&logits, targets).unwrap();
        accuracy.loss(&actual, &expected.loss, || {
            format!("tracked forward, {}", context())
        });
        let gradients = actual.sum_all().unwrap().backward().unwrap();
        let grad = gradients.get(&logits).expect("a gradient");
        accuracy.grad(self, grad, &expected.grad, || {
            format!("backward, {}", context())
        });
        accuracy
    }
}

/// Distance from |x| to the next value of a narrow type.
pub fn ulp(x: f64, dtype: DType) -> f64 {
    let (digits, lowest) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        DType::F32 => (23, -126),
        _ => (52, -1022),
    };
    let exponent = if x == 0.0 {
        lowest
    } else {
        (x.abs().log2().floor() as i32).max(lowest)
    };
    2f64.powi(exponent - digits)
}

/// The largest errors seen, and the comparisons that record them.
#[derive(Clone, Debug)]
pub struct Accuracy {
    pub dtype: DType,
    /// Relative.
    pub loss: f64,
    /// Units in the last place for narrow types, else relative; where the absolute tolerance was exceeded.
    pub grad: f64,
    /// As a part of the tolerance.
    pub grad_part: f64,
    /// nll and max_prob relative; lse, entropy and grad_norm_sq by `stat_error`.
    pub stats: [f64; 5],
}

impl Accuracy {
    pub fn new(dtype: DType) -> Self {
        Self {
            dtype,
            loss: 0.0,
            grad: 0.0,
            grad_part: 0.0,
            stats: [0.0; 5],
        }
    }

    pub fn merge(&mut self, other: &Self) {
        self.loss = self.loss.max(other.loss);
        self.grad = self.grad.max(other.grad);
        self.grad_part = self.grad_part.max(other.grad_part);
        for (mine, theirs) in self.stats.iter_mut().zip(other.stats) {
            *mine = mine.max(theirs);
        }
    }

    pub fn all(
        &mut self,
        problem: &Problem,
        actual: &LossAndGrad,
        expected: &LossAndGrad,
        context: impl Fn() -> String,
    ) {
        self.loss(&actual.loss, &expected.loss, &context);
        self.grad(problem, &actual.grad, &expected.grad, &context);
        self.stats(&actual.stats, &expected.stats, &context);
    }

    pub fn loss(&mut self, actual: &Tensor, expected: &Tensor, context: impl Fn() -> String) {
        assert_eq!(
            actual.dtype(),
            loss_dtype(self.dtype),
            "type of the loss, {}",
            context()
        );
        assert_eq!(
            actual.dims(),
            expected.dims(),
            "shape of the loss, {}",
            context()
        );
        let tolerance = if self.dtype == DType::F64 {
            1e-12
        } else {
            1e-5
        };
        for (i, (a, e)) in values(actual).into_iter().zip(values(expected)).enumerate() {
            let error = relative_error(a, e);
            self.loss = self.loss.max(error);
            assert!(
                error <= tolerance,
                "loss {i} is {a:e}, must be {e:e}, {}",
                context()
            );
        }
    }

    pub fn grad(
        &mut self,
        problem: &Problem,
        actual: &Tensor,
        expected: &Tensor,
        context: impl Fn() -> String,
    ) {
        assert_eq!(
            actual.dtype(),
            self.dtype,
            "type of the gradient, {}",
            context()
        );
        assert_eq!(
            actual.dims(),
            expected.dims(),
            "shape of the gradient, {}",
            context()
        );
        let factors = problem.row_factors();
        let width = expected.dims().last().copied().unwrap();
        let rows = values(actual).into_iter().zip(values(expected)).enumerate();
        for (i, (a, e)) in rows {
            let factor = factors[i / width];
            // f64 has far more to give than the absolute tolerance that f32 arithmetic needs.
            let absolute = match self.dtype {
                DType::F64 => 1e-14 * factor,
                _ => (1e-7 * factor).max(NOTHING),
            };
            let (unit, tolerance) = match self.dtype {
                // Rounded once: half a unit, and what the f32 value was off by before.
                DType::F16 | DType::BF16 => (ulp(e, self.dtype), 0.6),
                DType::F32 => (e.abs(), 4e-6),
                _ => (e.abs(), 1e-12),
            };
            let error = (a - e).abs();
            if a == e || (a.is_nan() && e.is_nan()) || overflows(a, e, absolute, self.dtype) {
                continue;
            }
            self.grad_part = self.grad_part.max(error / absolute.max(tolerance * unit));
            if error <= absolute {
                continue;
            }
            self.grad = self.grad.max(error / unit);
            let (row, k) = (i / width, i % width);
            assert!(
                error <= tolerance * unit,
                "gradient of row {row}, class {k} is {a:e}, must be {e:e} (error {:e} units, target {}), {}",
                error / unit,
                values(&problem.targets)[row],
                context()
            );
        }
    }

    /// Tolerances of the statistics: 1e-5 relative like the loss, with an absolute part where a statistic comes out of
    /// a difference: 1e-6 for the entropy and the gradient norm, 1e-6 for a log-sum-exp near 0. In f64, 1e-12 and 1e-13.
    pub fn stats(&mut self, actual: &RowStats, expected: &RowStats, context: impl Fn() -> String) {
        let wide = self.dtype == DType::F64;
        let (relative, absolute) = if wide { (1e-12, 1e-13) } else { (1e-5, 1e-6) };
        let pairs = [
            ("nll", &actual.nll, &expected.nll, 0.0),
            ("lse", &actual.lse, &expected.lse, absolute),
            ("entropy", &actual.entropy, &expected.entropy, absolute),
            ("max_prob", &actual.max_prob, &expected.max_prob, 0.0),
            (
                "grad_norm_sq",
                &actual.grad_norm_sq,
                &expected.grad_norm_sq,
                absolute,
            ),
        ];
        for (n, (name, actual, expected, absolute)) in pairs.into_iter().enumerate() {
            assert_eq!(
                actual.dtype(),
                loss_dtype(self.dtype),
                "type of {name}, {}",
                context()
            );
            assert_eq!(
                actual.dims(),
                expected.dims(),
                "shape of {name}, {}",
                context()
            );
            for (i, (a, e)) in values(actual).into_iter().zip(values(expected)).enumerate() {
                let error = relative_error(a, e);
                let ok = error <= relative || (a - e).abs() <= absolute;
                if (a - e).abs() > absolute {
                    self.stats[n] = self.stats[n].max(error);
                }
                assert!(
                    ok,
                    "{name} of row {i} is {a:e}, must be {e:e}, {}",
                    context()
                );
            }
        }
        assert_eq!(actual.predicted.dtype(), DType::U32, "{}", context());
        assert_eq!(
            actual.predicted.dims(),
            expected.predicted.dims(),
            "{}",
            context()
        );
        assert_eq!(
            bits(&actual.predicted),
            bits(&expected.predicted),
            "predicted, {}",
            context()
        );
    }
}

/// Whether `a` is infinite because `e`, to within the tolerance, is beyond what the type holds.
fn overflows(a: f64, e: f64, absolute: f64, dtype: DType) -> bool {
    let largest = match dtype {
        DType::F16 => 65504.0,
        DType::F64 => f64::MAX,
        _ => f64::from(f32::MAX), // a bf16's is a little less
    };
    a.is_infinite() && e * a.signum() + absolute > 0.99 * largest
}

/// As good as 0: each exponential that would be about the smallest normal f32, 1.2e-38, or less is.
const NOTHING: f64 = 1e-36;

/// |a − e| / |e| of an f32 result.
pub fn relative_error(a: f64, e: f64) -> f64 {
    if a == e
        || (a.is_nan() && e.is_nan())
        || (a - e).abs() <= NOTHING
        || overflows(a, e, 0.0, DType::F32)
    {
        0.0
    } else if !a.is_finite() || !e.is_finite() {
        f64::INFINITY
    } else {
        (a - e).abs() / e.abs()
    }
}
