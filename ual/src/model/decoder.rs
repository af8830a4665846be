//! A decoder-only transformer of the Llama family: pre-norm, RMSNorm, rotary positions, grouped queries, SwiGLU; with
//! biases as Qwen 2 has them, and norms of queries and keys as Qwen 3 has them. For training, and for reading from
//! quantised weights.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Normal};

use crate::{
    data::packing::{Packing, Spans},
    model::{
        attention::{Attention, Rotation},
        fused::{rms_norm, swiglu},
        linear::{Affine, Linear},
        states::States,
    },
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    pub vocab: usize,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    /// Keys and values are shared by heads / kv_heads queries.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_size: usize,
    /// Width inside the SwiGLU.
    pub hidden: usize,
    pub max_tokens: usize,
    pub rope_base: f32,
    /// Which elements of a head rotate together: neighbours, as in GGUF files, or halves, as in Hugging Face's.
    pub rope_interleaved: bool,
    pub norm_epsilon: f32,
}

impl Config {
    /// A small model of its own.
    pub fn small(
        vocab: usize,
        (dim, layers, heads): (usize, usize, usize),
        max_tokens: usize,
    ) -> Self {
        Self {
            vocab,
            dim,
            layers,
            heads,
            kv_heads: heads,
            head_size: dim / heads,
            // Two thirds of the usual 4·dim, because SwiGLU has three matrices where an MLP has two; a multiple of 8.
            hidden: (dim * 8 / 3).next_multiple_of(8),
            max_tokens,
            rope_base: 10_000.0,
            rope_interleaved: false,
            norm_epsilon: 1e-6,
        }
    }

    /// Width of all queries.
    pub fn q_dim(&self) -> usize {
        self.head_size * self.heads
    }

    /// Width of all keys, and of all values.
    pub fn kv_dim(&self) -> usize {
        self.head_size * self.kv_heads
    }
}

struct Layer {
    attention_norm: Tensor,
    qkv: Linear,
    /// (head_size) each.
    qk_norm: Option<[Tensor; 2]>,
    output: Linear,
    mlp_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

/// A layer's weights as they come from a file.
#[derive(Clone)]
pub struct LayerWeights {
    pub attention_norm: Tensor,
    /// From dim to q_dim + 2·kv_dim.
    pub qkv: Affine,
    /// Of queries and of keys, (head_size) each.
    pub qk_norm: Option<[Tensor; 2]>,
    pub output: Affine,
    pub mlp_norm: Tensor,
    /// From dim to 2·hidden.
    pub gate_up: Affine,
    pub down: Affine,
}

/// A model's weights as they come from a file.
#[derive(Clone)]
pub struct Weights {
    /// (V, D)
    pub embedding: Tensor,
    pub layers: Vec<LayerWeights>,
    pub norm: Tensor,
    /// (V, D); none where the embedding serves.
    pub projection: Option<Tensor>,
    /// By how much slower the elements of half a head turn, where a file says so.
    pub rope_factors: Option<Vec<f32>>,
}

/// What is trained of given weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trained {
    All,
    Nothing,
    /// Low-rank adapters of every matrix of the layers: queries, keys and values are one, gate and up are one.
    Lora {
        rank: usize,
        scale: f64,
    },
}

/// That of the layers only the last are trained. The embedding and the output projection are not; the final norm is as the
/// layers' weights are.
#[derive(Clone)]
pub struct Last {
    /// From 1 to the number of layers.
    pub layers: usize,
    /// Where what enters the first of them is kept; none where it is computed each time.
    pub states: Option<Arc<States>>,
}

pub struct Decoder {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    /// How many layers come before the first that is trained.
    frozen: usize,
    /// What enters that one, where it is kept.
    states: Option<Arc<States>>,
    norm: Tensor,
    /// (V, D); the embedding where the two are tied.
    projection: Tensor,
    tied: bool,
    /// See [`trained_projection`](Self::trained_projection).
    trained_projection: Option<(Var, usize)>,
    rotation: Arc<Rotation>,
    vars: Vec<Var>,
}

