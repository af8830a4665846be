//! What weights are called in files.

/// What a layer's weights are called, and those outside the layers.
pub struct Names {
    pub embedding: &'static str,
    pub norm: &'static str,
    pub projection: &'static str,
    pub layer: fn(usize) -> String,
    pub attention_norm: &'static str,
    pub qkv: [&'static str; 3],
    pub qk_norm: [&'static str; 2],
    pub output: &'static str,
    pub mlp_norm: &'static str,
    pub gate_up: [&'static str; 2],
    pub down: &'static str,
}

pub const GGUF: Names = Names {
    embedding: "token_embd.weight",
    norm: "output_norm.weight",
    projection: "output.weight",
    layer: |i| format!("blk.{i}."),
    attention_norm: "attn_norm.weight",
    qkv: ["attn_q.weight", "attn_k.weight", "attn_v.weight"],
    qk_norm: ["attn_q_norm.weight", "attn_k_norm.weight"],
    output: "attn_output.weight",
    mlp_norm: "ffn_norm.weight",
    gate_up: ["ffn_gate.weight", "ffn_up.weight"],
    down: "ffn_down.weight",
};

pub const HUGGING_FACE: Names = Names {
    embedding: "model.embed_tokens.weight",
    norm: "model.norm.weight",
    projection: "lm_head.weight",
    layer: |i| format!("model.layers.{i}."),
    attention_norm: "input_layernorm.weight",
    qkv: [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ],
    qk_norm: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    output: "self_attn.o_proj.weight",
    mlp_norm: "post_attention_layernorm.weight",
    gate_up: ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    down: "mlp.down_proj.weight",
};

/// What the bias of a matrix of this name is called.
pub fn bias(weight: &str) -> String {
    weight.replace(".weight", ".bias")
}
