//! Models of the Llama family: trained or only used ([`decoder`]), read from files ([`pretrained`]) and written to them
//! ([`export`]).

pub mod attention;
pub mod decoder;
pub mod export;
pub mod fused;
pub mod gguf;
pub mod hugging_face;
pub mod linear;
pub mod names;
pub mod pretrained;
pub mod separate;
pub mod states;
pub mod vocabulary;
pub mod weights;
