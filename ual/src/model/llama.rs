//! A Llama from a GGUF file, for reading: all positions of a text in one pass, on the CPU, without gradients.
//!
//! Weights stay quantised; a matrix becomes f32 when its turn comes. That costs little beside the product with a whole
//! text's positions, and the f32 product is faster than candle's quantised ones.

use std::io::{Read, Seek};

use anyhow::{Context, Result, ensure};
use candle_core::{
    D, DType, Device, Module, Tensor,
    quantized::{QTensor, gguf_file::Content},
};
use candle_nn::{
    ops::{rms_norm, silu, softmax_last_dim},
    rotary_emb::rope_i,
};

use crate::model::gguf::{self, Unread};

/// Most tokens of a text, whatever the model's context: attention scores take heads · tokens² · 4 bytes.
const LONGEST: usize = 4096;

pub struct Llama {
    /// (V, D).
    embedding: Tensor,
    /// (V, D): from hidden states to logits.
    pub projection: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    heads: usize,
    kv_heads: usize,
    epsilon: f32,
    /// Cosines and sines of the rotary positions, (T, head width / 2) for the longest T.
    rotation: (Tensor, Tensor),
    /// Most tokens of a text.
    pub context: usize,
}

struct Layer {
    attention_norm: Tensor,
    qkv: [QTensor; 3],
    output: QTensor,
    mlp_norm: Tensor,
    gate: QTensor,
    up: QTensor,
    down: QTensor,
}

