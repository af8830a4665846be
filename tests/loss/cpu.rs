//! Every entry point of the fast CPU path against the f64 reference: types, sizes, options, layouts. The comparison and
//! its tolerances are in accuracy.rs.

use crate::{
    accuracy::{Accuracy, ulp},
    common::*,
};
use candle_core::{DType, IndexOp, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};

const REDUCTIONS: [Reduction; 4] = [
    Reduction::None,
    Reduction::Sum,
    Reduction::Mean,
    Reduction::SumOver(37.5),
];

/// Prints the largest errors, for whoever runs with --nocapture.
fn report(test: &str, accuracy: &[Accuracy]) {
    for a in accuracy {
        println!(
            "{test}: {:?} loss {:.2e}, gradient {:.2e} ({:.2} of the tolerance), nll lse entropy max_prob grad_norm_sq {:?}",
            a.dtype,
            a.loss,
            a.grad,
            a.grad_part,
            a.stats.map(|e| format!("{e:.1e}"))
        );
    }
}

fn for_each_type(test: &str, run: impl Fn(DType) -> Vec<Problem>) {
    let accuracy = FLOATS.map(|dtype| {
        let mut worst = Accuracy::new(dtype);
        run(dtype)
            .iter()
            .for_each(|problem| worst.merge(&problem.check()));
        worst
    });
    report(test, &accuracy);
}

/// Each width with a reason: 1 and 2 (a class alone, no other, one other); one below, at and above a vector, its
/// double and the multiples that block sizes tend to be; then real vocabularies, even and odd.
#[test]
fn sizes() {
    for_each_type("sizes", |dtype| {
        let mut problems = Vec::new();
        let widths = [
            1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
            1000,
        ];
        for width in widths {
            for rows in [0, 1, 3, 70] {
                let plain = Setup {
                    reduction: Reduction::None,
                    ..Setup::default()
                };
                problems.push(Problem::random(width as u64, &[rows, width], dtype, plain));
                problems.push(Problem::everything(
                    width as u64,
                    &[rows, width],
                    dtype,
                    REDUCTIONS[(width + rows) % 4],
                ));
            }
        }
        problems
    });
}

#[test]
fn long_rows() {
    for_each_type("long rows", |dtype| {
        let mut problems = Vec::new();
        let widths = [
            2047, 2048, 2049, 4095, 4096, 4097, 8193, 16385, 32000, 50257, 65537, 128256,
        ];
        for (n, width) in widths.into_iter().enumerate() {
            for rows in if width < 10_000 {
                vec![1, 3, 5]
            } else {
                vec![1 + n % 3]
            } {
                let plain = Setup {
                    eps: Eps::Uniform(0.1),
                    reduction: Reduction::None,
                    ..Setup::default()
                };
                problems.push(Problem::random(width as u64, &[rows, width], dtype, plain));
                problems.push(Problem::everything(
                    width as u64,
                    &[rows, width],
                    dtype,
                    REDUCTIONS[n % 4],
                ));
            }
        }
        problems
    });
}

#[test]
fn many_rows() {
    for_each_type("many rows", |dtype| {
        let plain = Setup {
            eps: Eps::Uniform(0.1),
            ..Setup::default()
        };
        vec![
            Problem::random(1, &[4000, 17], dtype, plain.clone()),
            Problem::everything(2, &[3001, 40], dtype, Reduction::Mean),
            Problem::random(3, &[10_000, 1], dtype, plain),
        ]
    });
}

#[test]
fn options() {
    for_each_type("options", |dtype| {
        let default = || Setup {
            reduction: Reduction::None,
            ..Setup::default()
        };
        let eps = vec![0.0, 1.0, 0.5, 0.01, 1e-6, 0.999, 0.1];
        let setups = [
            default(),
            Setup {
                eps: Eps::Uniform(0.1),
                ..default()
            },
            Setup {
                eps: Eps::Uniform(1.0),
                ..default()
            },
            Setup {
                eps: Eps::PerRow(eps.clone()),
                ..default()
            },
            Setup {
                weights: Some(vec![1.0, 0.0, 2.0, 1e-3, 1e3, 0.5, 0.0]),
                ..default()
            },
            Setup {
                z_loss: 1e-4,
                ..default()
            },
            Setup {
                z_loss: 0.5,
                ..default()
            },
            Setup {
                softcap: Some(30.0),
                ..default()
            },
            Setup {
                softcap: Some(2.0),
                ..default()
            },
            Setup {
                scale: 0.125,
                ..default()
            },
            Setup {
                scale: 1.7,
                ..default()
            },
            Setup {
                scale: 1.7,
                softcap: Some(15.0),
                eps: Eps::PerRow(eps.clone()),
                ..default()
            },
            Setup {
                z_loss: 1e-2,
                eps: Eps::PerRow(eps),
                softcap: Some(50.0),
                ..default()
            },
        ];
        let mut problems = Vec::new();
        for (n, setup) in setups.into_iter().enumerate() {
            for width in [5, 33, 1000, 2049] {
                let setup = Setup {
                    reduction: REDUCTIONS[(n + width) % 4],
                    ..setup.clone()
                };
                problems.push(Problem::random(n as u64, &[7, width], dtype, setup));
            }
        }
        for reduction in REDUCTIONS {
            problems.push(Problem::everything(9, &[9, 40], dtype, reduction));
        }
        problems
    });
}

