//! `forward_linear` against the f64 reference of the whole logits, and against a model that computes them whole: over
//! types, options, tiles, budgets and both ways of cutting.

use crate::{accuracy::ulp, common::*};
use candle_core::{DType, Result, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, RowStats, Targets};

const REDUCTIONS: [Reduction; 4] = [
    Reduction::Mean,
    Reduction::None,
    Reduction::Sum,
    Reduction::SumOver(3.5),
];

/// Hidden states, projection and targets; the upstream gradient of `Reduction::None`.
#[derive(Clone)]
pub struct Linear {
    pub setup: Setup,
    pub hidden: Tensor,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    targets: Tensor,
    pub distribution: Option<Targets>,
    upstream: Tensor,
}

/// Loss, statistics, and gradients of hidden, weight and bias.
pub struct Results {
    pub loss: Tensor,
    pub stats: RowStats,
    pub gradients: Vec<Tensor>,
}

impl Linear {
    /// `rows` is the targets' shape, `depth` D, and the vocabulary comes with the setup's problem.
    pub fn new(problem: Problem, depth: usize, bias: bool, seed: u64) -> Self {
        let mut rng = rng(seed);
        let (&width, rows) = problem.logits.dims().split_last().unwrap();
        let dtype = problem.logits.dtype();
        let count: usize = rows.iter().product();
        let mut random = |shape: &[usize], deviation: f64| {
            let values = normal(&mut rng, shape.iter().product(), deviation);
            tensor(values, shape, dtype)
        };
        Self {
            hidden: random(&[rows, &[depth]].concat(), 1.0),
            weight: random(&[width, depth], 3.0 / (depth as f64).sqrt()),
            bias: bias.then(|| random(&[width], 1.0)),
            upstream: tensor(normal(&mut rng, count, 1.0), rows, loss_dtype(dtype)),
            targets: problem.targets,
            distribution: problem.distribution,
            setup: problem.setup,
        }
    }

    fn everything(seed: u64, shape: &[usize], dtype: DType, reduction: Reduction) -> Self {
        let problem = Problem::everything(seed, shape, dtype, reduction);
        Self::new(problem, 24, seed.is_multiple_of(2), seed)
    }

    fn plain(seed: u64, shape: &[usize], dtype: DType) -> Self {
        let setup = Setup {
            eps: Eps::Uniform(0.1),
            ..Setup::default()
        };
        Self::new(Problem::random(seed, shape, dtype, setup), 24, false, seed)
    }

    fn given(&self) -> Targets {
        let classes = || Targets::Classes(self.targets.clone());
        self.distribution.clone().unwrap_or_else(classes)
    }

    pub fn loss(&self) -> CrossEntropy {
        self.setup.build(self.targets.dims())
    }

    fn variables(&self) -> Vec<Var> {
        let all = [Some(&self.hidden), Some(&self.weight), self.bias.as_ref()];
        all.into_iter()
            .flatten()
            .map(|tensor| Var::from_tensor(tensor).unwrap())
            .collect()
    }

    /// What `loss` gives with variables for all arguments.
    pub fn run(&self, loss: &CrossEntropy) -> Results {
        let variables = self.variables();
        let bias = variables.get(2).map(|bias| bias.as_tensor());
        let (value, stats) = loss
            .forward_linear_with_stats(&variables[0], &variables[1], bias, self.given())
            .unwrap();
        let plain = loss
            .forward_linear(&variables[0], &variables[1], bias, self.given())
            .unwrap();
        // Rows of weight 0 take part in products only where they have statistics, so bits may differ.
        assert_all_close(&plain, &value, 1e-6);
        let gradients = self.gradients(&value, &variables);
        Results {
            loss: value,
            stats,
            gradients,
        }
    }

