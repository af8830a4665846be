//! What a Llama's files must not have: rotary positions of a kind that is not known here, tensors that nobody reads.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use candle_core::quantized::gguf_file::Content;

/// By how much slower each element of half a head turns, where Llama 3.1 and later say so.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Fails where rotary positions are stretched in a way other than by [`ROPE_FACTORS`].
pub fn check_rope(content: &Content) -> Result<()> {
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

/// The names of a file's tensors that were not read yet.
pub struct Unread(HashSet<String>);

impl Unread {
    pub fn new<'a>(names: impl IntoIterator<Item = &'a String>) -> Self {
        Self(names.into_iter().cloned().collect())
    }

    pub fn read(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// That nothing was left: a bias, say, that the model would lack.
    pub fn check(self) -> Result<()> {
        let count = self.0.len();
        if let Some(first) = self.0.into_iter().min() {
            bail!("{count} of its tensors have no place in a Llama, {first} among them");
        }
        Ok(())
    }
}