/// Padding holds NaN (see `Problem::random`); its gradient is 0 also where the gradient overwrites it.
#[test]
fn padding() {
    for_each_type("padding", |dtype| {
        let mut problems = Vec::new();
        for (width, vocab) in [
            (2, 1),
            (8, 7),
            (16, 15),
            (40, 17),
            (64, 63),
            (300, 299),
            (5000, 4097),
            (50304, 50257),
        ] {
            let setup = Setup {
                vocab: Some(vocab),
                eps: Eps::Uniform(0.2),
                ..Setup::default()
            };
            let problem = Problem::random(vocab as u64, &[3, width], dtype, setup);
            let loss = problem.loss();
            let Problem {
                logits, targets, ..
            } = &problem;
            let var = Var::from_tensor(logits).unwrap();
            let backward = loss.forward(&var, targets).unwrap().backward().unwrap();
            let grads = [
                loss.reference(logits, targets).unwrap().grad,
                loss.loss_and_grad(logits, targets).unwrap().grad,
                loss.loss_and_grad_inplace(logits.copy().unwrap(), targets)
                    .unwrap()
                    .grad,
                backward.get(&var).unwrap().clone(),
            ];
            for grad in grads {
                let padding = grad.narrow(1, vocab, width - vocab).unwrap();
                assert!(
                    values(&padding).iter().all(|&g| g == 0.0),
                    "{width} {vocab}"
                );
            }
            problems.push(problem);
        }
        problems
    });
}

/// Ignored rows hold NaN (see `Problem::ignore`): loss, gradient and statistics are 0 all the same.
#[test]
fn ignored_rows() {
    for_each_type("ignored rows", |dtype| {
        let mut problems = Vec::new();
        let which: [fn(usize) -> bool; 5] =
            [|i| i == 0, |i| i == 8, |i| i % 3 == 1, |i| i != 4, |_| true];
        for (n, which) in which.into_iter().enumerate() {
            for ignore in [-100, -1, 3, i64::MAX, i64::MIN] {
                let reduction = REDUCTIONS[n % 4];
                let setup = Setup {
                    ignore,
                    reduction,
                    eps: Eps::Uniform(0.1),
                    ..Setup::default()
                };
                let mut problem = Problem::random(n as u64, &[9, 21], dtype, setup);
                problem.ignore(which);
                let got = problem
                    .loss()
                    .loss_and_grad_inplace(problem.logits.copy().unwrap(), &problem.targets)
                    .unwrap();
                let y: Vec<i64> = problem.targets.to_vec1().unwrap();
                for i in (0..9).filter(|&i| y[i] == ignore) {
                    assert!(values(&got.grad.i(i).unwrap()).iter().all(|&g| g == 0.0));
                    let stats = stats_bits(&got.stats);
                    assert!(stats.iter().all(|stat| stat[i] == 0), "row {i}: {stats:?}");
                }
                problems.push(problem);
            }
        }
        problems
    });
}

