//! From text to tokens: tokenizers and chat templates.

pub mod chat;
pub mod gguf_tokenizer;
