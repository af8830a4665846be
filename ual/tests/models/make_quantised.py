#!/usr/bin/env python3
"""Writes quantised.gguf beside this file: blocks of every type, and as what gguf's own Python reads them.

    pip install gguf && python3 make_quantised.py
"""
import pathlib

import gguf
import numpy as np

ROWS, COLUMNS = 2, 256
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"]
# gguf cannot quantise to these: any bytes, but for the scales, which are small. Where those stand in a block.
SCALES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}

random = np.random.default_rng(1)
writer = gguf.GGUFWriter(pathlib.Path(__file__).parent / "quantised.gguf", "llama")
for name in QUANTISED + list(SCALES):
    kind = gguf.GGMLQuantizationType[name]
    if name in QUANTISED:
        blocks = gguf.quants.quantize(random.normal(0.1, 0.3, (ROWS, COLUMNS)).astype(np.float32), kind)
    else:
        blocks = random.integers(0, 256, (ROWS, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for at in SCALES[name]:
            scale = random.uniform(0.001, 0.01, ROWS).astype(np.float16)
            blocks[:, at : at + 2] = scale.view(np.uint8).reshape(ROWS, 2)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.add_tensor(name + " read", gguf.quants.dequantize(blocks, kind))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
