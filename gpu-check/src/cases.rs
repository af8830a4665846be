//! The grid: every logit type, option, layout, reduction and entry point against the reference.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, RowStats};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    report::{Report, Worst},
    targets::{Distribution, Form, Given, targets_on},
};

/// Row lengths, padding not counted, each with its reason.
const WIDTHS: &[usize] = &[
    1,      // softmax of one class: loss and gradient exactly 0
    2,      // less than any vector
    7,      // one 16-byte vector of 16-bit elements, less one
    9,      // and plus one
    31,     // a warp less one
    33,     // a warp plus one
    257,    // a whole number of vectors plus one element
    1000,   // a multiple of 8 that is no power of two
    1025,   // one more than the largest block
    4099,   // prime: every row begins at another alignment
    32000,  // Llama 2
    50257,  // GPT-2: odd, so rows are misaligned
    200003, // prime, and on Hopper a cluster of 8 or 16 blocks a row
];
const REDUCED_WIDTHS: &[usize] = &[1, 7, 33, 1000, 4099];

/// How the logits lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    Contiguous,
    /// The middle of longer rows: a stride above the length, and a start of its own alignment.
    InsideLongerRows,
    /// (B, T, V) seen through a transposition of (T, B, V).
    Transposed,
    /// Rows from 1: a start offset.
    LaterRows,
}

/// Options of one column of the grid.
#[derive(Clone, Copy, Default)]
pub struct Options {
    pub name: &'static str,
    pub uniform: Option<f32>,
    pub per_row: bool,
    pub weights: bool,
    pub z_loss: f32,
    pub softcap: Option<f32>,
    pub scale: Option<f32>,
    pub padding: usize,
    /// Of the targets, where they are more than one class a row, smoothed evenly.
    pub distribution: Option<Distribution>,
}

const PLAIN: Options = Options {
    name: "plain",
    uniform: None,
    per_row: false,
    weights: false,
    z_loss: 0.0,
    softcap: None,
    scale: None,
    padding: 0,
    distribution: None,
};

pub const OPTIONS: &[Options] = &[
    PLAIN,
    Options {
        name: "uniform smoothing",
        uniform: Some(0.1),
        ..PLAIN
    },
    Options {
        name: "smoothing per row",
        per_row: true,
        ..PLAIN
    },
    Options {
        name: "weights per row",
        weights: true,
        ..PLAIN
    },
    Options {
        name: "z-loss",
        z_loss: 1e-3,
        ..PLAIN
    },
    Options {
        name: "softcap",
        softcap: Some(5.0),
        ..PLAIN
    },
    Options {
        name: "logit scale",
        scale: Some(0.7),
        ..PLAIN
    },
    Options {
        name: "padding",
        padding: 5,
        ..PLAIN
    },
    ALL,
    Options {
        name: "class weights and prior",
        per_row: true,
        distribution: Some(Distribution {
            form: Form::Class,
            class_weights: true,
            prior: true,
            entropy: None,
        }),
        ..PLAIN
    },
    Options {
        name: "entropy",
        distribution: Some(Distribution {
            form: Form::Class,
            class_weights: false,
            prior: false,
            entropy: Some(-0.5),
        }),
        ..PLAIN
    },
    Options {
        name: "top 40",
        uniform: Some(0.1),
        distribution: Some(Distribution {
            form: Form::TopK(40),
            ..ONE_CLASS
        }),
        ..PLAIN
    },
    Options {
        name: "probabilities",
        uniform: Some(0.1),
        distribution: Some(Distribution {
            form: Form::Probabilities(None),
            ..ONE_CLASS
        }),
        ..PLAIN
    },
    Options {
        name: "top 3, all at once",
        distribution: Some(Distribution {
            form: Form::TopK(3),
            class_weights: true,
            prior: true,
            entropy: Some(0.25),
        }),
        ..ALL
    },
    Options {
        name: "probabilities of bf16, all at once",
        distribution: Some(Distribution {
            form: Form::Probabilities(Some(DType::BF16)),
            class_weights: true,
            prior: true,
            entropy: Some(0.25),
        }),
        ..ALL
    },
];

const ONE_CLASS: Distribution = Distribution {
    form: Form::Class,
    class_weights: false,
    prior: false,
    entropy: None,
};

pub const ALL: Options = Options {
    name: "all at once",
    per_row: true,
    weights: true,
    z_loss: 1e-3,
    softcap: Some(30.0),
    scale: Some(1.3),
    padding: 3,
    ..PLAIN
};

