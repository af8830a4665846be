//! Runs a problem through every kernel of its element type and compares with the reference.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

use super::{
    build::{Build, driver},
    case::Outputs,
    problem::{Problem, from_bytes},
    runs::{OF_ALL_RANKS, RowRun, Runs, STATS},
};
use crate::kernels::abi::Element;

/// Outputs of one launch over the rows; those it does not have are empty.
#[derive(Default)]
pub struct RowResults {
    pub loss: Vec<f32>,
    /// (rows, width)
    pub grad: Vec<f32>,
    pub stats: [Vec<f32>; 5],
    pub predicted: Vec<u32>,
}

pub struct Results {
    pub forward: RowResults,
    pub fused: RowResults,
    pub backward: RowResults,
    pub on_chip: Vec<RowResults>,
    pub tiles: Vec<RowResults>,
    pub reduced: f32,
    /// As [`Outputs`] has it.
    pub paths: String,
}

/// Runs and compares; an error says what differs.
pub fn check(problem: &Problem, build: Build) -> Result<Results, String> {
    check_with(problem, driver(build))
}

pub fn check_with(problem: &Problem, driver: &std::path::Path) -> Result<Results, String> {
    let describe = |error: String| format!("{}: {error}", problem.name);
    let runs = Runs::new(problem);
    let outputs = runs.case.run(driver).map_err(describe)?;
    compare(problem, &runs, &outputs).map_err(describe)
}

/// What each row must be, but for the factor of a gradient.
#[derive(Clone)]
struct Expected {
    loss: Vec<f64>,
    grad: Vec<f64>,
    stats: [Vec<f64>; 5],
    predicted: Vec<u32>,
}

impl Expected {
    fn new(p: &Problem) -> candle_core::Result<Self> {
        let reference = p.reference()?;
        let f64s = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let s = &reference.stats;
        let mut expected = Self {
            loss: f64s(&reference.loss)?,
            grad: f64s(&reference.grad)?,
            stats: [
                f64s(&s.nll)?,
                f64s(&s.lse)?,
                f64s(&s.entropy)?,
                f64s(&s.max_prob)?,
                f64s(&s.grad_norm_sq)?,
            ],
            predicted: s.predicted.flatten_all()?.to_vec1()?,
        };
        let all = p.has_bad_classes();
        let bad = (0..p.rows()).filter(|&i| p.is_bad(i) || (all && !p.ignored(i)));
        bad.for_each(|i| expected.spoil(i, p.vocab));
        Ok(expected)
    }

    /// Row `i` cannot be computed.
    fn spoil(&mut self, i: usize, vocab: usize) {
        self.loss[i] = f64::NAN;
        self.grad[i * vocab..(i + 1) * vocab].fill(f64::NAN);
        self.stats.iter_mut().for_each(|stat| stat[i] = f64::NAN);
        self.predicted[i] = 0;
    }
}

