#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The GGUF files of this folder, made with ggml's own Python package: pip install gguf, then run this.

all_types.gguf      every type of metadata value and array; tensors of all types that Kilin reads and of some that it
                    does not, big alignment
split-0000?-of-00002.gguf   one model in two parts, as llama.cpp's gguf-split names them
tokenizer.gguf      a vocabulary of the 256 bytes and a few tokens, without tensors
The data of each tensor is arange over its bytes or elements, so that a test can tell what it should find.
"""
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

HERE = pathlib.Path(__file__).parent


def all_types():
    w = gguf.GGUFWriter(HERE / "all_types.gguf", "kimi-linear")
    w.add_custom_alignment(64)
    for kind, value in [("uint8", 250), ("int8", -100), ("uint16", 65000), ("int16", -30000), ("uint32", 4000000000),
                        ("int32", -2000000000), ("uint64", 2**63 - 1), ("int64", -2**63), ("float32", 0.1),
                        ("float64", 0.1), ("bool", True), ("string", "Mond 月 \0 end")]:
        w.add_key_value(f"test.{kind}", value, Value[kind.upper()])
    for kind, values in [("uint8", [0, 255]), ("int8", [-128, 127]), ("uint16", [0, 65535]), ("int16", [-32768, 32767]),
                         ("uint32", [0, 2**32 - 1]), ("int32", [-2**31, 2**31 - 1]), ("uint64", [0, 2**63 - 1]),
                         ("int64", [-2**63, 2**63 - 1]), ("float32", [1.5, -2.25]), ("float64", [0.1, 1e300]),
                         ("bool", [True, False, True]), ("string", ["", "Ġthe", "月"])]:
        w.add_key_value(f"test.array.{kind}", values, Value.ARRAY, Value[kind.upper()])
    w.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    w.add_tensor("f16", np.arange(24, dtype=np.float16).reshape(4, 3, 2))
    w.add_tensor("one", np.array([7.5], dtype=np.float32))
    w.add_tensor("four", np.arange(16, dtype=np.float32).reshape(2, 1, 2, 4))
    w.add_tensor("i32", np.arange(5, dtype=np.int32))
    w.add_tensor("i8", np.arange(5, dtype=np.int8))
    for kind, shape in [("BF16", (3, 2)), ("Q8_0", (2, 64)), ("Q4_0", (3, 32)), ("Q4_K", (2, 256)), ("Q6_K", (1, 512)),
                        ("Q5_K", (2, 256)), ("IQ4_XS", (1, 256)), ("MXFP4", (2, 32)),
                        ("Q5_0", (2, 32))]:
        block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
        data = np.arange(shape[0] * shape[1] // block * size, dtype=np.uint64).astype(np.uint8)
        w.add_tensor(kind.lower(), data.reshape(shape[0], -1), raw_dtype=Type[kind])
    finish(w)


def split():
    for part, names in enumerate((["a", "b"], ["c"])):
        w = gguf.GGUFWriter(HERE / f"split-{part + 1:05}-of-00002.gguf", "kimi-linear")
        if part == 0:
            w.add_string("test.where", "only in the first part")
        w.add_uint16("split.no", part)
        w.add_uint16("split.count", 2)
        w.add_int32("split.tensors.count", 3)
        for name in names:
            w.add_tensor(name, np.full((2, 2), ord(name), dtype=np.float32))
        finish(w)


def tokenizer():
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE]
    others = [b for b in range(256) if b not in visible]
    characters = {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    w = gguf.GGUFWriter(HERE / "tokenizer.gguf", "kimi-linear")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("kimi-k2")
    w.add_token_list([characters[b] for b in range(256)] + ["ab", "Ġab", "<|end|>", "[PAD259]"])
    w.add_token_types([gguf.TokenType.NORMAL] * 258 + [gguf.TokenType.CONTROL, gguf.TokenType.UNUSED])
    w.add_token_merges(["a b", "Ġ ab"])
    w.add_eos_token_id(258)
    w.add_chat_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    finish(w)


def finish(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


all_types()
split()
tokenizer()