pub const REDUCTIONS: [Reduction; 4] = [
    Reduction::Mean,
    Reduction::None,
    Reduction::Sum,
    Reduction::SumOver(7.5),
];

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    let widths = if reduced { REDUCED_WIDTHS } else { WIDTHS };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for options in OPTIONS {
            report.numbers(&format!("{} {}", dtype.as_str(), options.name), || {
                let mut worst = Worst::default();
                for (i, &width) in widths.iter().enumerate() {
                    // Every reduction and both target types meet every option over the widths.
                    let reductions = if width <= 1025 && !reduced {
                        &REDUCTIONS[..]
                    } else {
                        &REDUCTIONS[i % 4..][..1]
                    };
                    for &reduction in reductions {
                        let case =
                            Case::new(dtype, *options, width, Layout::Contiguous, reduction, i);
                        worst.merge(case.check(device)?);
                    }
                }
                Ok(worst)
            });
        }
        for layout in [
            Layout::InsideLongerRows,
            Layout::Transposed,
            Layout::LaterRows,
        ] {
            report.numbers(&format!("{} {layout:?}", dtype.as_str()), || {
                let mut worst = Worst::default();
                for (i, &width) in widths.iter().enumerate() {
                    let options = OPTIONS[[2, 8][i % 2]];
                    worst.merge(
                        Case::new(dtype, options, width, layout, REDUCTIONS[i % 4], i)
                            .check(device)?,
                    );
                }
                Ok(worst)
            });
        }
    }
}

/// One call's inputs, on the CPU.
pub struct Case {
    label: String,
    loss: CrossEntropy,
    smoothing: Option<Tensor>,
    weights: Option<Tensor>,
    row_weights: Vec<f64>,
    /// (B, T, V) in the type under test.
    pub logits: Tensor,
    pub given: Given,
    layout: Layout,
    reduction: Reduction,
    scale: f64,
}

impl Case {
    pub fn new(
        dtype: DType,
        options: Options,
        vocab: usize,
        layout: Layout,
        reduction: Reduction,
        seed: usize,
    ) -> Self {
        Self::build(dtype, options, vocab, layout, reduction, seed).expect("inputs on the CPU")
    }