    fn gradients(&self, loss: &Tensor, variables: &[Var]) -> Vec<Tensor> {
        let gradients = match self.setup.reduction {
            Reduction::None => (loss * &self.upstream)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward(),
            _ => loss.backward(),
        }
        .unwrap();
        variables
            .iter()
            .map(|variable| gradients.get(variable).expect("a gradient").clone())
            .collect()
    }

    /// Everything in f64: logits, the reference, and the chain rule.
    pub fn exact(&self) -> Results {
        let f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
        let (width, depth) = self.weight.dims2().unwrap();
        let rows = self.targets.elem_count();
        let hidden = f64(&self.hidden).reshape((rows, depth)).unwrap();
        let weight = f64(&self.weight);
        let mut logits = hidden.matmul(&weight.t().unwrap()).unwrap();
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(&f64(bias)).unwrap();
        }
        let logits = logits
            .reshape([self.targets.dims(), &[width]].concat())
            .unwrap();
        let LossAndGrad { loss, grad, stats } =
            self.loss().reference(&logits, self.given()).unwrap();
        let mut grad = grad.reshape((rows, width)).unwrap();
        if self.setup.reduction == Reduction::None {
            let upstream = f64(&self.upstream).reshape((rows, 1)).unwrap();
            grad = grad.broadcast_mul(&upstream).unwrap();
        }
        let mut gradients = vec![
            grad.matmul(&weight)
                .unwrap()
                .reshape(self.hidden.dims())
                .unwrap(),
            grad.t().unwrap().matmul(&hidden).unwrap(),
        ];
        if self.bias.is_some() {
            gradients.push(grad.sum(0).unwrap());
        }
        Results {
            loss,
            stats,
            gradients,
        }
    }

    /// The unfused path: a product in f32 (f64 for f64), logits rounded to the type, [`CrossEntropy::forward`], and
    /// products of its gradient, rounded once.
    fn unfused(&self) -> Vec<Tensor> {
        let dtype = self.hidden.dtype();
        let wide = loss_dtype(dtype);
        let widen = |tensor: &Tensor| tensor.to_dtype(wide).unwrap();
        let (width, depth) = self.weight.dims2().unwrap();
        let rows = self.targets.elem_count();
        let hidden = widen(&self.hidden).reshape((rows, depth)).unwrap();
        let weight = widen(&self.weight);
        let mut logits = hidden.matmul(&weight.t().unwrap()).unwrap();
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(&widen(bias)).unwrap();
        }
        let logits = logits
            .reshape([self.targets.dims(), &[width]].concat())
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let LossAndGrad { grad, .. } = self.loss().loss_and_grad(&logits, &self.targets).unwrap();
        let grad = widen(&grad).reshape((rows, width)).unwrap();
        let narrow = |tensor: Tensor| tensor.to_dtype(dtype).unwrap();
        vec![
            narrow(
                grad.matmul(&weight)
                    .unwrap()
                    .reshape(self.hidden.dims())
                    .unwrap(),
            ),
            narrow(grad.t().unwrap().matmul(&hidden).unwrap()),
        ]
    }

    /// Compares with [`exact`](Self::exact): loss and statistics as a product in f32 allows, gradients to the same plus
    /// the one rounding to their type.
    #[track_caller]
    pub fn check(&self, actual: &Results, expected: &Results, context: &str) {
        let dtype = self.hidden.dtype();
        let noise = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
        assert_eq!(actual.loss.dtype(), loss_dtype(dtype), "{context}");
        assert_all_close(&actual.loss, &expected.loss, noise);
        let (a, e) = (&actual.stats, &expected.stats);
        let stats = [
            (&a.nll, &e.nll),
            (&a.lse, &e.lse),
            (&a.entropy, &e.entropy),
            (&a.max_prob, &e.max_prob),
            (&a.grad_norm_sq, &e.grad_norm_sq),
        ];
        for (a, e) in stats {
            assert_eq!(a.dtype(), loss_dtype(dtype), "{context}");
            assert_all_close(a, e, noise);
        }
        assert_eq!(bits(&a.predicted), bits(&e.predicted), "{context}");
        assert_eq!(actual.gradients.len(), expected.gradients.len());
        let names = ["hidden", "weight", "bias"];
        for ((a, e), name) in actual.gradients.iter().zip(&expected.gradients).zip(names) {
            assert_eq!((a.dims(), a.dtype()), (e.dims(), dtype));
            let expected = values(e);
            let largest = expected.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
            for (a, e) in values(a).into_iter().zip(expected) {
                let rounding = if matches!(dtype, DType::F16 | DType::BF16) {
                    0.5 * ulp(e, dtype)
                } else {
                    0.0
                };
                let error = (a - e).abs();
                assert!(
                    error <= rounding * 1.01 + noise * largest,
                    "{context}: gradient of {name}: {a}, must be {e}"
                );
            }
        }
    }
}