/// The target above all others by 5 to 100: the loss keeps its digits, and so does the target's gradient, which would
/// be 0 from gap 17 on if p − 1 were a difference of f32 values.
#[test]
fn sure_of_the_target() {
    for_each_type("sure of the target", |dtype| {
        let mut problems = Vec::new();
        for gap in [5.0, 10.0, 17.0, 20.0, 30.0, 40.0, 60.0, 80.0, 100.0] {
            for width in [2, 9, 40, 2100] {
                for eps in [0.0, 0.1] {
                    let mut x = vec![0.0; 3 * width];
                    for (i, row) in x.chunks_mut(width).enumerate() {
                        row[[0, width / 2, width - 1][i]] = gap;
                        row[[width - 1, width - 1, 0][i]] = -1.5;
                    }
                    let y = vec![0, (width / 2) as i64, width as i64 - 1];
                    let reduction = Reduction::None;
                    let setup = Setup {
                        eps: Eps::Uniform(eps),
                        reduction,
                        ..Setup::default()
                    };
                    // Where the middle is the end (width 2), the row's target is the less likely class.
                    problems.push(Problem {
                        setup,
                        logits: tensor(x, &[3, width], dtype),
                        targets: targets(y, &[3], DType::I64),
                        distribution: None,
                    });
                }
            }
        }
        problems
    });
    for dtype in [DType::F32, DType::F64] {
        for gap in [5.0, 10.0, 17.0, 20.0, 30.0, 40.0, 60.0, 80.0] {
            let mut x = vec![0.0; 40];
            x[11] = gap;
            let logits = Var::from_tensor(&tensor(x, &[1, 40], dtype)).unwrap();
            let y = targets(vec![11], &[1], DType::U32);
            let loss = CrossEntropy::new();
            let expected = values(&loss.reference(&logits, &y).unwrap().grad)[11];
            assert!(expected < 0.0);
            let fused = values(&loss.loss_and_grad(&logits, &y).unwrap().grad)[11];
            let gradients = loss.forward(&logits, &y).unwrap().backward().unwrap();
            let backward = values(gradients.get(&logits).unwrap())[11];
            for (name, actual) in [("loss_and_grad", fused), ("backward", backward)] {
                let error = (actual / expected - 1.0).abs();
                assert!(
                    error < 4e-6,
                    "{dtype:?} {name} at gap {gap}: {actual:e}, must be {expected:e}"
                );
            }
        }
    }
}

/// Far from 0, a row's own rounding is all that is lost: the reference sees the same rounded logits.
#[test]
fn large_offsets() {
    for_each_type("large offsets", |dtype| {
        let mut problems = Vec::new();
        let offsets: &[f64] = match dtype {
            DType::F16 => &[100.0, -1000.0, 60000.0],
            _ => &[100.0, -1000.0, 60000.0, 1e6, -1e7],
        };
        for &offset in offsets {
            for width in [9, 300, 5000] {
                let setup = Setup {
                    eps: Eps::PerRow(vec![0.0, 0.1, 1.0, 0.5]),
                    reduction: Reduction::None,
                    ..Setup::default()
                };
                let mut problem = Problem::random(width as u64, &[4, width], DType::F64, setup);
                problem.logits = (problem.logits + offset).unwrap().to_dtype(dtype).unwrap();
                problems.push(problem);
            }
        }
        problems
    });
}

/// Logits spread so wide that most probabilities underflow.
#[test]
fn wide_spread() {
    for_each_type("wide spread", |dtype| {
        let mut problems = Vec::new();
        for factor in [10.0, 100.0, 3000.0] {
            for width in [16, 333, 3000] {
                let setup = Setup {
                    eps: Eps::PerRow(vec![0.0, 0.1, 1.0, 0.5]),
                    reduction: Reduction::None,
                    ..Setup::default()
                };
                let mut problem = Problem::random(width as u64, &[4, width], DType::F64, setup);
                problem.logits = (problem.logits * factor).unwrap().to_dtype(dtype).unwrap();
                problems.push(problem);
            }
        }
        problems
    });
}

#[test]
fn shapes() {
    for_each_type("shapes", |dtype| {
        let mut problems = Vec::new();
        for shape in [
            &[37usize][..],
            &[5, 37],
            &[2, 3, 37],
            &[2, 3, 4, 37],
            &[1, 1, 1, 37],
            &[2, 0, 37],
        ] {
            for reduction in REDUCTIONS {
                let setup = Setup {
                    reduction,
                    eps: Eps::Uniform(0.1),
                    ..Setup::default()
                };
                problems.push(Problem::random(4, shape, dtype, setup));
                problems.push(Problem::everything(5, shape, dtype, reduction));
            }
        }
        problems
    });
}