    fn build(
        dtype: DType,
        options: Options,
        vocab: usize,
        layout: Layout,
        reduction: Reduction,
        seed: usize,
    ) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed as u64);
        let (batch, time) = (2, 6);
        let (rows, width) = (batch * time, vocab + options.padding);
        let cpu = &Device::Cpu;
        let mut x: Vec<f32> = (0..rows * width)
            .map(|_| 3.0 * gaussian(&mut rng))
            .collect();
        let mut targets: Vec<i64> = (0..rows)
            .map(|_| rng.random_range(0..vocab as i64))
            .collect();
        for (i, row) in x.chunks_mut(width).enumerate() {
            let (row, padding) = row.split_at_mut(vocab);
            padding.fill(f32::NAN); // must not be read
            let y = targets[i] as usize;
            // A sum of NaN says nothing: those rows keep to the grid's cases without reduction.
            if reduction != Reduction::None && [2, 5, 6, 7].contains(&i) {
                targets[i] = -100;
                continue;
            }
            // One special row of each kind; rows 8 to 11 are ordinary.
            match i {
                0 => row[y] += 40.0, // p_y near 1
                1 => row.iter_mut().for_each(|v| *v += 300.0),
                2 => row
                    .iter_mut()
                    .step_by(3)
                    .for_each(|v| *v = f32::NEG_INFINITY), // masked classes, perhaps y
                3 if vocab > 1 => {
                    row.iter_mut()
                        .skip(1)
                        .step_by(2)
                        .for_each(|v| *v = f32::NEG_INFINITY);
                    targets[i] = 0;
                }
                4 => targets[i] = -100, // ignored
                5 => row.fill(f32::NEG_INFINITY),
                6 => row[vocab / 2] = f32::NAN,
                7 => row[vocab - 1] = f32::INFINITY,
                _ => {}
            }
        }
        let per_row = |f: &mut dyn FnMut() -> f32| -> Result<Tensor> {
            Ok(Tensor::from_vec(
                (0..rows).map(|_| f()).collect::<Vec<_>>(),
                (batch, time),
                cpu,
            )?)
        };
        let smoothing = options
            .per_row
            .then(|| per_row(&mut || rng.random_range(0.0..1.0)))
            .transpose()?;
        let weights = options
            .weights
            .then(|| per_row(&mut || rng.random_range(0.1..3.0)))
            .transpose()?;
        let row_weights = match &weights {
            Some(w) => w.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?,
            None => vec![1.0; rows],
        };
        let mut loss = CrossEntropy::new()
            .z_loss(options.z_loss)
            .vocab_size(vocab)
            .reduction(reduction);
        if let Some(eps) = options.uniform {
            loss = loss.smoothing(eps);
        }
        if let Some(c) = options.softcap {
            loss = loss.softcap(c);
        }
        if let Some(s) = options.scale {
            loss = loss.logit_scale(s);
        }
        let mut targets = Tensor::from_vec(targets, (batch, time), cpu)?;
        let mut ignored = -100;
        if seed % 2 == 1 {
            // u32 targets cannot hold −100.
            ignored = i64::from(u32::MAX);
            loss = loss.ignore_index(ignored);
            targets = targets.to_vec2::<i64>().map(|rows| {
                let rows: Vec<u32> = rows
                    .into_iter()
                    .flatten()
                    .map(|t| u32::try_from(t).unwrap_or(u32::MAX))
                    .collect();
                Tensor::from_vec(rows, (batch, time), cpu)
            })??;
        }
        Ok(Self {
            label: format!("V {vocab}, {reduction:?}"),
            loss,
            smoothing,
            weights,
            row_weights,
            logits: Tensor::from_vec(x, (batch, time, width), cpu)?.to_dtype(dtype)?,
            given: Given::new(options.distribution, &targets, vocab, ignored, &mut rng)?,
            layout,
            reduction,
            scale: f64::from(options.scale.unwrap_or(1.0)).max(1.0),
        })
    }

    pub fn loss_on(&self, device: &Device) -> Result<CrossEntropy> {
        let mut loss = self.loss.clone();
        if let Some(smoothing) = &self.smoothing {
            loss = loss.smoothing(smoothing.to_device(device)?);
        }
        if let Some(weights) = &self.weights {
            loss = loss.row_weights(&weights.to_device(device)?);
        }
        self.given.on(device, loss)
    }

    fn check(&self, device: &Device) -> Result<Worst> {
        let expected = self.expected()?;
        let see_grad =
            |worst: &mut Worst, what: &str, got: &Tensor, factor: &dyn Fn(usize) -> f64| {
                expected.see_grad(worst, what, got, factor)
            };
        let see_loss =
            |worst: &mut Worst, what: &str, got: &Tensor| expected.see_loss(worst, what, got);
        let see_stats =
            |worst: &mut Worst, what: &str, got: &RowStats| expected.see_stats(worst, what, got);
        let loss = self.loss_on(device)?;
        let targets = targets_on(&self.given.targets, device)?;
        let (batch, time, _) = self.logits.dims3()?;
        let mut worst = Worst::default();
        let one = |_: usize| 1.0;

        let logits = self.place(device)?;
        let both = loss.loss_and_grad(&logits.view, &targets)?;
        see_loss(&mut worst, "loss_and_grad loss", &both.loss)?;
        see_grad(&mut worst, "loss_and_grad gradient", &both.grad, &one)?;
        see_stats(&mut worst, "loss_and_grad", &both.stats)?;
        let (value, grad) = loss.loss_and_grad_without_stats(&logits.view, &targets)?;
        see_loss(&mut worst, "loss_and_grad_without_stats loss", &value)?;
        see_grad(
            &mut worst,
            "loss_and_grad_without_stats gradient",
            &grad,
            &one,
        )?;
        see_loss(
            &mut worst,
            "forward",
            &loss.forward(&logits.view, &targets)?,
        )?;
        let (value, stats) = loss.forward_with_stats(&logits.view, &targets)?;
        see_loss(&mut worst, "forward_with_stats", &value)?;
        see_stats(&mut worst, "forward_with_stats", &stats)?;
        logits.ensure_as_before("an entry point without gradient in place")?;

        let inplace = loss.loss_and_grad_inplace(logits.view.clone(), &targets)?;
        see_loss(&mut worst, "loss_and_grad_inplace loss", &inplace.loss)?;
        see_grad(
            &mut worst,
            "loss_and_grad_inplace gradient",
            &inplace.grad,
            &one,
        )?;
        see_grad(
            &mut worst,
            "logits overwritten in place",
            &logits.view,
            &one,
        )?;
        logits.ensure_surroundings_as_before("loss_and_grad_inplace")?;

        let logits = self.place(device)?;
        let (value, grad) =
            loss.loss_and_grad_inplace_without_stats(logits.view.clone(), &targets)?;
        see_loss(
            &mut worst,
            "loss_and_grad_inplace_without_stats loss",
            &value,
        )?;
        see_grad(
            &mut worst,
            "loss_and_grad_inplace_without_stats gradient",
            &grad,
            &one,
        )?;
        logits.ensure_surroundings_as_before("loss_and_grad_inplace_without_stats")?;

        // Through candle's graph, with an upstream gradient that is not 1 and, without reduction, not the same.
        for over_logits in [false, true] {
            let what = if over_logits {
                "backward() in place"
            } else {
                "backward()"
            };
            let logits = self.place(device)?;
            let whole = Var::from_tensor(&logits.whole)?;
            let view = logits.view_of(whole.as_tensor())?;
            let value = loss
                .clone()
                .inplace_backward(over_logits)
                .forward(&view, &targets)?;
            see_loss(&mut worst, what, &value)?;
            let upstream = |row: usize| {
                if self.reduction == Reduction::None {
                    0.5 + row as f64
                } else {
                    3.0
                }
            };
            let scalar = if self.reduction == Reduction::None {
                let factors: Vec<f32> = (0..batch * time).map(|row| upstream(row) as f32).collect();
                (value * Tensor::from_vec(factors, (batch, time), device)?)?.sum_all()?
            } else {
                (value * 3.0)?
            };
            let grads = scalar.backward()?;
            let grad = grads
                .get(&whole)
                .ok_or_else(|| anyhow::anyhow!("{what}: no gradient"))?;
            see_grad(
                &mut worst,
                &format!("{what} gradient"),
                &logits.view_of(grad)?,
                &upstream,
            )?;
        }
        Ok(worst)
    }

    /// What results must be.
    pub fn expected(&self) -> Result<Expected<'_>> {
        let reference = self
            .loss_on(&Device::Cpu)?
            .reference(&self.logits, &self.given.targets)?;
        let divisor = match self.reduction {
            Reduction::None | Reduction::Sum => 1.0,
            Reduction::SumOver(n) => n,
            Reduction::Mean => {
                let counted = self.row_weights.iter().zip(&self.given.counts);
                counted.map(|(w, count)| w * count).sum::<f64>()
            }
        };
        Ok(Expected {
            case: self,
            grad: values(&reference.grad)?,
            reference,
            divisor,
        })
    }

    /// The logits on the device in the case's layout, inside memory that is watched.
    fn place(&self, device: &Device) -> Result<Placed> {
        let logits = self.logits.to_device(device)?.copy()?; // on the CPU it is the same memory
        let (batch, time, width) = logits.dims3()?;
        let guard = |shape: (usize, usize, usize)| {
            Tensor::full(7f32, shape, device)?.to_dtype(logits.dtype())
        };
        let whole = match self.layout {
            Layout::Contiguous => logits,
            Layout::InsideLongerRows => Tensor::cat(
                &[
                    &guard((batch, time, 3))?,
                    &logits,
                    &guard((batch, time, 2))?,
                ],
                D::Minus1,
            )?,
            Layout::Transposed => logits.transpose(0, 1)?.contiguous()?,
            Layout::LaterRows => Tensor::cat(
                &[
                    &guard((1, time, width))?,
                    &logits,
                    &guard((1, time, width))?,
                ],
                0,
            )?,
        };
        let mut placed = Placed {
            layout: self.layout,
            shape: (batch, time, width),
            view: whole.clone(),
            before: values(&whole)?,
            whole,
        };
        placed.view = placed.view_of(&placed.whole)?;
        Ok(placed)
    }
}