fn result_bits(results: &Results) -> Vec<Vec<u64>> {
    let mut all = stats_bits(&results.stats);
    all.push(bits(&results.loss));
    all.extend(results.gradients.iter().map(bits));
    all
}

/// One class at a time; a few; all at once. Rows above and below the number of classes.
#[test]
fn every_option_type_tile_and_budget() {
    for dtype in FLOATS {
        for (seed, shape) in [
            (0, vec![3, 5, 41]),
            (1, vec![9, 300]),
            (2, vec![90, 17]),
            (3, vec![1, 2100]),
        ] {
            let rows: usize = shape[..shape.len() - 1].iter().product();
            let width = shape[shape.len() - 1];
            for reduction in REDUCTIONS {
                let linear = Linear::everything(seed, &shape, dtype, reduction);
                let expected = linear.exact();
                let logit = if dtype == DType::F64 { 8 } else { 4 };
                let short = rows.min(width) * logit;
                let tiles = [0, 7 * short, 100 * short, usize::MAX];
                let whole = rows * width * logit;
                for tile in tiles {
                    let loss = linear.loss().tile_bytes(tile);
                    let mut bits = None;
                    for budget in [0, whole / 2, whole] {
                        let results = linear.run(&loss.clone().memory_budget(budget));
                        let context = format!("{dtype:?} {shape:?} {reduction:?}, tiles of {tile}");
                        linear.check(&results, &expected, &context);
                        let first = bits.get_or_insert_with(|| result_bits(&results));
                        assert!(
                            *first == result_bits(&results),
                            "{context}: bits depend on the budget"
                        );
                    }
                }
                linear.check(&linear.run(&linear.loss()), &expected, "defaults");
            }
        }
    }
}

/// Without any option, and with each that changes what a tile does.
#[test]
fn options_one_by_one() {
    let plain = Setup::default;
    let setups = [
        plain(),
        Setup {
            eps: Eps::Uniform(0.3),
            ..plain()
        },
        Setup {
            eps: Eps::Uniform(1.0),
            ..plain()
        },
        Setup {
            softcap: Some(5.0),
            ..plain()
        },
        Setup {
            z_loss: 0.1,
            ..plain()
        },
        Setup {
            scale: 0.5,
            ..plain()
        },
        Setup {
            vocab: Some(70),
            ..plain()
        },
    ];
    for dtype in FLOATS {
        for setup in &setups {
            for (rows, bias) in [(7, true), (130, false)] {
                let problem = Problem::random(5, &[rows, 101], dtype, setup.clone());
                let linear = Linear::new(problem, 16, bias, 5);
                let expected = linear.exact();
                for tile in [3000, usize::MAX] {
                    let loss = linear.loss().tile_bytes(tile).memory_budget(0);
                    linear.check(&linear.run(&loss), &expected, &format!("{setup:?}"));
                }
            }
        }
    }
}