fn compare(p: &Problem, runs: &Runs, outputs: &Outputs) -> Result<Results, String> {
    let expected = Expected::new(p).map_err(|error| format!("reference: {error}"))?;
    let bad_rows = (0..p.rows()).filter(|&i| p.is_bad(i) && !p.has_bad_classes());
    let first_error = bad_rows.map(|i| i as u64 + 1).min().unwrap_or(u64::MAX);
    if let Some(buffer) = runs.class_error {
        let expected = if p.has_bad_classes() { 0 } else { u64::MAX };
        let got = outputs.read::<u64>(buffer)[0];
        if got != expected {
            return Err(format!("classes: first_error is {got}, not {expected}"));
        }
    }
    let weights = (0..p.rows()).filter(|&i| !p.ignored(i)).map(|i| p.count(i));
    let total_weight: f64 = weights
        .filter(|weight| (0.0..f64::INFINITY).contains(weight))
        .sum();
    let got = outputs.read::<f32>(runs.total_weight)[0];
    near("total_weight", f64::from(got), total_weight, 1e-6, 0.0)?;
    let divisor = if p.mean && total_weight != 0.0 {
        total_weight
    } else {
        1.0
    };

    let mut results = Vec::new();
    for run in runs.rows.iter().chain(&runs.tiles).chain(&runs.ranks) {
        let spoiled = (!run.differ.is_empty()).then(|| {
            let mut expected = expected.clone();
            run.differ.iter().for_each(|&i| expected.spoil(i, p.vocab));
            expected
        });
        let expected = spoiled.as_ref().unwrap_or(&expected);
        let differ = run.differ.iter().map(|&i| i as u64 + 1);
        let first_error = differ.chain([first_error]).min().unwrap_or(u64::MAX);
        let of_run = |error: String| format!("{}: {error}", run.label);
        let result = read(p, run, outputs).map_err(of_run)?;
        let upstream = |i| {
            if run.has_upstream {
                f64::from(p.upstream(i))
            } else {
                1.0
            }
        };
        let factor = |i| upstream(i) * f64::from(p.result_scale) / divisor;
        compare_rows(p, expected, &result, factor).map_err(of_run)?;
        if let Some(buffer) = run.first_error {
            let got = outputs.read::<u64>(buffer)[0];
            if got != first_error {
                return Err(of_run(format!("first_error is {got}, not {first_error}")));
            }
        }
        results.push(result);
    }
    results.truncate(runs.rows.len() + runs.tiles.len());
    let tiles = results.split_off(runs.rows.len());
    let reduced = outputs.read::<f32>(runs.reduced)[0];
    let of_all = outputs.read::<f32>(runs.reduced_of_all)[0];
    let of_all_divisor = if p.mean { f64::from(OF_ALL_RANKS) } else { 1.0 };
    for (what, got, divisor) in [
        ("reduced", reduced, divisor),
        ("reduced by another weight", of_all, of_all_divisor),
    ] {
        let factor = f64::from(p.result_scale) / divisor;
        let sum: f64 = expected.loss.iter().sum();
        let magnitude: f64 = expected.loss.iter().map(|loss| loss.abs()).sum();
        near(
            what,
            f64::from(got),
            sum * factor,
            0.0,
            2e-6 * magnitude * factor,
        )?;
    }

    let [
        forward,
        plain_forward,
        backward,
        backward_in_place,
        fused,
        fused_in_place,
        on_chip @ ..,
    ] = &results[..]
    else {
        unreachable!("six launches over rows, and those on chip");
    };
    same_bits(
        "loss with and without statistics",
        &forward.loss,
        &plain_forward.loss,
    )?;
    same_bits("loss with and without gradient", &forward.loss, &fused.loss)?;
    same_bits("backward in place", &backward.grad, &backward_in_place.grad)?;
    let with_stats = match fused.predicted.is_empty() {
        false => fused,
        true => fused_in_place,
    };
    for (name, (a, b)) in STATS
        .iter()
        .zip(forward.stats.iter().zip(&with_stats.stats))
    {
        same_bits(&format!("{name} with and without gradient"), a, b)?;
    }
    same_bits("fused loss in place", &fused.loss, &fused_in_place.loss)?;
    same_bits("fused gradient in place", &fused.grad, &fused_in_place.grad)?;
    let (on_chip, _) = on_chip.as_chunks::<3>();
    for (i, [fused, forward, _]) in on_chip.iter().enumerate() {
        same_bits("loss on chip without gradient", &fused.loss, &forward.loss)?;
        for (name, (a, b)) in STATS.iter().zip(forward.stats.iter().zip(&fused.stats)) {
            if !a.is_empty() && !b.is_empty() {
                same_bits(&format!("{name} on chip without gradient"), a, b)?;
            }
        }
        for (j, [other, ..]) in on_chip[..i].iter().enumerate() {
            let of = |run: usize| (p.on_chip[run].blocks_per_row, p.on_chip[run].threads);
            if of(i) == of(j) {
                same_bits("loss on chip in place", &fused.loss, &other.loss)?;
                same_bits("gradient on chip in place", &fused.grad, &other.grad)?;
            }
        }
    }
    let on_chip = results.split_off(6);
    let mut results = results.into_iter();
    let (forward, backward, fused) = (results.next(), results.nth(1), results.nth(1));
    let all = forward.zip(backward).zip(fused);
    let ((forward, backward), fused) = all.expect("six launches over rows");
    Ok(Results {
        forward,
        fused,
        backward,
        on_chip,
        tiles,
        reduced,
        paths: outputs.paths.clone(),
    })
}

pub fn same_bits(what: &str, a: &[f32], b: &[f32]) -> Result<(), String> {
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    match a.iter().zip(b).position(differs) {
        Some(i) => Err(format!("{what}: {} and {} at {i}", a[i], b[i])),
        None if a.len() != b.len() => Err(format!("{what}: {} and {} values", a.len(), b.len())),
        None => Ok(()),
    }
}

fn read(p: &Problem, run: &RowRun, outputs: &Outputs) -> Result<RowResults, String> {
    let mut result = RowResults::default();
    if let Some(loss) = run.loss {
        result.loss = outputs.read(loss);
    }
    if let Some((buffer, view, initial)) = &run.grad {
        let size = p.element.size();
        let mut bytes = outputs.read::<u8>(*buffer);
        for i in 0..p.rows() {
            let begin = view.row(i) * size;
            let row = begin..begin + p.width * size;
            result
                .grad
                .extend(from_bytes(p.element, &bytes[row.clone()]));
            bytes[row.clone()].copy_from_slice(&initial[row]);
        }
        if bytes != *initial {
            return Err("the gaps between rows were written to".into());
        }
    }
    if let (Some(stats), Some(predicted)) = (run.stats, run.predicted) {
        result.stats = stats.map(|buffer| outputs.read(buffer));
        result.predicted = outputs.read(predicted);
    }
    Ok(result)
}

