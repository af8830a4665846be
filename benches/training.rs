//! Whole training steps with three losses: `cargo bench --bench training -- --out benches/results/training.json`.
//!
//! A Llama-shaped decoder of the size of llama2.c's stories15M, AdamW, random tokens, f32. candle-nn's loss and this
//! crate's two begin with the same weights and see the same batches; the benchmark fails where their losses differ.
//!
//! Without criterion: a step takes about a second, and belongs together with its memory and its loss.

use std::{fs, path::Path, process::Command, time::Instant};

use candle_core::{DType, Device, Result, Tensor, Var, bail, utils::get_num_threads};
use candle_cross_entropy::CrossEntropy;
// Those with a backward: softmax_last_dim, rms_norm and rope have none.
use candle_nn::{
    AdamW, Optimizer,
    ops::{rms_norm_slow, softmax},
    rotary_emb::rope_slow,
};
use counting_allocator::{Counting, measure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DIM: usize = 288;
const LAYERS: usize = 6;
const HEADS: usize = 6;
const HIDDEN: usize = 768;
const VOCAB: usize = 32000;
const LENGTH: usize = 256;
const BATCHES: [usize; 2] = [2, 8];

/// Steps that are left out: the allocator's, and the caches', first.
const WARM_UP: usize = 2;
const STEPS: usize = 11;

/// Of hidden states (N, D), embedding (V, D) and targets (N).
type Loss = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

const LOSSES: [(&str, Loss); 3] = [
    ("candle-nn", |hidden, embedding, targets| {
        candle_nn::loss::cross_entropy(&hidden.matmul(&embedding.t()?)?, targets)
    }),
    ("cross_entropy", |hidden, embedding, targets| {
        candle_cross_entropy::cross_entropy(&hidden.matmul(&embedding.t()?)?, targets)
    }),
    ("forward_linear", |hidden, embedding, targets| {
        CrossEntropy::new().forward_linear(hidden, embedding, None, targets)
    }),
];

/// A decoder; matrices are (in, out), and the embedding, (V, D), is the output projection too.
struct Model {
    embedding: Var,
    /// Norm, query, key, value, output; norm, gate, up, down.
    layers: Vec<([Var; 5], [Var; 4])>,
    norm: Var,
    cos: Tensor,
    sin: Tensor,
    /// −∞ where a position would see a later one.
    mask: Tensor,
}

impl Model {
    /// The same weights every time, as llama2.c draws them.
    fn new() -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(0);
        let mut normal = |rows: usize, columns: usize, std: f32| {
            let draw = |_| std * Distribution::<f32>::sample(&StandardNormal, &mut rng);
            let values: Vec<f32> = (0..rows * columns).map(draw).collect();
            Var::from_vec(values, (rows, columns), &Device::Cpu)
        };
        let ones = || Var::ones(DIM, DType::F32, &Device::Cpu);
        let (std, residual) = (0.02, 0.02 / (2.0 * LAYERS as f32).sqrt());
        let embedding = normal(VOCAB, DIM, std)?;
        let layers = (0..LAYERS).map(|_| {
            let [query, key, value] = [(); 3].map(|()| normal(DIM, DIM, std));
            let output = normal(DIM, DIM, residual)?;
            let [gate, up] = [(); 2].map(|()| normal(DIM, HIDDEN, std));
            let down = normal(HIDDEN, DIM, residual)?;
            Ok((
                [ones()?, query?, key?, value?, output],
                [ones()?, gate?, up?, down],
            ))
        });
        let layers = layers.collect::<Result<_>>()?;

        let table = |columns: usize, value: &dyn Fn(usize, usize) -> f32| {
            let row = |t: usize| (0..columns).map(move |i| value(t, i));
            let values: Vec<f32> = (0..LENGTH).flat_map(row).collect();
            Tensor::from_vec(values, (LENGTH, columns), &Device::Cpu)
        };
        let half = DIM / HEADS / 2;
        let angle = |t: usize, i: usize| t as f32 / 1e4f32.powf(i as f32 / half as f32);
        Ok(Self {
            embedding,
            layers,
            norm: ones()?,
            cos: table(half, &|t, i| angle(t, i).cos())?,
            sin: table(half, &|t, i| angle(t, i).sin())?,
            mask: table(LENGTH, &|t, i| if i > t { f32::NEG_INFINITY } else { 0.0 })?,
        })
    }

    fn vars(&self) -> Vec<Var> {
        let layers = self.layers.iter();
        let layers = layers.flat_map(|(attention, mlp)| attention.iter().chain(mlp));
        let outside = [&self.embedding, &self.norm];
        outside.into_iter().chain(layers).cloned().collect()
    }

    /// Tokens (B, T) to hidden states (B·T, D), rows throughout, so that every linear map is one matrix product.
    fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let normed = |x: &Tensor, weight: &Var| rms_norm_slow(x, weight, 1e-5);
        let mut x = self.embedding.index_select(&tokens.flatten_all()?, 0)?;
        for ([norm, query, key, value, output], [mlp_norm, gate, up, down]) in &self.layers {
            let rows = normed(&x, norm)?;
            let attended = self.attention([query, key, value], &rows)?;
            x = (x + attended.matmul(output)?)?;
            let rows = normed(&x, mlp_norm)?;
            let inside = (rows.matmul(gate)?.silu()? * rows.matmul(up)?)?;
            x = (x + inside.matmul(down)?)?;
        }
        normed(&x, &self.norm)
    }

    fn attention(&self, weights: [&Var; 3], rows: &Tensor) -> Result<Tensor> {
        let size = DIM / HEADS;
        let [query, key, value] = weights.map(|weight| {
            let heads = rows.matmul(weight)?.reshape(((), LENGTH, HEADS, size))?;
            heads.transpose(1, 2)?.contiguous()
        });
        let query = rope_slow(&query?, &self.cos, &self.sin)?;
        let key = rope_slow(&key?, &self.cos, &self.sin)?;
        let scores = (query.matmul(&key.t()?)? / (size as f64).sqrt())?;
        let seen = softmax(&scores.broadcast_add(&self.mask)?, 3)?;
        seen.matmul(&value?)?.transpose(1, 2)?.reshape(((), DIM))
    }
}