/// Every kind of target with values of the classes and a weight of the entropy, whichever tile the classes are in.
#[test]
fn target_distributions() {
    let kinds = [
        None,
        Some(Kind::Probabilities(DType::F32)),
        Some(Kind::TopK(1)),
        Some(Kind::TopK(40)),
    ];
    for dtype in FLOATS {
        for (seed, shape) in [
            (0, vec![3, 5, 41]),
            (1, vec![9, 300]),
            (2, vec![90, 17]),
            (3, vec![1, 2100]),
        ] {
            for (kind, reduction) in kinds.into_iter().zip(REDUCTIONS) {
                for general in [true, false] {
                    let mut problem = match general {
                        true => Problem::everything(seed, &shape, dtype, reduction).general(seed),
                        false => Problem::random(seed, &shape, dtype, Setup::default()),
                    };
                    if let Some(kind) = kind {
                        problem = problem.with(kind, seed);
                    }
                    let linear = Linear::new(problem, 24, seed.is_multiple_of(2), seed);
                    let expected = linear.exact();
                    for (tile, budget) in
                        [(0, 0), (3000, 4000), (3000, usize::MAX), (usize::MAX, 0)]
                    {
                        let loss = linear.loss().tile_bytes(tile).memory_budget(budget);
                        let context = format!("{dtype:?} {shape:?} {kind:?}, tiles of {tile}");
                        linear.check(&linear.run(&loss), &expected, &context);
                    }
                }
            }
        }
    }
}

/// Root mean square of the differences from the exact gradients.
fn error(actual: &Tensor, exact: &Tensor) -> f64 {
    let (a, e) = (values(actual), values(exact));
    let sum: f64 = a.iter().zip(&e).map(|(a, e)| (a - e).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

/// At sizes where rounding once a tile, or sums kept in a narrow type, would show. Not for f64, in which the exact
/// gradients are computed as well.
#[test]
fn errors_are_no_larger_than_those_of_one_unfused_pass() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for shape in [[64, 8192], [4096, 256]] {
            let linear = Linear::plain(9, &shape, dtype);
            let exact = linear.exact();
            let tile = shape[0].min(shape[1]) * 128 * 4;
            let fused = linear.run(&linear.loss().tile_bytes(tile).memory_budget(0));
            let unfused = linear.unfused();
            for (i, name) in ["hidden", "weight"].iter().enumerate() {
                let ours = error(&fused.gradients[i], &exact.gradients[i]);
                let theirs = error(&unfused[i], &exact.gradients[i]);
                println!("{dtype:?} {shape:?} {name}: {ours:e}, unfused {theirs:e}");
                // f32 sums of tiles are sums in another order, as good or bad as the unfused.
                assert!(
                    ours <= 1.15 * theirs,
                    "{dtype:?} {shape:?}: gradient of {name} off by {ours:e}, unfused by {theirs:e}"
                );
            }
        }
    }
}

