//! The fused layers against candle's separate operations: values and gradients.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use candle_ual::model::{
    attention::{Attention, Rotation},
    fused, separate,
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

#[test]
fn attention() -> Result<()> {
    // Sequences, their length, heads, heads of keys and values, size of a head.
    let shapes = [
        (1, 1, 1, 1, 2),
        (2, 5, 2, 2, 4),
        (3, 7, 4, 2, 6),
        (2, 17, 3, 1, 8),
    ];
    for (batch, length, heads, kv_heads, size) in shapes {
        for interleaved in [false, true] {
            let rotation = Rotation::new((length + 2, size), 10_000.0, None, interleaved, CPU)?;
            let attention = Attention {
                heads,
                kv_heads,
                size,
                length,
                rotation: Arc::new(rotation),
            };
            let width = (heads + 2 * kv_heads) * size;
            let qkv = Var::from_tensor(&random((batch * length, width), 4)?)?;
            assert_same(
                &[&qkv],
                || attention.clone().forward(&qkv),
                || separate::attention(&attention, &qkv),
            )?;
        }
    }
    Ok(())
}

#[test]
fn rows_that_are_no_whole_sequences_are_refused() -> Result<()> {
    let attention = Attention {
        heads: 1,
        kv_heads: 1,
        size: 2,
        length: 3,
        rotation: Arc::new(Rotation::new((3, 2), 10_000.0, None, false, CPU)?),
    };
    let error = attention.forward(&random((4, 6), 5)?).unwrap_err();
    assert!(error.to_string().contains("(4, 6)"), "{error}");
    Ok(())
}
