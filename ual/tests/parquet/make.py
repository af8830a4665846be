#!/usr/bin/env python3
"""Writes Parquet files beside this one: conversations as Hugging Face publishes them, and columns of every kind.

    pip install pyarrow && python3 make.py
"""
import datetime
import decimal
import pathlib

import pyarrow
import pyarrow.parquet

here = pathlib.Path(__file__).parent
turn = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
messages = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + {i}?"},
     {"role": "assistant", "content": f"„{2 * i}“\n"}]
    for i in range(300)
]
table = pyarrow.table({
    "messages": pyarrow.array(messages, pyarrow.list_(turn)),
    "score": pyarrow.array([i / 300 for i in range(300)], pyarrow.float64()),
})
pyarrow.parquet.write_table(table, here / "messages.parquet", compression="snappy", row_group_size=128)

when = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
table = pyarrow.table({
    "prompt": ["one?", "two?"],
    "response": pyarrow.array(["1", "2"]).dictionary_encode(),
    "uncertainty": pyarrow.array([0.1, 0.2], pyarrow.float32()),
    "large": pyarrow.array([2**63 - 1, -(2**53) - 1], pyarrow.int64()),
    "unsigned": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
    "missing": pyarrow.array([None, None], pyarrow.string()),
    "nan": pyarrow.array([float("nan"), 1.5], pyarrow.float64()),
    "flag": [True, False],
    "when": pyarrow.array([when, None], pyarrow.timestamp("us", "UTC")),
    "price": pyarrow.array([decimal.Decimal("1.25"), None], pyarrow.decimal128(5, 2)),
    "bytes": pyarrow.array([b"\xff\x00", b"text"], pyarrow.binary()),
    "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
    "nested": [{"list": [[1, 2], []], "none": None}, {"list": [], "none": "x"}],
})
pyarrow.parquet.write_table(table, here / "columns.parquet", compression={"prompt": "zstd", "response": "gzip", "nested.list.list.element.list.element": "none"})