/// A view (D, V)ᵀ, rows of a larger table, hidden states without the last of each sequence.
#[test]
fn views() {
    for dtype in FLOATS {
        let linear = Linear::plain(2, &[2, 6, 50], dtype);
        let expected = result_bits(&linear.run(&linear.loss()));
        let (hidden, weight) = (&linear.hidden, &linear.weight);
        let results = |hidden: &Tensor, weight: &Tensor| {
            let (loss, stats) = linear
                .loss()
                .forward_linear_with_stats(hidden, weight, None, &linear.targets)
                .unwrap();
            (loss, stats)
        };
        let transposed = Var::from_tensor(&weight.t().unwrap().contiguous().unwrap()).unwrap();
        let (loss, _) = results(hidden, &transposed.t().unwrap());
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(&transposed).unwrap().t().unwrap();
        assert_all_close(&gradient, &linear.exact().gradients[1], 0.01);

        let table = Tensor::cat(&[weight, weight, weight], 0).unwrap();
        let table = Var::from_tensor(&table).unwrap();
        let (loss, stats) = results(hidden, &table.narrow(0, 50, 50).unwrap());
        assert_eq!(bits(&loss), expected[6]);
        assert_eq!(stats_bits(&stats), expected[..6]);
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(&table).unwrap();
        assert_eq!(
            bits(&gradient.narrow(0, 50, 50).unwrap()),
            expected[8],
            "{dtype:?}"
        );
        assert!(
            values(&gradient.narrow(0, 0, 50).unwrap())
                .iter()
                .all(|&g| g == 0.0)
        );

        let longer = Tensor::cat(&[hidden, hidden], 1).unwrap();
        let longer = Var::from_tensor(&longer).unwrap();
        let (loss, stats) = results(&longer.narrow(1, 0, 6).unwrap(), weight);
        assert_eq!(bits(&loss), expected[6]);
        assert_eq!(stats_bits(&stats), expected[..6]);
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(&longer).unwrap();
        assert_eq!(bits(&gradient.narrow(1, 0, 6).unwrap()), expected[7]);

        // Every column of a transposed hidden, and a row that is repeated.
        let columns = hidden.reshape((12, 24)).unwrap().t().unwrap();
        let columns = columns.contiguous().unwrap().t().unwrap();
        let targets = linear.targets.flatten_all().unwrap();
        let loss = linear
            .loss()
            .forward_linear(&columns, weight, None, &targets)
            .unwrap();
        assert_close(scalar(&loss), scalar(&linear.exact().loss), 1e-5);
        let repeated = hidden.narrow(0, 0, 1).unwrap().narrow(1, 0, 1).unwrap();
        let broadcast = repeated.broadcast_as((2, 6, 24)).unwrap();
        let copied = broadcast.contiguous().unwrap();
        assert_eq!(
            bits(&results(&broadcast, weight).0),
            bits(&results(&copied, weight).0)
        );
    }
}

/// A table that is embedding and projection at once gets the sum of both gradients.
#[test]
fn weight_shared_with_the_embedding() {
    let linear = Linear::plain(3, &[10, 40], DType::F32);
    let table = Var::from_tensor(&linear.weight).unwrap();
    let tokens = Tensor::arange(5u32, 15, CPU).unwrap();
    let gradient = |hidden: &Tensor, weight: &Tensor| {
        let loss = linear
            .loss()
            .forward_linear(hidden, weight, None, &linear.targets);
        loss.unwrap().backward().unwrap().remove(&table)
    };
    let embedded = table.index_select(&tokens, 0).unwrap();
    let both = gradient(&embedded, &table).unwrap();
    let detached = table.detach();
    let as_embedding = gradient(&embedded, &detached).unwrap();
    let as_weight = gradient(&embedded.detach(), &table).unwrap();
    assert_all_close(&both, &(as_embedding + as_weight).unwrap(), 1e-6);
}

/// Frozen arguments take no gradient, and a loss without any keeps nothing.
#[test]
fn only_what_is_tracked_gets_a_gradient() {
    let linear = Linear::everything(0, &[6, 40], DType::F32, Reduction::Mean);
    let expected = linear.run(&linear.loss()).gradients;
    for tracked in 0..3 {
        let mut arguments = [
            linear.hidden.clone(),
            linear.weight.clone(),
            linear.bias.clone().unwrap(),
        ];
        let variable = Var::from_tensor(&arguments[tracked]).unwrap();
        arguments[tracked] = variable.as_tensor().clone();
        let [hidden, weight, bias] = &arguments;
        let (loss, _) = linear
            .loss()
            .forward_linear_with_stats(hidden, weight, Some(bias), &linear.targets)
            .unwrap();
        let gradients = loss.backward().unwrap();
        assert_eq!(
            bits(gradients.get(&variable).unwrap()),
            bits(&expected[tracked])
        );
        for (i, argument) in arguments.iter().enumerate() {
            assert_eq!(gradients.get(argument).is_some(), i == tracked);
        }
    }
    let loss = linear.loss().forward_linear(
        &linear.hidden,
        &linear.weight,
        linear.bias.as_ref(),
        &linear.targets,
    );
    assert!(!loss.unwrap().track_op());
}