struct Training {
    model: Model,
    optimizer: AdamW,
    loss: Loss,
    seconds: Vec<f64>,
    peak: usize,
    last: f32,
}

impl Training {
    fn new(loss: Loss) -> Result<Self> {
        let model = Model::new()?;
        Ok(Self {
            optimizer: AdamW::new_lr(model.vars(), 1e-4)?,
            model,
            loss,
            seconds: Vec::new(),
            peak: 0,
            last: 0.0,
        })
    }

    /// As in candle's own trainers. Nothing of it outlives the step: candle's gradients hold the graph that they came from.
    fn step(&mut self, inputs: &Tensor, targets: &Tensor) -> Result<f32> {
        let hidden = self.model.hidden(inputs)?;
        let loss = (self.loss)(&hidden, &self.model.embedding, targets)?;
        self.optimizer.backward_step(&loss)?;
        loss.to_scalar()
    }

    fn measured_step(&mut self, inputs: &Tensor, targets: &Tensor) -> Result<()> {
        let start = Instant::now();
        let (loss, usage) = measure(|| self.step(inputs, targets));
        self.seconds.push(start.elapsed().as_secs_f64());
        self.peak = self.peak.max(usage.peak);
        self.last = loss?;
        Ok(())
    }

    fn median_ms(&self) -> f64 {
        let mut seconds = self.seconds[WARM_UP..].to_vec();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2] * 1e3
    }
}

/// The three trainings take turns, so that whatever else the machine does falls on all of them.
fn train(batch: usize) -> Result<Vec<Training>> {
    let trainings = LOSSES.iter().map(|(_, loss)| Training::new(*loss));
    let mut trainings = trainings.collect::<Result<Vec<_>>>()?;
    let mut rng = StdRng::seed_from_u64(1);
    for step in 0..WARM_UP + STEPS {
        let draw = |_| rng.random_range(0..VOCAB as u32);
        let tokens: Vec<u32> = (0..batch * (LENGTH + 1)).map(draw).collect();
        let tokens = Tensor::from_vec(tokens, (batch, LENGTH + 1), &Device::Cpu)?;
        let inputs = tokens.narrow(1, 0, LENGTH)?;
        let targets = tokens.narrow(1, 1, LENGTH)?.flatten_all()?;
        for training in &mut trainings {
            training.measured_step(&inputs, &targets)?;
        }
        // Else they would not have done the same work.
        let losses: Vec<f32> = trainings.iter().map(|training| training.last).collect();
        let near = |loss: &f32| (loss - losses[0]).abs() <= 1e-6 * losses[0];
        assert!(losses.iter().all(near), "step {step}: {losses:?}");
    }
    Ok(trainings)
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().into())
}

/// What scripts/bench-results.py says of the other benchmarks.
fn circumstances() -> Result<String> {
    let commit = output("git", &["describe", "--always", "--dirty"])?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let cpu = model.and_then(|line| line.split(": ").nth(1));
    let cpu = cpu.unwrap_or("unknown");
    let (threads, date) = (get_num_threads(), output("date", &["+%F"])?);
    Ok(format!(
        r#""commit": {commit:?}, "cpu": {cpu:?}, "threads": {threads}, "date": {date:?}"#
    ))
}

fn main() -> Result<()> {
    // cargo says --bench itself.
    let mut arguments = std::env::args().skip(1).filter(|it| it != "--bench");
    let out = match [(); 3].map(|()| arguments.next()) {
        [None, ..] => None,
        [Some(option), Some(path), None] if option == "--out" => Some(path),
        _ => bail!("usage: cargo bench --bench training [-- --out FILE]"),
    };
    let circumstances = circumstances()?;
    let mut records = Vec::new();
    println!(" rows loss            s a step    MiB   last loss");
    for batch in BATCHES {
        for ((name, _), training) in LOSSES.iter().zip(train(batch)?) {
            let (n, ms, loss) = (batch * LENGTH, training.median_ms(), training.last);
            let mib = training.peak as f64 / f64::from(1 << 20);
            println!("{n:5} {name:14} {:9.3} {mib:6.0} {loss:11.6}", ms / 1e3);
            records.push(format!(
                r#"{{"bench": "training", "impl": {name:?}, "n": {n}, "d": {DIM}, "v": {VOCAB}, "dtype": "f32", "median_ms": {ms:.3}, "peak_mib": {mib:.1}, "last_loss": {loss}, "steps": {STEPS}, {circumstances}}}"#
            ));
        }
    }
    if let Some(path) = out {
        // From the root, where the command is given: cargo runs a benchmark in its package's folder.
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        fs::write(root.join(path), format!("[\n{}\n]\n", records.join(",\n")))?;
    }
    Ok(())
}
