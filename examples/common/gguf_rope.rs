//! Rotary positions as a GGUF file has them.

use anyhow::{Result, ensure};
use candle_core::quantized::gguf_file::Content;

/// By how much slower each element of half a head turns, where Llama 3.1 and later say so.
pub const FACTORS: &str = "rope_freqs.weight";

/// Fails where positions are stretched in a way other than by [`FACTORS`].
pub fn check(content: &Content) -> Result<()> {
    if let Some(kind) = content.metadata.get("llama.rope.scaling.type") {
        let kind = kind.to_string()?;
        ensure!(
            kind == "none",
            "its rotary positions are scaled ({kind}); they must not be"
        );
    }
    if let Some(scale) = content.metadata.get("llama.rope.scale_linear") {
        let scale = scale.to_f32()?;
        ensure!(
            scale == 1.0,
            "its rotary positions are scaled by {scale}; they must not be"
        );
    }
    Ok(())
}