/// The first backward uses the kept logits up; a second computes them again.
#[test]
fn backward_twice() {
    for budget in [0, usize::MAX] {
        let linear = Linear::everything(1, &[6, 300], DType::BF16, Reduction::Mean);
        let loss = linear.loss().memory_budget(budget).tile_bytes(6 * 64 * 4);
        let variables = linear.variables();
        let value = loss
            .forward_linear(&variables[0], &variables[1], None, &linear.targets)
            .unwrap();
        let first = linear.gradients(&value, &variables);
        let second = linear.gradients(&value, &variables);
        for (first, second) in first.iter().zip(&second) {
            assert_eq!(bits(first), bits(second));
        }
    }
}

/// Most rows of a prompt: what is left is as without them, in every shape of result, and they read nothing.
#[test]
fn rows_without_a_loss_take_no_part() {
    for dtype in FLOATS {
        for reduction in REDUCTIONS {
            let mut linear = Linear::everything(4, &[16, 60], dtype, reduction);
            linear.setup.ignore = -100;
            let kept = [2usize, 3, 9, 13];
            let mut y: Vec<i64> = linear.targets.to_vec1().unwrap();
            let mut hidden = values(&linear.hidden);
            for i in (0..16).filter(|i| !kept.contains(i)) {
                y[i] = -100;
                hidden[i * 24..(i + 1) * 24].fill(f64::NAN);
            }
            linear.targets = targets(y, &[16], DType::I64);
            linear.hidden = tensor(hidden, &[16, 24], dtype);
            let mut alone = linear.clone();
            let ids = Tensor::new(kept.map(|i| i as u32).to_vec(), CPU).unwrap();
            let select = |tensor: &Tensor| tensor.index_select(&ids, 0).unwrap();
            alone.hidden = select(&linear.hidden);
            alone.targets = select(&linear.targets);
            alone.upstream = select(&linear.upstream);
            let (Eps::PerRow(eps), Some(weights)) = (&linear.setup.eps, &linear.setup.weights)
            else {
                unreachable!()
            };
            alone.setup.eps = Eps::PerRow(kept.map(|i| eps[i]).to_vec());
            alone.setup.weights = Some(kept.map(|i| weights[i]).to_vec());

            let (all, alone) = (linear.run(&linear.loss()), alone.run(&alone.loss()));
            let scattered = |name: &str, all: &Tensor, alone: &Tensor| {
                assert_eq!(
                    bits(&select(all)),
                    bits(alone),
                    "{name}, {dtype:?} {reduction:?}"
                );
                let sums = |tensor: &Tensor| values(tensor).iter().map(|v| v.abs()).sum::<f64>();
                assert_close(sums(all), sums(alone), 1e-12);
            };
            if reduction == Reduction::None {
                scattered("loss", &all.loss, &alone.loss);
            } else {
                assert_eq!(bits(&all.loss), bits(&alone.loss));
            }
            scattered("nll", &all.stats.nll, &alone.stats.nll);
            scattered("lse", &all.stats.lse, &alone.stats.lse);
            scattered("entropy", &all.stats.entropy, &alone.stats.entropy);
            scattered("max_prob", &all.stats.max_prob, &alone.stats.max_prob);
            scattered("norm", &all.stats.grad_norm_sq, &alone.stats.grad_norm_sq);
            scattered("predicted", &all.stats.predicted, &alone.stats.predicted);
            scattered("hidden", &all.gradients[0], &alone.gradients[0]);
            assert_eq!(bits(&all.gradients[1]), bits(&alone.gradients[1]));
        }
    }
}

