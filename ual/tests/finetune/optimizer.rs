//! The optimizer.

use candle_core::{Device, Tensor, Var};
use candle_ual::training::optimizer::AdamW;

/// A moment that was part of a graph would keep the activations of all steps alive.
#[test]
fn moments_are_no_part_of_a_graph() {
    let var = |values: [f32; 4]| Var::from_tensor(&Tensor::new(&values, &Device::Cpu).unwrap());
    let vars = [
        var([1.0, 2.0, 3.0, 4.0]).unwrap(),
        var([4.0, 3.0, 2.0, 1.0]).unwrap(),
    ];
    let mut optimizer = AdamW::new(&vars, 0.1).unwrap();
    for _ in 0..2 {
        let product = (vars[0].as_tensor() * vars[1].as_tensor()).unwrap();
        let loss = (product.sqr().unwrap() * vars[1].as_tensor()).unwrap();
        let gradients = loss.sum_all().unwrap().backward().unwrap();
        optimizer.step(&gradients, 0.01).unwrap();
        for moments in &optimizer.moments {
            assert!(!moments.first.track_op() && !moments.second.track_op());
        }
    }
}

/// What one pass over memory computes on the CPU is what candle's operations do.
#[test]
fn steps_are_those_of_the_formula() {
    let values = |scale: f32| (0..100_000).map(move |i| scale * ((i * 37 % 1000) as f32 - 500.0));
    let var = Tensor::from_iter(values(1e-3), &Device::Cpu).unwrap();
    let var = Var::from_tensor(&var.reshape((250, 400)).unwrap()).unwrap();
    let mut expected: Vec<f32> = values(1e-3).collect();
    let (mut first, mut second) = (vec![0f32; 100_000], vec![0f32; 100_000]);
    let mut optimizer = AdamW::new(std::slice::from_ref(&var), 0.1).unwrap();
    for step in 1..=3 {
        // The gradient is a transpose's: not contiguous.
        let factor = Tensor::from_iter(values(step as f32), &Device::Cpu).unwrap();
        let factor = factor.reshape((400, 250)).unwrap();
        let product = (var.t().unwrap() * &factor).unwrap().sum_all().unwrap();
        optimizer.step(&product.backward().unwrap(), 0.01).unwrap();
        let factor: Vec<f32> = values(step as f32).collect();
        let bias = [0.9f64, 0.999].map(|beta| (1.0 / (1.0 - beta.powi(step))) as f32);
        for i in 0..100_000 {
            let gradient = factor[i % 400 * 250 + i / 400];
            first[i] = first[i] * 0.9 + gradient * 0.1;
            second[i] = second[i] * 0.999 + gradient * gradient * 0.001;
            let move_by = first[i] * bias[0] / ((second[i] * bias[1]).sqrt() + 1e-8);
            expected[i] = expected[i] * (1.0 - 0.01 * 0.1) - move_by * 0.01;
        }
    }
    let found = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-6 * expected.abs().max(0.01),
            "{i}: {found}, {expected}"
        );
    }
}
