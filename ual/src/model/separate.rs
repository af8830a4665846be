//! What [`fused`](crate::model::fused) does, of candle's operations that have a backward; the fused softmax, rms_norm and rope
//! of candle-nn have none.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{
    ops::{rms_norm_slow, silu, softmax},
    rotary_emb::{rope_i_slow, rope_slow},
};

use crate::model::attention::Attention;

pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    rms_norm_slow(x, weight, epsilon)
}

pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.chunk(2, D::Minus1)?;
    silu(&halves[0])? * &halves[1]
}

pub fn attention(attention: &Attention, qkv: &Tensor) -> Result<Tensor> {
    let spans = &attention.spans;
    match spans.padded(qkv.device())? {
        Some(padded) => {
            let qkv = qkv.index_select(&padded.rows, 0)?;
            let attended = of_one_length(attention, &qkv, padded.length)?;
            attended.index_select(&padded.positions, 0)
        }
        None => of_one_length(attention, qkv, spans.length(0)),
    }
}

fn of_one_length(attention: &Attention, qkv: &Tensor, length: usize) -> Result<Tensor> {
    let &Attention {
        heads,
        kv_heads,
        size,
        ref rotation,
        ..
    } = attention;
    let batch = qkv.dim(0)? / length;
    // (B, heads, T, size)
    let split = |start: usize, heads: usize| {
        qkv.narrow(1, start * size, heads * size)?
            .reshape((batch, length, heads, size))?
            .transpose(1, 2)?
            .contiguous()
    };
    let rope = if rotation.interleaved {
        rope_i_slow
    } else {
        rope_slow
    };
    let [cos, sin] = &rotation.tensors;
    let q = rope(&split(0, heads)?, cos, sin)?;
    let k = rope(&split(heads, kv_heads)?, cos, sin)?;
    let v = split(heads + kv_heads, kv_heads)?;
    // Keys and values for every query.
    let spread = |x: &Tensor| {
        x.unsqueeze(2)?
            .broadcast_as((batch, kv_heads, heads / kv_heads, length, size))?
            .contiguous()?
            .reshape((batch, heads, length, size))
    };
    let (k, v) = (spread(&k)?, spread(&v)?);
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (size as f64).powf(-0.5))?;
    let seen = Tensor::tril2(length, DType::U8, qkv.device())?.broadcast_as(scores.shape())?;
    let unseen = Tensor::new(f32::NEG_INFINITY, qkv.device())?.broadcast_as(scores.shape())?;
    let weights = softmax(&seen.where_cond(&scores, &unseen)?, D::Minus1)?;
    weights
        .matmul(&v)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((batch * length, heads * size))
}