/// What results of a case must be.
pub struct Expected<'a> {
    case: &'a Case,
    reference: LossAndGrad,
    grad: Vec<f64>,
    /// What row losses are divided by.
    divisor: f64,
}

impl Expected<'_> {
    /// A gradient of which each row is multiplied by `factor`.
    pub fn see_grad(
        &self,
        worst: &mut Worst,
        what: &str,
        got: &Tensor,
        factor: &dyn Fn(usize) -> f64,
    ) -> Result<()> {
        let case = self.case;
        let (dtype, width) = (case.logits.dtype(), case.logits.dim(D::Minus1)?);
        ensure!(
            got.dtype() == dtype && got.dims() == case.logits.dims(),
            "{what}: {:?} {:?}",
            got.dtype(),
            got.dims()
        );
        for (i, (got, e)) in values(got)?.into_iter().zip(&self.grad).enumerate() {
            let row = i / width;
            let e = e * factor(row);
            let least = 1e-7
                * case.scale
                * case.given.magnitude
                * case.row_weights[row]
                * factor(row).abs()
                / self.divisor;
            worst.see(off(got, e, gradient_tolerance(dtype, e).max(least)), || {
                format!(
                    "{what} of row {row} column {}, {}: {got:e} for {e:e}",
                    i % width,
                    case.label
                )
            });
        }
        Ok(())
    }

    pub fn see_loss(&self, worst: &mut Worst, what: &str, got: &Tensor) -> Result<()> {
        let e = &self.reference.loss;
        ensure!(
            got.dtype() == DType::F32 && got.dims() == e.dims(),
            "{what}: {:?}",
            got
        );
        self.see_values(worst, what, got, e, 1e-5, 1e-6)
    }

    pub fn see_stats(&self, worst: &mut Worst, what: &str, got: &RowStats) -> Result<()> {
        let e = &self.reference.stats;
        for (name, got, e, rel, abs) in [
            ("nll", &got.nll, &e.nll, 1e-5, 1e-6),
            ("lse", &got.lse, &e.lse, 1e-5, 1e-6),
            // A difference of two sums, each of the size of the largest log-probability.
            ("entropy", &got.entropy, &e.entropy, 1e-5, 1e-5),
            ("max_prob", &got.max_prob, &e.max_prob, 1e-5, 1e-7),
            (
                "grad_norm_sq",
                &got.grad_norm_sq,
                &e.grad_norm_sq,
                1e-5,
                1e-6,
            ),
            ("predicted", &got.predicted, &e.predicted, 0.0, 0.0),
        ] {
            self.see_values(worst, &format!("{what} {name}"), got, e, rel, abs)?;
        }
        Ok(())
    }

    fn see_values(
        &self,
        worst: &mut Worst,
        what: &str,
        got: &Tensor,
        expected: &Tensor,
        rel: f64,
        abs: f64,
    ) -> Result<()> {
        for (i, (got, e)) in values(got)?.into_iter().zip(values(expected)?).enumerate() {
            worst.see(off(got, e, rel * e.abs() + abs), || {
                format!("{what} {i}, {}: {got:e} for {e:e}", self.case.label)
            });
        }
        Ok(())
    }
}

