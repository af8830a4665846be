//! Models of the Llama family: one that is trained ([`decoder`]), read from files ([`pretrained`]) and written to them
//! ([`export`]), and one that is only read ([`llama`]).

pub mod attention;
pub mod decoder;
pub mod export;
pub mod fused;
pub mod gguf;
pub mod linear;
pub mod llama;
pub mod names;
pub mod pretrained;
pub mod separate;
