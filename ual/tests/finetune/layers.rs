//! The fused layers against candle's separate operations: values and gradients.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use candle_ual::{
    data::packing::Spans,
    model::{
        attention::{Attention, Rotation},
        fused, separate,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const CPU: &Device = &Device::Cpu;

fn random(shape: (usize, usize), seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.0 * shape.1)
        .map(|_| rng.random_range(-2.0..2.0))
        .collect();
    Tensor::from_vec(values, shape, CPU)
}

fn largest(x: &Tensor) -> Result<f32> {
    x.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// The outputs and the gradients of all variables under a random gradient of the output.
fn assert_same(
    vars: &[&Var],
    fused: impl Fn() -> Result<Tensor>,
    separate: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    let outputs = [fused()?, separate()?];
    let gradient = random(outputs[0].dims2()?, 99)?;
    let [of_fused, of_separate] = [0, 1].map(|i| (&outputs[i] * &gradient)?.sum_all()?.backward());
    let (of_fused, of_separate) = (of_fused?, of_separate?);
    let [output, expected] = outputs;
    let mut pairs = vec![("output".to_string(), output, expected)];
    for (i, var) in vars.iter().enumerate() {
        let gradient = |store: &candle_core::backprop::GradStore| store.get(var).cloned();
        let (got, expected) = (gradient(&of_fused), gradient(&of_separate));
        let (got, expected) = (got.expect("a gradient"), expected.expect("a gradient"));
        pairs.push((format!("gradient {i}"), got, expected));
    }
    for (name, got, expected) in pairs {
        let (error, size) = (largest(&(&got - &expected)?)?, largest(&expected)?);
        assert!(error <= 2e-6 * size, "{name}: off by {error} of {size}");
    }
    Ok(())
}

#[test]
fn rms_norm() -> Result<()> {
    for (rows, dim) in [(1, 1), (3, 7), (5, 64)] {
        let x = Var::from_tensor(&random((rows, dim), 1)?)?;
        let weight = Var::from_tensor(&random((1, dim), 2)?.squeeze(0)?)?;
        for epsilon in [1e-5, 0.5] {
            assert_same(
                &[&x, &weight],
                || fused::rms_norm(&x, &weight, epsilon),
                || separate::rms_norm(&x, &weight, epsilon),
            )?;
        }
    }
    Ok(())
}

#[test]
fn swiglu() -> Result<()> {
    for (rows, hidden) in [(1, 1), (3, 5), (4, 48)] {
        let x = Var::from_tensor(&(random((rows, 2 * hidden), 3)? * 3.0)?)?;
        assert_same(&[&x], || fused::swiglu(&x), || separate::swiglu(&x))?;
    }
    Ok(())
}

/// Of sequences of these lengths.
fn attention_of(
    lengths: &[usize],
    shared: usize,
    (heads, kv_heads, size): (usize, usize, usize),
    interleaved: bool,
) -> Result<Attention> {
    let positions = lengths.iter().max().unwrap_or(&0) + 2;
    let rotation = Rotation::new((positions, size), 10_000.0, None, interleaved, CPU)?;
    Ok(Attention {
        heads,
        kv_heads,
        size,
        spans: Arc::new(Spans::new(lengths, shared)),
        rotation: Arc::new(rotation),
    })
}

/// What the sequences' lengths are, and how many of their rows are shared; heads, heads of keys and values, size of a head.
type Case<'a> = (&'a [usize], usize, (usize, usize, usize));

const CASES: [Case; 8] = [
    (&[1], 0, (1, 1, 2)),
    (&[5, 5], 0, (2, 2, 4)),
    (&[7, 7, 7], 0, (4, 2, 6)),
    (&[17, 17], 0, (3, 1, 8)),
    (&[3, 9, 1], 0, (2, 1, 4)),
    (&[6, 4, 9, 5], 4, (4, 2, 6)), // the second has no row of its own
    (&[4, 5, 5], 4, (2, 2, 4)),    // nor has the first
    (&[8, 8, 8], 7, (3, 1, 8)),
];

#[test]
fn attention() -> Result<()> {
    for (lengths, shared, heads) in CASES {
        for interleaved in [false, true] {
            let attention = attention_of(lengths, shared, heads, interleaved)?;
            let width = (heads.0 + 2 * heads.1) * heads.2;
            let qkv = Var::from_tensor(&random((attention.spans.rows(), width), 4)?)?;
            assert_same(
                &[&qkv],
                || attention.clone().forward(&qkv),
                || separate::attention(&attention, &qkv),
            )?;
        }
    }
    Ok(())
}

/// Each sequence by itself, its shared rows copied to it.
#[test]
fn sequences_do_not_see_each_other() -> Result<()> {
    for (lengths, shared, heads) in CASES {
        let together = attention_of(lengths, shared, heads, false)?;
        let spans = together.spans.clone();
        let width = (heads.0 + 2 * heads.1) * heads.2;
        let qkv = Var::from_tensor(&random((spans.rows(), width), 4)?)?;
        let alone = || {
            let each = (0..lengths.len()).map(|i| {
                let own = spans.own(i);
                let before = qkv.narrow(0, 0, spans.before(i))?;
                let rows = Tensor::cat(&[before, qkv.narrow(0, own.start, own.len())?], 0)?;
                let attention = attention_of(&lengths[i..=i], 0, heads, false)?;
                let all = separate::attention(&attention, &rows)?;
                all.narrow(0, spans.before(i), own.len())
            });
            Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)
        };
        assert_same(&[&qkv], || together.clone().forward(&qkv), alone)?;
    }
    Ok(())
}

#[test]
fn rows_that_are_no_whole_sequences_are_refused() -> Result<()> {
    let attention = attention_of(&[3], 0, (1, 1, 2), false)?;
    for shape in [(4, 6), (3, 8)] {
        let error = attention.clone().forward(&random(shape, 5)?).unwrap_err();
        let (rows, width) = shape;
        let named = format!("[{rows}, {width}]");
        assert!(error.to_string().contains(&named), "{error}");
    }
    Ok(())
}