/// Seeded initial weights. candle cannot seed its CPU generator, so the numbers are drawn here.
struct Init<'a> {
    rng: StdRng,
    device: &'a Device,
    vars: Vec<Var>,
}

impl<'a> Init<'a> {
    fn new(seed: u64, device: &'a Device) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            device,
            vars: Vec::new(),
        }
    }

    fn var(&mut self, values: &Tensor) -> Result<Var> {
        let var = Var::from_tensor(values)?;
        self.vars.push(var.clone());
        Ok(var)
    }

    fn normal(&mut self, rows: usize, columns: usize, std: f64) -> Result<Var> {
        let normal = Normal::new(0.0, std).expect("std is finite");
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| normal.sample(&mut self.rng) as f32)
            .collect();
        let values = Tensor::from_vec(values, (rows, columns), self.device)?;
        self.var(&values)
    }

    fn ones(&mut self, dim: usize) -> Result<Tensor> {
        let ones = Tensor::ones(dim, DType::F32, self.device)?;
        Ok(self.var(&ones)?.as_tensor().clone())
    }

    /// A given map, trained or adapted.
    fn linear(&mut self, map: Affine, trained: Trained) -> Result<Linear> {
        let linear = match trained {
            Trained::All => Linear::trained(&self.var(&map.matrix.full()?)?),
            Trained::Nothing => Linear::frozen(map.matrix),
            Trained::Lora { rank, scale } => {
                let (input, output) = map.matrix.dims()?;
                let down = self.normal(input, rank, (input as f64).powf(-0.5))?;
                let up = Tensor::zeros((rank, output), DType::F32, self.device)?;
                let up = self.var(&up)?;
                Linear::adapted(map.matrix, &down, &up, scale)
            }
        };
        let bias = map.bias.map(|bias| self.other(bias, trained));
        Ok(linear.with_bias(bias.transpose()?))
    }

    /// A given tensor that is no matrix of a layer.
    fn other(&mut self, weight: Tensor, trained: Trained) -> Result<Tensor> {
        match trained {
            Trained::All => Ok(self.var(&weight)?.as_tensor().clone()),
            Trained::Lora { .. } | Trained::Nothing => Ok(weight),
        }
    }
}

