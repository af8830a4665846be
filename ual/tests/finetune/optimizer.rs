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
