//! Logit types: how a stretch of them becomes what a row is computed in, and back with one rounding.

use bytemuck::{Pod, Zeroable};
use candle_core::{CpuStorage, WithDType};
use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::real::Real;

/// A type of logits on the CPU.
pub(super) trait Element: Pod + Default + Send + Sync {
    type Real: Real;
    /// Whether rows of this type may have a softcap; without one, whether they may be of the general kind, and whether of
    /// the usual one.
    const CAPPED: bool = false;
    const GENERAL: bool = true;
    const USUAL: bool = true;

    /// The values of `from`, of which element i goes to [`Self::position`] i.
    fn widen_into(from: &[Self], to: &mut [Self::Real]);
    /// The inverse of [`Self::widen_into`], with one rounding.
    fn narrow(from: &[Self::Real], to: &mut [Self]);
    /// [`Self::widen_into`], or `from` itself where nothing needs converting.
    #[inline(always)]
    fn widen<'a>(from: &'a [Self], buffer: &'a mut [Self::Real]) -> &'a [Self::Real] {
        let buffer = &mut buffer[..from.len()];
        Self::widen_into(from, buffer);
        buffer
    }
    /// Where element `i` of `len` stands once widened.
    #[inline(always)]
    fn position(i: usize, _len: usize) -> usize {
        i
    }
    /// The values of `from` in their order.
    #[inline(always)]
    fn widen_in_order(from: &[Self], to: &mut [Self::Real]) {
        Self::widen_into(from, to);
    }
    /// The inverse of [`Self::widen_in_order`], with one rounding.
    #[inline(always)]
    fn narrow_in_order(from: &[Self::Real], to: &mut [Self]) {
        Self::narrow(from, to);
    }
    /// Whether this is its own [`Self::Real`].
    const IS_REAL: bool = false;
    /// Whether elements may be narrowed one by one in a loop: they keep their order, and the loop vectorises.
    const NARROWS_ONE: bool = true;
    fn narrow_one(x: Self::Real) -> Self;
    fn storage(values: Vec<Self>) -> CpuStorage;
}