/// Rows of weight 0: loss and gradient 0 whatever they hold, statistics where they are asked for.
#[test]
fn rows_of_weight_0() {
    let mut linear = Linear::plain(6, &[4, 30], DType::F32);
    let mut hidden = values(&linear.hidden);
    hidden[..24].fill(f64::INFINITY);
    linear.hidden = tensor(hidden, &[4, 24], DType::F32);
    linear.setup.weights = Some(vec![0.0, 1.0, 0.0, 2.0]);
    linear.setup.reduction = Reduction::None;
    let variables = linear.variables();
    let run = || {
        linear
            .loss()
            .forward_linear(&variables[0], &variables[1], None, &linear.targets)
    };
    let loss = run().unwrap();
    let losses = values(&loss);
    assert_eq!((losses[0], losses[2]), (0.0, 0.0));
    assert!(losses[1] > 0.0 && losses[3] > 0.0);
    let gradients = linear.gradients(&loss, &variables);
    assert!(gradients.iter().flat_map(values).all(f64::is_finite));
    assert!(values(&gradients[0])[..24].iter().all(|&g| g == 0.0));
    let (_, stats) = linear
        .loss()
        .forward_linear_with_stats(&variables[0], &variables[1], None, &linear.targets)
        .unwrap();
    assert!(values(&stats.nll)[0].is_nan());
    assert_close(
        values(&stats.nll)[2],
        values(&linear.exact().stats.nll)[2],
        1e-5,
    );
}

/// No rows, none that counts: loss 0, gradients 0, no statistics.
#[test]
fn nothing_to_do() {
    for dtype in FLOATS {
        for reduction in REDUCTIONS {
            for rows in [0, 5] {
                let mut setup = Setup {
                    reduction,
                    ..Setup::default()
                };
                setup.eps = Eps::Uniform(0.1);
                let problem = Problem::random(1, &[rows, 20], dtype, setup);
                let mut linear = Linear::new(problem, 8, true, 1);
                linear.targets = targets(vec![-100; rows], &[rows], DType::I64);
                let variables = linear.variables();
                let bias = variables[2].as_tensor();
                let (loss, stats) = linear
                    .loss()
                    .forward_linear_with_stats(
                        &variables[0],
                        &variables[1],
                        Some(bias),
                        &linear.targets,
                    )
                    .unwrap();
                assert_eq!(
                    loss.dims(),
                    if reduction == Reduction::None {
                        vec![rows]
                    } else {
                        vec![]
                    }
                );
                assert!(values(&loss).iter().all(|&loss| loss == 0.0));
                assert_eq!(stats.predicted.dims(), [rows]);
                assert!(values(&stats.lse).iter().all(|&lse| lse == 0.0));
                if rows == 0 {
                    continue; // candle has no sum over nothing to start a backward from
                }
                let gradients = linear.gradients(&loss, &variables);
                assert!(gradients.iter().flat_map(values).all(|g| g == 0.0));
            }
        }
    }
}

/// A bias of −inf masks its class in every row; NaN in a hidden state makes its row NaN and no other.
#[test]
fn special_values() {
    for dtype in FLOATS {
        let mut linear = Linear::everything(0, &[5, 80], dtype, Reduction::None);
        linear.setup.softcap = None;
        linear.setup.weights = None;
        let mut bias = values(linear.bias.as_ref().unwrap());
        let targets: Vec<i64> = linear.targets.to_vec1().unwrap();
        for class in (0..80)
            .step_by(3)
            .filter(|&k| !targets.contains(&(k as i64)))
        {
            bias[class] = f64::NEG_INFINITY;
        }
        linear.bias = Some(tensor(bias, &[80], dtype));
        let expected = linear.exact();
        let logit = if dtype == DType::F64 { 8 } else { 4 };
        for tile in [1, 9 * 5 * logit, usize::MAX] {
            let results = linear.run(&linear.loss().tile_bytes(tile));
            linear.check(&results, &expected, "masked classes");
        }

        let mut hidden = values(&linear.hidden);
        hidden[2 * 24 + 5] = f64::NAN;
        linear.hidden = tensor(hidden, &[5, 24], dtype);
        let results = linear.loss().tile_bytes(7 * 5 * logit);
        let (loss, stats) = results
            .forward_linear_with_stats(
                &linear.hidden,
                &linear.weight,
                linear.bias.as_ref(),
                &linear.targets,
            )
            .unwrap();
        for (i, (loss, expected)) in values(&loss)
            .into_iter()
            .zip(values(&expected.loss))
            .enumerate()
        {
            if i == 2 {
                assert!(loss.is_nan());
            } else {
                assert_close(loss, expected, 1e-5);
            }
        }
        assert!(values(&stats.entropy)[2].is_nan());
        assert_eq!(values(&stats.predicted)[2], 0.0);
    }
}

