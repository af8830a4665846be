//! Logit types: how a stretch of them becomes what a row is computed in, and back with one rounding.

use bytemuck::{Pod, Zeroable};
use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::real::Real;

/// A type of logits on the CPU.
pub(super) trait Element: Pod + Default + Send + Sync {
    type Real: Real;

    /// The values of `from`, converted into `buffer` where that is needed.
    fn widen<'a>(from: &'a [Self], buffer: &'a mut [Self::Real]) -> &'a [Self::Real];
    fn narrow(from: &[Self::Real], to: &mut [Self]);
    /// Whether [`Self::narrow_one`] vectorises in a loop.
    const NARROWS_ONE: bool = true;
    fn narrow_one(x: Self::Real) -> Self;
    fn storage(values: Vec<Self>) -> CpuStorage;
}

macro_rules! identity {
    ($float:ident) => {
        impl Element for $float {
            type Real = $float;

            #[inline(always)]
            fn widen<'a>(from: &'a [Self], _: &'a mut [Self]) -> &'a [Self] {
                from
            }
            #[inline(always)]
            fn narrow(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }
            #[inline(always)]
            fn narrow_one(x: Self) -> Self {
                x
            }
            fn storage(values: Vec<Self>) -> CpuStorage {
                WithDType::to_cpu_storage_owned(values)
            }
        }
    };
}
identity!(f32);
identity!(f64);

impl Element for f16 {
    type Real = f32;

    #[inline(always)]
    fn widen<'a>(from: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..from.len()];
        from.convert_to_f32_slice(buffer);
        buffer
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    const NARROWS_ONE: bool = false;
    fn narrow_one(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        WithDType::to_cpu_storage_owned(values)
    }
}

// half's own conversions of bf16 branch on NaN for every element, which keeps them from vectorising.
impl Element for bf16 {
    type Real = f32;

    #[inline(always)]
    fn widen<'a>(from: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..from.len()];
        for (wide, x) in buffer.iter_mut().zip(from) {
            *wide = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
        buffer
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (narrow, x) in to.iter_mut().zip(from) {
            *narrow = Self::narrow_one(*x);
        }
    }
    #[inline(always)]
    fn narrow_one(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
        let kept = if x.is_nan() { 0x7fc0 } else { rounded };
        bf16::from_bits(kept as u16)
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        WithDType::to_cpu_storage_owned(values)
    }
}

/// An f32 logit computed in f64. With a softcap of some tens, z = c·tanh(x/c) rounded to f32 would be off by more than
/// the gradient may be.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Precise(f32);

impl Element for Precise {
    type Real = f64;

    #[inline(always)]
    fn widen<'a>(from: &'a [Self], buffer: &'a mut [f64]) -> &'a [f64] {
        let buffer = &mut buffer[..from.len()];
        for (wide, x) in buffer.iter_mut().zip(from) {
            *wide = x.0.into();
        }
        buffer
    }
    #[inline(always)]
    fn narrow(from: &[f64], to: &mut [Self]) {
        for (narrow, x) in to.iter_mut().zip(from) {
            *narrow = Self::narrow_one(*x);
        }
    }
    #[inline(always)]
    fn narrow_one(x: f64) -> Self {
        Self(x as f32)
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        WithDType::to_cpu_storage_owned(bytemuck::cast_vec::<Self, f32>(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        let x: Vec<f32> = (0..=u32::from(u16::MAX))
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(high << 16 | low))
            })
            .collect();
        let mut ours = vec![bf16::default(); x.len()];
        bf16::narrow(&x, &mut ours);
        let mut wide = vec![0.0; x.len()];
        let wide = bf16::widen(&ours, &mut wide);
        for ((x, ours), &wide) in x.iter().zip(&ours).zip(wide) {
            let theirs = bf16::from_f32(*x);
            assert!(theirs == *ours || theirs.is_nan() && ours.is_nan(), "{x}");
            assert!(
                wide == theirs.to_f32() || wide.is_nan() && theirs.is_nan(),
                "{x}"
            );
        }
    }
}
