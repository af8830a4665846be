#!/usr/bin/env python3
"""Writes a folder for each kind of model beside this file: a tiny one as transformers saves it, and its logits in f64.

    pip install torch transformers && python3 make.py
"""
import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, AutoModelForCausalLM

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
SIZES = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}
KINDS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True,
                         rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=6, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}

for name, config in KINDS.items():
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
            parameter.copy_(parameter.bfloat16())
    folder = pathlib.Path(__file__).parent / name
    logits = model.double()(torch.tensor([TOKENS])).logits[0]
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    about = {"transformers": transformers.__version__, "tokens": TOKENS, "logits": logits.tolist()}
    (folder / "expected.json").write_text(json.dumps(about) + "\n")