fn compare_rows(
    p: &Problem,
    e: &Expected,
    got: &RowResults,
    factor: impl Fn(usize) -> f64,
) -> Result<(), String> {
    for i in 0..p.rows() {
        let of_row = |what: &str| format!("row {i}, {what}");
        if !got.loss.is_empty() {
            near(
                &of_row("loss"),
                f64::from(got.loss[i]),
                e.loss[i],
                1e-6,
                // The entropy may cancel what else there is.
                smallest(p, i)
                    + 5e-7 * f64::from((p.weight(i) * p.entropy_weight(i)).abs().max(0.0)),
            )?;
        }
        if !got.predicted.is_empty() {
            for (name, (got, expected)) in STATS.iter().zip(got.stats.iter().zip(&e.stats)) {
                near(&of_row(name), f64::from(got[i]), expected[i], 2e-6, 5e-7)?;
            }
            if got.predicted[i] != e.predicted[i] {
                return Err(of_row(&format!(
                    "predicted: {}, not {}",
                    got.predicted[i], e.predicted[i]
                )));
            }
        }
        if !got.grad.is_empty() {
            compare_gradient(
                p,
                i,
                &got.grad[i * p.width..][..p.width],
                &e.grad[i * p.vocab..][..p.vocab],
                factor(i),
            )?;
        }
    }
    Ok(())
}

/// Error that is small beside a row's weight, and for its gradient beside that times the logit scale. 0 where the result must be exactly 0, and next to it where nothing
/// but the row's probabilities adds up: then every digit must be right, however near p_y is to 1.
fn smallest(p: &Problem, i: usize) -> f64 {
    match f64::from(p.weight(i).abs()) {
        _ if p.ignored(i) => 0.0,
        weight if weight.is_nan() => 0.0,
        weight if p.is_one_term(i) => 1e-12 * weight,
        // Of what multiplies its probabilities and may cancel.
        weight => 1e-7 * weight * p.magnitude(i),
    }
}

fn compare_gradient(
    p: &Problem,
    i: usize,
    got: &[f32],
    expected: &[f64],
    factor: f64,
) -> Result<(), String> {
    let absolute = smallest(p, i) * factor.abs() * f64::from(p.logit_scale);
    for (k, &got) in got.iter().enumerate() {
        // Padding has gradient 0, whatever the row.
        let expected = expected.get(k).map_or(0.0, |expected| expected * factor);
        let rounding = match p.element {
            _ if expected == 0.0 => 0.0,
            Element::F32 => 4e-6 * expected.abs(),
            Element::F16 => ulp_f16(expected),
            Element::BF16 => ulp_bf16(expected),
        };
        let is_padding = k >= p.vocab;
        let tolerance = if is_padding {
            0.0
        } else {
            rounding.max(absolute)
        };
        let overflows = f64::from(got.signum()) * expected + tolerance > 65504.0;
        if p.element == Element::F16 && got.is_infinite() && overflows {
            continue;
        }
        near(
            &format!("row {i}, gradient {k}"),
            f64::from(got),
            expected,
            0.0,
            tolerance,
        )?;
    }
    Ok(())
}

fn ulp_f16(x: f64) -> f64 {
    let bits = f16::from_f64(x.abs()).to_bits();
    f16::from_bits(bits + 1).to_f64() - f16::from_bits(bits).to_f64()
}

fn ulp_bf16(x: f64) -> f64 {
    let bits = bf16::from_f64(x.abs()).to_bits();
    bf16::from_bits(bits + 1).to_f64() - bf16::from_bits(bits).to_f64()
}

/// Of an f32.
const LARGEST: f64 = f32::MAX as f64;

fn near(what: &str, got: f64, expected: f64, relative: f64, absolute: f64) -> Result<(), String> {
    let tolerance = relative * expected.abs() + absolute;
    let good = if got.is_infinite() && expected * got.signum() + tolerance > 0.99 * LARGEST {
        true
    } else if expected.is_finite() && expected != 0.0 {
        (got - expected).abs() <= tolerance
    } else if expected == 0.0 {
        got.abs() <= absolute
    } else {
        got == expected || (got.is_nan() && expected.is_nan())
    };
    if good {
        Ok(())
    } else {
        Err(format!(
            "{what}: {got}, not {expected} (off by {:e})",
            (got - expected).abs()
        ))
    }
}