#[test]
fn target_types() {
    for dtype in FLOATS {
        let setup = Setup {
            ignore: 5,
            eps: Eps::Uniform(0.1),
            reduction: Reduction::None,
            ..Setup::default()
        };
        let mut problem = Problem::random(6, &[9, 21], dtype, setup);
        problem.ignore(|i| i == 3);
        let loss = problem.loss();
        let as_u32 = problem.targets.to_dtype(DType::U32).unwrap();
        let a = loss
            .loss_and_grad(&problem.logits, &problem.targets)
            .unwrap();
        let b = loss.loss_and_grad(&problem.logits, &as_u32).unwrap();
        assert_eq!(bits(&a.loss), bits(&b.loss));
        assert_eq!(bits(&a.grad), bits(&b.grad));
        problem.targets = as_u32;
        problem.check();
    }
}

/// Values that broadcast: (B, 1) over (B, T), a single value, and any float type.
#[test]
fn broadcast_row_values() {
    for dtype in FLOATS {
        let setup = Setup {
            reduction: Reduction::None,
            ..Setup::default()
        };
        let mut problem = Problem::random(7, &[2, 3, 21], dtype, setup);
        let (b, t) = ([0.125f32, 0.5], [0.25f32, 0.0, 1.0]);
        problem.setup.eps = Eps::PerRow(vec![b[0], b[0], b[0], b[1], b[1], b[1]]);
        problem.setup.weights = Some([t, t].concat());
        let want = problem
            .loss()
            .loss_and_grad(&problem.logits, &problem.targets)
            .unwrap();
        for row_type in FLOATS {
            let smoothing = Tensor::new(&[[b[0]], [b[1]]], CPU)
                .unwrap()
                .to_dtype(row_type)
                .unwrap();
            let weights = Tensor::new(&t, CPU).unwrap().to_dtype(row_type).unwrap();
            let loss = CrossEntropy::new()
                .reduction(Reduction::None)
                .smoothing(&smoothing)
                .row_weights(&weights);
            let got = loss
                .loss_and_grad(&problem.logits, &problem.targets)
                .unwrap();
            assert_eq!(bits(&got.loss), bits(&want.loss));
            assert_eq!(bits(&got.grad), bits(&want.grad));
        }
        let one = Tensor::new(0.5f32, CPU).unwrap();
        let uniform = CrossEntropy::new()
            .smoothing(0.5)
            .loss_and_grad(&problem.logits, &problem.targets)
            .unwrap();
        let scalar = CrossEntropy::new()
            .smoothing(one)
            .loss_and_grad(&problem.logits, &problem.targets)
            .unwrap();
        assert_eq!(bits(&uniform.grad), bits(&scalar.grad));
    }
}

/// Views of a larger tensor: the same bits as a contiguous copy, and in place nothing outside the rows is written.
#[test]
fn strided_rows() {
    for dtype in FLOATS {
        let width = 37;
        let base = Problem::random(8, &[4, 6, 50], dtype, Setup::default()).logits;
        let views: [(&str, Tensor); 5] = [
            ("columns", base.narrow(2, 5, width).unwrap()),
            (
                "rows and columns",
                base.narrow(2, 1, width).unwrap().narrow(1, 2, 3).unwrap(),
            ),
            (
                "transposed rows",
                base.narrow(2, 5, width).unwrap().transpose(0, 1).unwrap(),
            ),
            ("one row of each", base.i((.., 2, 3..40)).unwrap()),
            ("one row", base.i((1, 2, 7..44)).unwrap()),
        ];
        for (name, view) in views {
            let shape = view.dims()[..view.rank() - 1].to_vec();
            let rows: usize = shape.iter().product();
            let eps = (0..rows).map(|i| i as f32 / rows as f32).collect();
            let setup = Setup {
                eps: Eps::PerRow(eps),
                reduction: Reduction::None,
                ..Setup::default()
            };
            let y = targets(
                (0..rows as i64).map(|i| i * 5 % width as i64).collect(),
                &shape,
                DType::I64,
            );
            let problem = Problem {
                setup,
                logits: view.clone(),
                targets: y.clone(),
                distribution: None,
            };
            problem.check();

            let loss = problem.loss();
            let want = loss
                .loss_and_grad(&view.force_contiguous().unwrap(), &y)
                .unwrap();
            let got = loss.loss_and_grad(&view, &y).unwrap();
            assert_eq!(bits(&got.grad), bits(&want.grad), "{name}");
            assert_eq!(bits(&got.loss), bits(&want.loss), "{name}");
            assert_eq!(stats_bits(&got.stats), stats_bits(&want.stats), "{name}");
            assert_eq!(
                bits(&loss.forward(&view, &y).unwrap()),
                bits(&loss.forward(&view.force_contiguous().unwrap(), &y).unwrap())
            );
        }

        // In place, into the middle of the larger tensor.
        for transpose in [false, true] {
            let memory = base.copy().unwrap();
            let mut view = memory.narrow(2, 5, width).unwrap().narrow(1, 2, 3).unwrap();
            let shape = if transpose { [3, 4] } else { [4, 3] };
            if transpose {
                view = view.transpose(0, 1).unwrap();
            }
            let y = targets((0..12).collect(), &shape, DType::I64);
            let loss = CrossEntropy::new().reduction(Reduction::None);
            let want = loss.loss_and_grad(&view, &y).unwrap();
            let got = loss.loss_and_grad_inplace(view, &y).unwrap();
            assert_eq!(bits(&got.grad), bits(&want.grad));
            let (before, after) = (base.to_vec3_f64(), memory.to_vec3_f64());
            for (a, plane) in after.iter().enumerate() {
                for (b, row) in plane.iter().enumerate() {
                    for (k, value) in row.iter().enumerate() {
                        let inside = (2..5).contains(&b) && (5..5 + width).contains(&k);
                        assert_eq!(*value == before[a][b][k], !inside, "{a} {b} {k}");
                    }
                }
            }
        }
    }
}