impl Llama {
    /// Fails for other architectures, and for a mixture of experts.
    pub fn load<R: Read + Seek>(content: &Content, file: &mut R) -> Result<Self> {
        let value = |key: &str| {
            content
                .metadata
                .get(key)
                .with_context(|| format!("{key} is missing"))
        };
        let architecture = value("general.architecture")?.to_string()?;
        ensure!(
            architecture == "llama",
            "the model's architecture is {architecture:?}; it must be \"llama\""
        );
        let number = |key: &str| -> Result<usize> { Ok(value(key)?.to_u32()? as usize) };
        gguf::check_rope(content)?;
        let heads = number("llama.attention.head_count")?;
        let kv_heads = number("llama.attention.head_count_kv").unwrap_or(heads);
        let epsilon = value("llama.attention.layer_norm_rms_epsilon")?.to_f32()?;
        let base = value("llama.rope.freq_base").map_or(Ok(10_000.0), |base| base.to_f32())?;
        let context = number("llama.context_length").map_or(LONGEST, |length| length.min(LONGEST));

        let mut unread = Unread::new(content.tensor_infos.keys());
        let mut quantised = |name: &str| {
            let name = format!("{name}.weight");
            unread.read(&name);
            let tensor = content.tensor(file, &name, &Device::Cpu);
            tensor.with_context(|| format!("the tensor {name}"))
        };
        let full = |tensor: QTensor| -> Result<Tensor> {
            Ok(tensor.dequantize(&Device::Cpu)?.to_dtype(DType::F32)?)
        };
        let embedding = full(quantised("token_embd")?)?;
        let projection = match content.tensor_infos.contains_key("output.weight") {
            true => full(quantised("output")?)?,
            false => embedding.clone(),
        };
        let norm = full(quantised("output_norm")?)?;
        // Llama 3.1 and later stretch the slow rotations.
        let factors = match content.tensor_infos.contains_key(gguf::ROPE_FACTORS) {
            true => Some(full(quantised("rope_freqs")?)?.to_vec1::<f32>()?),
            false => None,
        };
        let layers = (0..number("llama.block_count")?).map(|i| {
            let mut matrix = |name: &str| quantised(&format!("blk.{i}.{name}"));
            Ok(Layer {
                attention_norm: full(matrix("attn_norm")?)?,
                qkv: [matrix("attn_q")?, matrix("attn_k")?, matrix("attn_v")?],
                output: matrix("attn_output")?,
                mlp_norm: full(matrix("ffn_norm")?)?,
                gate: matrix("ffn_gate")?,
                up: matrix("ffn_up")?,
                down: matrix("ffn_down")?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        unread.check()?;

        let dim = embedding.dim(1)?;
        let width = dim / heads.max(1);
        let rotated = number("llama.rope.dimension_count").unwrap_or(width);
        ensure!(
            heads > 0
                && kv_heads > 0
                && heads.is_multiple_of(kv_heads)
                && width * heads == dim
                && rotated == width,
            "width {dim}, {heads} heads, {kv_heads} of keys and values, and {rotated} rotary dimensions do not go together"
        );
        Ok(Self {
            rotation: rotation(width, base, factors.as_deref(), context)?,
            embedding,
            projection,
            norm,
            layers,
            heads,
            kv_heads,
            epsilon,
            context,
        })
    }

    /// Hidden states (T, D) of T tokens, those that [`projection`](Self::projection) turns into logits.
    pub fn hidden(&self, tokens: &[u32]) -> Result<Tensor> {
        let mut x = self
            .embedding
            .embedding(&Tensor::new(tokens, &Device::Cpu)?)?;
        let length = tokens.len();
        let future = (0..length * length).map(|at| match at % length > at / length {
            true => f32::NEG_INFINITY,
            false => 0.0,
        });
        let mask = Tensor::from_iter(future, &Device::Cpu)?.reshape((length, length))?;
        for layer in &self.layers {
            x = (&x
                + self.attention(
                    layer,
                    &rms_norm(&x, &layer.attention_norm, self.epsilon)?,
                    &mask,
                )?)?;
            let y = rms_norm(&x, &layer.mlp_norm, self.epsilon)?;
            let y = (silu(&linear(&y, &layer.gate)?)? * linear(&y, &layer.up)?)?;
            x = (x + linear(&y, &layer.down)?)?;
        }
        Ok(rms_norm(&x, &self.norm, self.epsilon)?)
    }

    fn attention(&self, layer: &Layer, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (length, dim) = x.dims2()?;
        let (heads, kv_heads, width) = (self.heads, self.kv_heads, dim / self.heads);
        let split = |weight, heads| -> Result<Tensor> {
            let y = linear(x, weight)?.reshape((1, length, heads, width))?;
            Ok(y.transpose(1, 2)?.contiguous()?)
        };
        let [q, k, v] = &layer.qkv;
        let (cos, sin) = &self.rotation;
        let (cos, sin) = (cos.narrow(0, 0, length)?, sin.narrow(0, 0, length)?);
        let q = rope_i(&split(q, heads)?, &cos, &sin)?;
        let k = rope_i(&split(k, kv_heads)?, &cos, &sin)?.squeeze(0)?;
        let v = split(v, kv_heads)?.squeeze(0)?;
        // Neighbouring heads share keys and values: a product for all of them.
        let rows = heads / kv_heads * length;
        let q = (q.reshape((kv_heads, rows, width))? / (width as f64).sqrt())?;
        let scores = q
            .matmul(&k.t()?)?
            .reshape((heads, length, length))?
            .broadcast_add(mask)?;
        let weights = softmax_last_dim(&scores)?.reshape((kv_heads, rows, length))?;
        let mixed = weights.matmul(&v)?.reshape((heads, length, width))?;
        let mixed = mixed.transpose(0, 1)?.reshape((length, dim))?;
        linear(&mixed, &layer.output)
    }
}

/// x (T, inputs) by a matrix (outputs, inputs).
fn linear(x: &Tensor, weight: &QTensor) -> Result<Tensor> {
    Ok(candle_nn::Linear::new(weight.dequantize(&Device::Cpu)?, None).forward(x)?)
}

fn rotation(
    width: usize,
    base: f32,
    factors: Option<&[f32]>,
    length: usize,
) -> Result<(Tensor, Tensor)> {
    let half = width / 2;
    ensure!(
        factors.is_none_or(|factors| factors.len() == half),
        "rope_freqs.weight must have {half} values"
    );
    let frequencies = (0..half).map(|i| {
        let frequency = base.powf(-2.0 * i as f32 / width as f32);
        factors.map_or(frequency, |factors| frequency / factors[i])
    });
    let frequencies = Tensor::from_iter(frequencies, &Device::Cpu)?;
    let positions = Tensor::arange(0, length as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
    let angles = positions
        .unsqueeze(D::Minus1)?
        .broadcast_mul(&frequencies)?;
    Ok((angles.cos()?, angles.sin()?))
}