struct Placed {
    layout: Layout,
    shape: (usize, usize, usize),
    whole: Tensor,
    view: Tensor,
    before: Vec<f64>,
}

impl Placed {
    fn view_of(&self, whole: &Tensor) -> Result<Tensor> {
        let (batch, _, width) = self.shape;
        Ok(match self.layout {
            Layout::Contiguous => whole.clone(),
            Layout::InsideLongerRows => whole.narrow(D::Minus1, 3, width)?,
            Layout::Transposed => whole.transpose(0, 1)?,
            Layout::LaterRows => whole.narrow(0, 1, batch)?,
        })
    }

    fn ensure_as_before(&self, after: &str) -> Result<()> {
        let same = values(&self.whole)?
            .iter()
            .zip(&self.before)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        ensure!(same, "{after} wrote the logits");
        Ok(())
    }

    /// What lies between and around the rows is unchanged.
    fn ensure_surroundings_as_before(&self, after: &str) -> Result<()> {
        let (_, time, width) = self.shape;
        for (i, (a, b)) in values(&self.whole)?
            .into_iter()
            .zip(&self.before)
            .enumerate()
        {
            let inside = match self.layout {
                Layout::Contiguous | Layout::Transposed => true,
                Layout::InsideLongerRows => (3..3 + width).contains(&(i % (width + 5))),
                Layout::LaterRows => (time * width..self.before.len() - time * width).contains(&i),
            };
            ensure!(
                inside || a.to_bits() == b.to_bits(),
                "{after} wrote outside its rows, at element {i}"
            );
        }
        Ok(())
    }
}

pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    // To the CPU first, and only what the view shows.
    let tensor = tensor
        .detach()
        .force_contiguous()?
        .to_device(&Device::Cpu)?;
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}

/// Error in units of the tolerance: 0 for the same NaN or infinity.
pub fn off(got: f64, expected: f64, tolerance: f64) -> f64 {
    if (got.is_nan() && expected.is_nan()) || got == expected {
        0.0
    } else if got.is_finite() && expected.is_finite() {
        (got - expected).abs() / tolerance
    } else {
        f64::INFINITY
    }
}

/// A unit in the last place of the 16-bit types, relative for f32.
pub fn gradient_tolerance(dtype: DType, value: f64) -> f64 {
    let (digits, least_exponent) = match dtype {
        DType::BF16 => (7, -126),
        DType::F16 => (10, -14),
        _ => return 4e-6 * value.abs(),
    };
    let exponent = if value == 0.0 {
        least_exponent
    } else {
        (value.abs().log2().floor() as i32).max(least_exponent)
    };
    2f64.powi(exponent - digits)
}

pub fn gaussian(rng: &mut StdRng) -> f32 {
    // The sum of twelve uniform values: near enough, and without a table.
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}