trait ToVec3 {
    fn to_vec3_f64(&self) -> Vec<Vec<Vec<f64>>>;
}

impl ToVec3 for Tensor {
    fn to_vec3_f64(&self) -> Vec<Vec<Vec<f64>>> {
        self.to_dtype(DType::F64).unwrap().to_vec3().unwrap()
    }
}

/// Rows whose elements are not adjacent, or that are broadcast: right by way of a copy, refused in place.
#[test]
fn views_that_need_a_copy() {
    for dtype in FLOATS {
        let base = Problem::random(9, &[21, 6], dtype, Setup::default()).logits;
        let columns = base.t().unwrap();
        let y = targets((0..6).collect(), &[6], DType::U32);
        let loss = CrossEntropy::new()
            .smoothing(0.1)
            .reduction(Reduction::None);
        let want = loss
            .loss_and_grad(&columns.force_contiguous().unwrap(), &y)
            .unwrap();
        let got = loss.loss_and_grad(&columns, &y).unwrap();
        assert_eq!(bits(&got.grad), bits(&want.grad));
        assert_eq!(got.grad.dims(), [6, 21]);
        assert_eq!(
            bits(&loss.forward(&columns, &y).unwrap()),
            bits(
                &loss
                    .forward(&columns.force_contiguous().unwrap(), &y)
                    .unwrap()
            )
        );

        let row = base.i((.., 0)).unwrap().force_contiguous().unwrap();
        let repeated = row.broadcast_as((6, 21)).unwrap();
        let got = loss.loss_and_grad(&repeated, &y).unwrap();
        let want = loss
            .loss_and_grad(&repeated.force_contiguous().unwrap(), &y)
            .unwrap();
        assert_eq!(bits(&got.grad), bits(&want.grad));

        for view in [columns, repeated] {
            let before = bits(&base);
            assert_error(
                loss.loss_and_grad_inplace(view, &y),
                &["logits: strides", "to be overwritten"],
            );
            assert_eq!(bits(&base), before);
        }
    }
}

/// The gradient reaches the tensor below a strided view of tracked logits.
#[test]
fn backward_through_views() {
    for dtype in FLOATS {
        let base =
            Var::from_tensor(&Problem::random(10, &[4, 6, 50], dtype, Setup::default()).logits)
                .unwrap();
        let y = targets((0..24).collect(), &[6, 4], DType::I64);
        let loss = CrossEntropy::new()
            .smoothing(0.25)
            .reduction(Reduction::Sum);
        let view = |t: &Tensor| t.narrow(2, 5, 37).unwrap().transpose(0, 1).unwrap();
        let gradients = loss.forward(&view(&base), &y).unwrap().backward().unwrap();
        let got = gradients.get(&base).unwrap();
        let want = loss.loss_and_grad(&view(&base), &y).unwrap().grad;
        let (got_inside, want) = (values(&view(got)), values(&want));
        for (a, e) in got_inside.iter().zip(&want) {
            assert!((a - e).abs() <= 1e-6 + ulp(*e, dtype), "{a} {e}");
        }
        assert!(
            values(&got.narrow(2, 0, 5).unwrap())
                .iter()
                .all(|&g| g == 0.0)
        );
    }
}