#[test]
fn bad_input() {
    let linear = Linear::plain(1, &[2, 3, 10], DType::F32);
    let Linear {
        hidden,
        weight,
        targets: y,
        ..
    } = &linear;
    let with = |loss: CrossEntropy,
                hidden: &Tensor,
                weight: &Tensor,
                bias: Option<&Tensor>|
     -> Result<Tensor> { loss.forward_linear(hidden, weight, bias, y) };
    let run = |hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
        with(CrossEntropy::new(), hidden, weight, bias)
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, CPU).unwrap();
    let f32 = |shape: &[usize]| zeros(shape, DType::F32);
    assert_error(run(&f32(&[]), weight, None), &["hidden", "[]"]);
    assert_error(
        run(&f32(&[2, 3, 0]), weight, None),
        &["hidden", "at least 1"],
    );
    assert_error(
        run(hidden, &f32(&[10, 23]), None),
        &["weight", "[10, 23]", "(V, 24)"],
    );
    assert_error(run(hidden, &f32(&[10]), None), &["weight", "[10]"]);
    assert_error(run(hidden, &f32(&[0, 24]), None), &["weight", "[0, 24]"]);
    assert_error(
        run(hidden, weight, Some(&f32(&[11]))),
        &["bias", "[11]", "[10]"],
    );
    assert_error(
        run(hidden, &zeros(&[10, 24], DType::BF16), None),
        &["weight", "bf16", "f32"],
    );
    assert_error(
        run(hidden, weight, Some(&zeros(&[10], DType::F64))),
        &["bias", "f64", "f32"],
    );
    let integers = zeros(&[2, 3, 24], DType::U32);
    assert_error(
        run(&integers, &zeros(&[10, 24], DType::U32), None),
        &["hidden", "u32"],
    );
    assert_error(
        run(&f32(&[2, 4, 24]), weight, None),
        &["targets", "[2, 3]", "[2, 4]", "hidden"],
    );
    assert_error(
        with(CrossEntropy::new().vocab_size(11), hidden, weight, None),
        &["vocab_size", "11", "10"],
    );
    // Values, named by their row among all.
    let ignored = -100;
    let y = targets(vec![ignored, 0, ignored, 1, 10, 11], &[2, 3], DType::I64);
    let loss = CrossEntropy::new();
    assert_error(
        loss.forward_linear(hidden, weight, None, &y),
        &["targets", "row 4", "10"],
    );
    let y = targets(vec![ignored, 0, ignored, 1, 2, 3], &[2, 3], DType::I64);
    let weights = tensor(vec![-1.0, 1.0, 1.0, -2.0, 1.0, 1.0], &[2, 3], DType::F32);
    assert_error(
        loss.clone()
            .row_weights(&weights)
            .forward_linear(hidden, weight, None, &y),
        &["row_weights", "row 3", "-2"],
    );
    let eps = tensor(vec![2.0, 0.5, f64::NAN, 0.0, 0.0, 1.5], &[2, 3], DType::F32);
    assert_error(
        loss.smoothing(&eps)
            .forward_linear(hidden, weight, None, &y),
        &["smoothing", "row 5", "1.5"],
    );
}
