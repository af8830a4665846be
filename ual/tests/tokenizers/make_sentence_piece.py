#!/usr/bin/env python3
"""Writes sentence_piece.json beside this file: a small SentencePiece BPE as a GGUF file has it, and what sentencepiece
itself makes of texts, with the space before a text and without.

    pip install sentencepiece protobuf && python3 make_sentence_piece.py
"""
import io
import json
import pathlib
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

WORDS = ("the a of to and in that is was he for it with as his on be at by I this had not are but from or have an they "
         "which one you were her all she there would their we him been has when who will more no if out so said what").split()
ADDED = ["<tool>", "[INST]"]


rng = random.Random(1)
words = WORDS + [a + b for a, b in zip(WORDS, reversed(WORDS))]
corpus = [" ".join(rng.choices(words, k=12)) + rng.choice(".?!") for _ in range(400)]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=ADDED,
    character_coverage=0.999, minloglevel=2)
with_prefix = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
proto.normalizer_spec.add_dummy_prefix = False
without = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def kind(i):
    if with_prefix.is_unknown(i):
        return 2
    if with_prefix.is_control(i):
        return 3
    if with_prefix.is_byte(i):
        return 6
    return 4 if with_prefix.id_to_piece(i) in ADDED else 1


texts = ["", " ", "the", " the", "  of  which ", "they said: no\n\nmore", "naïve 東京 \U0001f600", "<s>the</s>",
         "\tall\u00a0there", "thethethethe aaaaaaa"]
for _ in range(60):
    pieces = rng.choices(words + [" ", "  ", "\n", "é", "x", "42", ",", "ß", "ing", "th"], k=rng.randrange(1, 14))
    texts.append(rng.choice(["", " "]).join(pieces))
about = {
    "sentencepiece": sentencepiece.__version__,
    "tokens": [with_prefix.id_to_piece(i) for i in range(420)],
    "scores": [with_prefix.get_score(i) for i in range(420)],
    "kinds": [kind(i) for i in range(420)],
    "texts": [{"text": text, "ids": with_prefix.encode(text), "middle": without.encode(text)} for text in texts],
}
path = pathlib.Path(__file__).parent / "sentence_piece.json"
path.write_text(json.dumps(about, ensure_ascii=False, separators=(",", ":")) + "\n")