macro_rules! identity {
    ($float:ident, $capped:literal) => {
        impl Element for $float {
            type Real = $float;
            const CAPPED: bool = $capped;
            const IS_REAL: bool = true;

            #[inline(always)]
            fn widen_into(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }
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
identity!(f32, false); // with a softcap, it is `Precise`
identity!(f64, true);

impl Element for f16 {
    type Real = f32;

    #[inline(always)]
    fn widen_into(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
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

/// Bits of the bf16 next to `x`, ties to even, in the word's high half. The low half is left over.
#[inline(always)]
fn rounded_high(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    if x.is_nan() { 0x7fc0_0000 } else { rounded }
}

// Two elements, a 32-bit word, at a time: one goes to the first half of the widened, the other to the second. Keeping the
// order would take twice the operations. half's own conversions branch on NaN, which keeps them from vectorising.
impl Element for bf16 {
    type Real = f32;
    const GENERAL: bool = false; // these are `InOrder`

    #[inline(always)]
    fn widen_into(from: &[Self], to: &mut [f32]) {
        let (pairs, last) = from.as_chunks::<2>();
        let (low, high) = to.split_at_mut(pairs.len());
        for ((pair, low), high) in pairs.iter().zip(low).zip(&mut *high) {
            let word: u32 = bytemuck::pod_read_unaligned(bytemuck::bytes_of(pair));
            *low = f32::from_bits(word << 16);
            *high = f32::from_bits(word & 0xffff_0000);
        }
        if let [last] = last {
            high[pairs.len()] = f32::from_bits(u32::from(last.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        let (pairs, last) = to.as_chunks_mut::<2>();
        let (low, high) = from.split_at(pairs.len());
        for ((pair, low), high) in pairs.iter_mut().zip(low).zip(high) {
            let word = rounded_high(*low) >> 16 | rounded_high(*high) & 0xffff_0000;
            *pair = bytemuck::cast(word);
        }
        if let [last] = last {
            *last = Self::narrow_one(from[from.len() - 1]);
        }
    }
    #[inline(always)]
    fn widen_in_order(from: &[Self], to: &mut [f32]) {
        for (wide, x) in to.iter_mut().zip(from) {
            *wide = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow_in_order(from: &[f32], to: &mut [Self]) {
        for (narrow, x) in to.iter_mut().zip(from) {
            *narrow = Self::narrow_one(*x);
        }
    }
    #[inline(always)]
    fn position(i: usize, len: usize) -> usize {
        let (pairs, high) = (len / 2, i.is_multiple_of(2) == cfg!(target_endian = "big"));
        match i / 2 {
            pair if pair == pairs => i,
            pair => pair + if high { pairs } else { 0 },
        }
    }
    const NARROWS_ONE: bool = false;
    #[inline(always)]
    fn narrow_one(x: f32) -> Self {
        bf16::from_bits((rounded_high(x) >> 16) as u16)
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        WithDType::to_cpu_storage_owned(values)
    }
}

/// A logit of at most f32 computed in f64, for rows with a softcap: an exponent there comes out of a dozen operations, each
/// of which rounds.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Precise<T>(T);

// SAFETY: transparent.
unsafe impl<T: Zeroable> Zeroable for Precise<T> {}
unsafe impl<T: Pod> Pod for Precise<T> {}

impl<T: Element<Real = f32>> Element for Precise<T> {
    type Real = f64;
    const CAPPED: bool = true;
    const GENERAL: bool = false;
    const USUAL: bool = false;

    #[inline(always)]
    fn widen_into(from: &[Self], to: &mut [f64]) {
        let mut singles = [0.0; CHUNK];
        for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)) {
            let singles = &mut singles[..from.len()];
            T::widen_in_order(bytemuck::cast_slice(from), singles);
            for (wide, x) in to.iter_mut().zip(singles) {
                *wide = f64::from(*x);
            }
        }
    }
    #[inline(always)]
    fn narrow(from: &[f64], to: &mut [Self]) {
        let mut singles = [0.0; CHUNK];
        for (from, to) in from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)) {
            let singles = &mut singles[..from.len()];
            for (narrow, x) in singles.iter_mut().zip(from) {
                *narrow = *x as f32;
            }
            T::narrow_in_order(singles, bytemuck::cast_slice_mut(to));
        }
    }
    const NARROWS_ONE: bool = T::NARROWS_ONE;
    #[inline(always)]
    fn narrow_one(x: f64) -> Self {
        Self(T::narrow_one(x as f32))
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        T::storage(bytemuck::cast_vec(values))
    }
}

/// A bf16 that stays in its order, for rows that have other values beside the logits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct InOrder(bf16);

// SAFETY: transparent.
unsafe impl Zeroable for InOrder {}
unsafe impl Pod for InOrder {}

impl Element for InOrder {
    type Real = f32;
    const USUAL: bool = false;

    #[inline(always)]
    fn widen_into(from: &[Self], to: &mut [f32]) {
        bf16::widen_in_order(bytemuck::cast_slice(from), to);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        bf16::narrow_in_order(from, bytemuck::cast_slice_mut(to));
    }
    fn narrow_one(x: f32) -> Self {
        Self(bf16::narrow_one(x))
    }
    fn storage(values: Vec<Self>) -> CpuStorage {
        bf16::storage(bytemuck::cast_vec(values))
    }
}

/// Elements that [`Precise`] converts at a time.
const CHUNK: usize = 64;

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
        for x in [&x[..], &x[..97], &x[..1]] {
            let mut wide = vec![0.0; x.len()];
            for (i, &x_i) in x.iter().enumerate() {
                wide[bf16::position(i, x.len())] = x_i;
            }
            let mut ours = vec![bf16::default(); x.len()];
            bf16::narrow(&wide, &mut ours);
            bf16::widen_into(&ours, &mut wide);
            for (i, (x_i, ours)) in x.iter().zip(&ours).enumerate() {
                let theirs = bf16::from_f32(*x_i);
                let wide = wide[bf16::position(i, x.len())];
                assert!(theirs == *ours || theirs.is_nan() && ours.is_nan(), "{x_i}");
                assert!(
                    wide == theirs.to_f32() || wide.is_nan() && theirs.is_nan(),
                    "{x_i}"
                );
            }
        }
    }
}