impl Decoder {
    /// With random weights, all trained.
    pub fn new(config: Config, seed: u64, device: &Device) -> Result<Self> {
        let Config {
            vocab, dim, hidden, ..
        } = config;
        let mut init = Init::new(seed, device);
        let std = (dim as f64).powf(-0.5);
        let residual = std / (2.0 * config.layers as f64).sqrt();
        let embedding = init.normal(vocab, dim, std)?.as_tensor().clone();
        let layers = (0..config.layers)
            .map(|_| {
                Ok(Layer {
                    attention_norm: init.ones(dim)?,
                    qkv: Linear::trained(&init.normal(dim, dim + 2 * config.kv_dim(), std)?),
                    qk_norm: None,
                    output: Linear::trained(&init.normal(dim, dim, residual)?),
                    mlp_norm: init.ones(dim)?,
                    gate_up: Linear::trained(&init.normal(dim, 2 * hidden, std)?),
                    down: Linear::trained(&init.normal(hidden, dim, residual)?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let norm = init.ones(dim)?;
        let projection = init.normal(dim, vocab, std)?;
        let outside = (embedding, norm, Some(projection.t()?));
        Ok(Self {
            trained_projection: Some((projection, 1)),
            ..Self::assemble(config, None, outside, layers, init)?
        })
    }

    /// With given weights; `seed` is that of the adapters.
    pub fn from_weights(
        config: Config,
        weights: Weights,
        trained: Trained,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        Self::of_weights(config, weights, (trained, None), seed, device)
    }

    /// As [`from_weights`](Self::from_weights), with only the last layers trained.
    pub fn training_last(
        config: Config,
        weights: Weights,
        (trained, last): (Trained, Last),
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        if !(1..=config.layers).contains(&last.layers) {
            bail!("{} of {} layers", last.layers, config.layers);
        }
        Self::of_weights(config, weights, (trained, Some(last)), seed, device)
    }

    fn of_weights(
        config: Config,
        weights: Weights,
        (trained, last): (Trained, Option<Last>),
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut init = Init::new(seed, device);
        let factors = weights.rope_factors;
        let (frozen, outside, states) = match last {
            Some(last) => (config.layers - last.layers, Trained::Nothing, last.states),
            None => (0, trained, None),
        };
        let embedding = init.other(weights.embedding, outside)?;
        let layers = weights.layers.into_iter().enumerate().map(|(i, layer)| {
            let trained = if i < frozen {
                Trained::Nothing
            } else {
                trained
            };
            Ok(Layer {
                attention_norm: init.other(layer.attention_norm, trained)?,
                qkv: init.linear(layer.qkv, trained)?,
                qk_norm: match layer.qk_norm {
                    Some([q, k]) => Some([init.other(q, trained)?, init.other(k, trained)?]),
                    None => None,
                },
                output: init.linear(layer.output, trained)?,
                mlp_norm: init.other(layer.mlp_norm, trained)?,
                gate_up: init.linear(layer.gate_up, trained)?,
                down: init.linear(layer.down, trained)?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = init.other(weights.norm, trained)?;
        let projection = weights.projection;
        let projection = projection.map(|weight| init.other(weight, outside));
        let outside = (embedding, norm, projection.transpose()?);
        Ok(Self {
            frozen,
            states,
            ..Self::assemble(config, factors.as_deref(), outside, layers, init)?
        })
    }

    fn assemble(
        config: Config,
        factors: Option<&[f32]>,
        (embedding, norm, projection): (Tensor, Tensor, Option<Tensor>),
        layers: Vec<Layer>,
        init: Init,
    ) -> Result<Self> {
        let positions = (config.max_tokens, config.head_size);
        let (base, interleaved) = (config.rope_base, config.rope_interleaved);
        let rotation = Rotation::new(positions, base, factors, interleaved, init.device)?;
        let tied = projection.is_none();
        let projection = projection.unwrap_or_else(|| embedding.clone());
        let is_projection = |var: &&Var| var.id() == projection.id();
        let trained_projection = init.vars.iter().find(is_projection);
        Ok(Self {
            config,
            layers,
            frozen: 0,
            states: None,
            norm,
            tied,
            trained_projection: trained_projection.map(|var| (var.clone(), 0)),
            projection,
            embedding,
            rotation: Arc::new(rotation),
            vars: init.vars,
        })
    }

    pub fn config(&self) -> Config {
        self.config
    }

    /// Bytes of the states that are kept; none where none are.
    pub fn kept_bytes(&self) -> Option<usize> {
        self.states.as_ref().map(|states| states.bytes())
    }

    /// Everything that is trained, always in the same order.
    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// Copies of the [`vars`](Self::vars).
    pub fn weights(&self) -> Result<Vec<Tensor>> {
        self.vars
            .iter()
            .map(|var| var.as_detached_tensor().copy())
            .collect()
    }

    pub fn set_weights(&self, weights: &[Tensor]) -> Result<()> {
        self.vars
            .iter()
            .zip(weights)
            .try_for_each(|(var, weight)| var.set(weight))
    }

    /// As they would come from a file, adapters merged, without the graph that they are variables of. Factors of rotary
    /// positions are not among them.
    pub fn merged(&self) -> Result<Weights> {
        let layers = self.layers.iter().map(|layer| {
            Ok(LayerWeights {
                attention_norm: layer.attention_norm.detach(),
                qkv: layer.qkv.merged()?,
                qk_norm: layer
                    .qk_norm
                    .as_ref()
                    .map(|norms| norms.each_ref().map(Tensor::detach)),
                output: layer.output.merged()?,
                mlp_norm: layer.mlp_norm.detach(),
                gate_up: layer.gate_up.merged()?,
                down: layer.down.merged()?,
            })
        });
        Ok(Weights {
            embedding: self.embedding.detach(),
            layers: layers.collect::<Result<_>>()?,
            norm: self.norm.detach(),
            projection: (!self.tied).then(|| self.projection.detach()),
            rope_factors: None,
        })
    }

    /// The states (N, dim) that the output projection makes logits of, of every row or of the `chosen` (n) alone, (n, dim). With what
    /// is kept of the sequences, where it is.
    pub fn hidden(&self, packing: &Packing, chosen: Option<&Tensor>) -> Result<Tensor> {
        let spans = packing.spans();
        let x = match &self.states {
            Some(states) => self.kept(states, packing)?,
            None => self.before(packing)?,
        };
        let x = self.through(&self.layers[self.frozen..], x, spans, chosen)?;
        rms_norm(&x, &self.norm, self.config.norm_epsilon)
    }

    /// (vocabulary, dim).
    pub fn output_projection(&self) -> Tensor {
        self.projection.clone()
    }

    /// Where its weights are, and what it is given must be.
    pub fn device(&self) -> &Device {
        self.projection.device()
    }

    /// Which of the [`vars`](Self::vars) the output projection is, and which of its dimensions has a row or column a token; none
    /// where the projection is not trained.
    pub fn trained_projection(&self) -> Option<(&Var, usize)> {
        self.trained_projection
            .as_ref()
            .map(|(var, dim)| (var, *dim))
    }

    /// What enters the first layer that is trained, (N, dim).
    fn before(&self, packing: &Packing) -> Result<Tensor> {
        let tokens = packing.tokens(self.embedding.device())?;
        let x = self.embedding.index_select(&tokens, 0)?;
        self.through(&self.layers[..self.frozen], x, packing.spans(), None)
    }

    /// The same, of what is kept.
    fn kept(&self, states: &States, packing: &Packing) -> Result<Tensor> {
        let spans = packing.spans();
        let mut rows = Vec::new();
        for (i, sequence) in packing.sequences().iter().enumerate() {
            // One sequence at a time, or its last bits would depend on those beside it.
            let compute = || self.before(&Packing::new(vec![sequence]));
            let states = states.of(sequence, compute)?;
            rows.push(states.narrow(0, spans.before(i), spans.own(i).len())?);
        }
        Tensor::cat(&rows, 0)
    }

    /// Rows (N, dim) throughout, so that every linear map is one matrix product; of the last layer the chosen ones.
    fn through(
        &self,
        layers: &[Layer],
        mut x: Tensor,
        spans: &Arc<Spans>,
        chosen: Option<&Tensor>,
    ) -> Result<Tensor> {
        let attention = Attention {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            size: self.config.head_size,
            spans: spans.clone(),
            rotation: self.rotation.clone(),
        };
        let norm = |x: &Tensor, weight: &Tensor| rms_norm(x, weight, self.config.norm_epsilon);
        for (i, layer) in layers.iter().enumerate() {
            let mut qkv = layer.qkv.forward(&norm(&x, &layer.attention_norm)?)?;
            if let Some(norms) = &layer.qk_norm {
                qkv = attention.with_norms(&qkv, norms, norm)?;
            }
            let mut attended = attention.clone().forward(&qkv)?;
            // After the last attention no row needs another.
            if let Some(chosen) = chosen.filter(|_| i + 1 == layers.len()) {
                attended = attended.index_select(chosen, 0)?;
                x = x.index_select(chosen, 0)?;
            }
            x = (&x + layer.output.forward(&attended)?)?;
            let gate_up = layer.gate_up.forward(&norm(&x, &layer.mlp_norm)?)?;
            x = (&x + layer.down.forward(&swiglu(&gate_up)?)?)?;
        }
        Ok(x)
    }
}
