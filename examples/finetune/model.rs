//! A small decoder-only transformer: pre-norm, RMSNorm, rotary positions, SwiGLU. Built from operations that have a
//! backward in candle; the fused softmax, rms_norm and rope of candle-nn have none.

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::{
    ops::{rms_norm_slow, silu, softmax},
    rotary_emb::rope_slow,
};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Normal};

#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub vocab: usize,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub max_tokens: usize,
}

struct Layer {
    attention_norm: Var,
    qkv: Var,
    output: Var,
    mlp_norm: Var,
    gate_up: Var,
    down: Var,
}

pub struct Decoder {
    config: Config,
    embedding: Var,
    layers: Vec<Layer>,
    norm: Var,
    head: Var,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

/// Seeded initial weights. candle cannot seed its CPU generator, so the numbers are drawn here.
struct Init<'a> {
    rng: StdRng,
    device: &'a Device,
}

impl Init<'_> {
    fn normal(&mut self, rows: usize, columns: usize, std: f64) -> Result<Var> {
        let normal = Normal::new(0.0, std).expect("std is finite");
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| normal.sample(&mut self.rng) as f32)
            .collect();
        Var::from_tensor(&Tensor::from_vec(values, (rows, columns), self.device)?)
    }

    fn ones(&self, dim: usize) -> Result<Var> {
        Var::from_tensor(&Tensor::ones(dim, candle_core::DType::F32, self.device)?)
    }
}

impl Decoder {
    pub fn new(config: Config, seed: u64, device: &Device) -> Result<Self> {
        let Config {
            vocab,
            dim,
            layers,
            heads,
            max_tokens,
        } = config;
        let mut init = Init {
            rng: StdRng::seed_from_u64(seed),
            device,
        };
        let std = (dim as f64).powf(-0.5);
        let residual = std / (2.0 * layers as f64).sqrt();
        // Two thirds of the usual 4·dim, because SwiGLU has three matrices where an MLP has two; a multiple of 8.
        let hidden = (dim * 8 / 3).next_multiple_of(8);
        let embedding = init.normal(vocab, dim, std)?;
        let layers = (0..layers)
            .map(|_| {
                Ok(Layer {
                    attention_norm: init.ones(dim)?,
                    qkv: init.normal(dim, 3 * dim, std)?,
                    output: init.normal(dim, dim, residual)?,
                    mlp_norm: init.ones(dim)?,
                    gate_up: init.normal(dim, 2 * hidden, std)?,
                    down: init.normal(hidden, dim, residual)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;

        let half = dim / heads / 2;
        let angles: Vec<f32> = (0..max_tokens)
            .flat_map(|t| (0..half).map(move |i| t as f32 / 10_000f32.powf(i as f32 / half as f32)))
            .collect();
        let angles = Tensor::from_vec(angles, (max_tokens, half), device)?;
        let mask: Vec<f32> = (0..max_tokens)
            .flat_map(|t| {
                (0..max_tokens).map(move |s| if s <= t { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        Ok(Self {
            config,
            embedding,
            layers,
            norm: init.ones(dim)?,
            head: init.normal(dim, vocab, std)?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            mask: Tensor::from_vec(mask, (max_tokens, max_tokens), device)?,
        })
    }

    /// All weights, always in the same order.
    pub fn vars(&self) -> Vec<Var> {
        let layers = self.layers.iter().flat_map(|l| {
            [
                &l.attention_norm,
                &l.qkv,
                &l.output,
                &l.mlp_norm,
                &l.gate_up,
                &l.down,
            ]
            .map(Var::clone)
        });
        [&self.embedding, &self.norm, &self.head]
            .map(Var::clone)
            .into_iter()
            .chain(layers)
            .collect()
    }

    pub fn weights(&self) -> Result<Vec<Tensor>> {
        self.vars()
            .iter()
            .map(|var| var.as_detached_tensor().copy())
            .collect()
    }

    pub fn set_weights(&self, weights: &[Tensor]) -> Result<()> {
        self.vars()
            .iter()
            .zip(weights)
            .try_for_each(|(var, weight)| var.set(weight))
    }

    /// Tokens (B, T) to logits (B, T, vocabulary).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, length) = tokens.dims2()?;
        self.hidden(tokens)?
            .flatten(0, 1)?
            .matmul(&self.head)?
            .reshape((batch, length, self.config.vocab))
    }

    /// The output projection (vocabulary, dim), from hidden states to logits.
    pub fn output_projection(&self) -> Result<Tensor> {
        self.head.t()
    }

    /// Tokens (B, T) to the last hidden states (B, T, dim), after the final norm.
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, length) = tokens.dims2()?;
        // Rows (B·T, dim) throughout, so that every linear map is one matrix product.
        let mut x = self.embedding.index_select(&tokens.flatten_all()?, 0)?;
        for layer in &self.layers {
            let normed = rms_norm_slow(&x, &layer.attention_norm, 1e-6)?;
            x = (&x + self.attention(layer, &normed, batch, length)?)?;
            let gate_up = rms_norm_slow(&x, &layer.mlp_norm, 1e-6)?
                .matmul(&layer.gate_up)?
                .chunk(2, D::Minus1)?;
            x = (&x + (silu(&gate_up[0])? * &gate_up[1])?.matmul(&layer.down)?)?;
        }
        rms_norm_slow(&x, &self.norm, 1e-6)?.reshape((batch, length, self.config.dim))
    }

    fn attention(&self, layer: &Layer, x: &Tensor, batch: usize, length: usize) -> Result<Tensor> {
        let Config { dim, heads, .. } = self.config;
        let size = dim / heads;
        let qkv = x.matmul(&layer.qkv)?.chunk(3, D::Minus1)?;
        // (B, heads, T, size)
        let split = |t: &Tensor| {
            t.contiguous()?
                .reshape((batch, length, heads, size))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = rope_slow(&split(&qkv[0])?, &self.cos, &self.sin)?;
        let k = rope_slow(&split(&qkv[1])?, &self.cos, &self.sin)?;
        let scores = (q.matmul(&k.t()?.contiguous()?)? * (size as f64).powf(-0.5))?;
        let mask = self.mask.narrow(0, 0, length)?.narrow(1, 0, length)?;
        let weights = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let mixed = weights
            .matmul(&split(&qkv[2])?)?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((batch * length, dim))?;
        mixed.matmul(&layer.output)
    }
}
