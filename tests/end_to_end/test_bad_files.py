# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: each gives one clear line that names the file or the field, exit code 1, and no crash."""
import json
import os
import struct
import unittest

from support import DOCS, TINY, ModelCopy, TestCase, kilin

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


class Damage(TestCase):
    source = TINY
    arguments = ("--prompt-ids", "1,2,3", "-n", "2")

    def refused(self, damage, *words):
        """A copy of the checkpoint, damaged: refused, naming `words`."""
        with ModelCopy(self.source) as model:
            damage(model)
            self.assert_refused(kilin("run", model.path, *self.arguments), *words)


def write(name, content):
    return lambda model: model.file(name).write_bytes(content)


def cut(name, length):
    return lambda model: os.truncate(model.file(name), length)


def header(change):
    return lambda model: model.change_header(change)


def config(**values):
    return lambda model: model.change_json("config.json", lambda found: found.update(values))


def without(*keys):
    return lambda model: model.change_json("config.json", lambda found: [found.pop(key) for key in keys])


def linear(**values):
    return lambda model: model.change_json("config.json",
                                           lambda found: found["linear_attn_config"].update(values))


def replace_by_directory(name):
    def damage(model):
        model.file(name).unlink()
        model.file(name).mkdir()
    return damage


def replace_by_loop(name):
    """A link to itself: a file that nobody can open, root neither."""
    def damage(model):
        model.file(name).unlink()
        model.file(name).symlink_to(name)
    return damage


class Unreadable(Damage):
    source = DOCS
    arguments = ("--prompt", "The", "-n", "2")

    def test_each_file(self):
        for name in ("config.json", INDEX, SHARDS[0], "tokenizer.json", "tokenizer_config.json",
                     "generation_config.json"):
            with self.subTest(name=name):
                self.refused(replace_by_loop(name), name)


class Safetensors(Damage):
    FILE = "model.safetensors"

    def test_truncated_data(self):
        self.refused(cut(self.FILE, 1_000_000), self.FILE)

    def test_truncated_header(self):
        self.refused(cut(self.FILE, 100), self.FILE)

    def test_truncated_length(self):
        self.refused(cut(self.FILE, 5), self.FILE)

    def test_empty(self):
        self.refused(write(self.FILE, b""), self.FILE)

    def test_missing(self):
        self.refused(lambda model: model.file(self.FILE).unlink(), "safetensors")

    def test_directory_in_its_place(self):
        self.refused(replace_by_directory(self.FILE), self.FILE)

    def test_header_longer_than_the_file(self):
        self.refused(write(self.FILE, struct.pack("<Q", 1 << 40) + b"{}"), self.FILE)

    def test_header_length_that_overflows(self):
        self.refused(write(self.FILE, struct.pack("<Q", (1 << 64) - 1) + b"{}"), self.FILE)

    def test_header_that_is_not_json(self):
        self.refused(write(self.FILE, struct.pack("<Q", 8) + b"{broken}"), self.FILE)

    def test_header_that_is_a_list(self):
        self.refused(write(self.FILE, struct.pack("<Q", 2) + b"[]"), self.FILE)

    def test_overlapping_tensors(self):
        def overlap(found):
            found[NORM]["data_offsets"] = [offset + 4 for offset in found[NORM]["data_offsets"]]
        self.refused(header(overlap), self.FILE)

    def test_negative_offset(self):
        self.refused(header(lambda found: found[NORM].update(data_offsets=[-256, 0])), NORM)

    def test_offsets_in_wrong_order(self):
        self.refused(header(lambda found: found[NORM]["data_offsets"].reverse()), NORM)

    def test_offset_beyond_the_file(self):
        self.refused(header(lambda found: found[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256])), NORM)

    def test_offset_that_is_not_a_number(self):
        self.refused(header(lambda found: found[NORM].update(data_offsets=["0", "256"])), NORM)

    def test_shape_that_overflows(self):
        self.refused(header(lambda found: found[NORM].update(shape=[1 << 40, 1 << 40])), NORM)

    def test_shape_and_bytes_that_differ(self):
        self.refused(header(lambda found: found[NORM].update(shape=[63])), NORM)

    def test_unknown_dtype(self):
        self.refused(header(lambda found: found[NORM].update(dtype="F7")), NORM, "F7")

    def test_dtype_that_the_model_does_not_take(self):
        self.refused(header(lambda found: found[NORM].update(dtype="I32")), NORM, "I32")

    def test_missing_tensor(self):
        def rename(found):
            found["something.else"] = found.pop(NORM)
        self.refused(header(rename), NORM)

    def test_wrong_shape(self):
        self.refused(header(lambda found: found[EMBEDDING].update(shape=[64, 512])), EMBEDDING, "64", "512")

    def test_nan_weight(self):
        def nan(data):
            data[0:4] = struct.pack("<f", float("nan"))
        self.refused(lambda model: model.change_data(NORM, nan), NORM)

    def test_infinite_weight(self):
        """In the row of token 2, which the prompt uses."""
        def infinite(data):
            data[512:516] = struct.pack("<f", float("inf"))
        self.refused(lambda model: model.change_data(EMBEDDING, infinite), EMBEDDING)


class Sharded(Damage):
    source = DOCS
    arguments = ("--prompt", "The", "-n", "2")

    def index(self, change):
        return lambda model: model.change_json(INDEX, lambda found: change(found["weight_map"]))

    def test_truncated_shard(self):
        self.refused(cut(SHARDS[1], 9_000_000), SHARDS[1])

    def test_missing_shard(self):
        self.refused(lambda model: model.file(SHARDS[1]).unlink(), SHARDS[1])

    def test_index_with_path_out_of_the_directory(self):
        outside = "../../etc/passwd"
        self.refused(self.index(lambda found: found.update({NORM: outside})), INDEX)

    def test_index_with_absolute_path(self):
        self.refused(self.index(lambda found: found.update({NORM: "/etc/passwd"})), INDEX)

    def test_index_names_the_wrong_shard(self):
        self.refused(self.index(lambda found: found.update({EMBEDDING: SHARDS[1]})), EMBEDDING)

    def test_index_that_is_not_json(self):
        self.refused(write(INDEX, b"{"), INDEX)

    def test_index_without_map(self):
        self.refused(write(INDEX, b"{}"), INDEX, "weight_map")

    def test_index_of_wrong_type(self):
        self.refused(write(INDEX, json.dumps({"weight_map": {NORM: 3}}).encode()), INDEX)


class Config(Damage):
    def test_file(self):
        for content in (b"", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000):
            with self.subTest(content=content[:20]):
                self.refused(write("config.json", content), "config.json")

    def test_directory_in_its_place(self):
        self.refused(replace_by_directory("config.json"), "config.json")

    def test_unknown_architecture(self):
        self.refused(config(architectures=["LlamaForCausalLM"]), "architectures", "KimiLinearForCausalLM")

    def test_unknown_key_that_changes_the_computation(self):
        self.refused(config(attention_sink_size=4), "config.json", "attention_sink_size")

    def test_values_that_kilin_does_not_compute(self):
        for key, value in {"hidden_act": "relu", "q_lora_rank": 64, "num_nextn_predict_layers": 1,
                           "quantization_config": {"bits": 4}, "attention_bias": True}.items():
            with self.subTest(key=key):
                self.refused(config(**{key: value}), "config.json", key)

    def test_missing_keys(self):
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "kv_lora_rank", "num_attention_heads",
                    "linear_attn_config", "moe_intermediate_size", "rms_norm_eps"):
            with self.subTest(key=key):
                self.refused(without(key), "config.json", key)

    def test_wrong_types(self):
        for key, value in {"vocab_size": "512", "hidden_size": 64.5, "num_hidden_layers": None,
                           "rms_norm_eps": "small", "moe_renormalize": "yes", "architectures": "Kimi",
                           "linear_attn_config": [], "eos_token_id": "end"}.items():
            with self.subTest(key=key):
                self.refused(config(**{key: value}), "config.json", key)

    def test_values_out_of_range(self):
        for key, value in {"vocab_size": 0, "hidden_size": -64, "num_hidden_layers": 10**18, "hidden_size ": 10**30,
                           "num_experts_per_token": 9, "bos_token_id": 512, "kv_lora_rank": 1 << 60}.items():
            with self.subTest(key=key):
                self.refused(config(**{key.strip(): value}), "config.json", key.strip())

    def test_shape_that_the_weights_do_not_have(self):
        for key, value in {"vocab_size": 511, "hidden_size": 128, "intermediate_size": 97,
                           "num_experts": 9}.items():
            with self.subTest(key=key):
                self.refused(config(**{key: value}), "model.")

    def test_layer_lists(self):
        cases = {"overlapping": dict(kda_layers=[1, 2, 3, 4]), "not complete": dict(kda_layers=[1, 2]),
                 "from 0": dict(kda_layers=[0, 1, 2], full_attn_layers=[3]), "too many": dict(kda_layers=[1, 2, 3, 5]),
                 "twice": dict(kda_layers=[1, 2, 3, 3]), "type": dict(kda_layers="1,2,3")}
        for name, values in cases.items():
            with self.subTest(name):
                self.refused(linear(**values), "config.json", "layer")

    def test_generation_config(self):
        for content in (b"{", b'{"eos_token_id": "x"}', b'{"eos_token_id": [2, 100000]}'):
            with self.subTest(content=content):
                self.refused(write("generation_config.json", content), "generation_config.json")


class Tokenizer(Damage):
    source = DOCS
    arguments = ("--prompt", "The", "-n", "2")

    def test_missing(self):
        def remove(model):
            model.file("tokenizer.json").unlink()
            model.file("tiktoken.model").unlink()
        self.refused(remove, "tokenizer")

    def test_not_json(self):
        self.refused(write("tokenizer.json", b"{"), "tokenizer.json")

    def test_of_another_kind(self):
        def change(found):
            found["model"]["type"] = "Unigram"
        self.refused(lambda model: model.change_json("tokenizer.json", change), "tokenizer.json")

    def test_directory_in_its_place(self):
        self.refused(replace_by_directory("tokenizer.json"), "tokenizer.json")

    def test_tiktoken(self):
        for content in (b"", b"IQ==\n", b"IQ== zero\n", b"!!! 0\n", b"IQ== 0\nIQ== 1\n"):
            with self.subTest(content=content):
                def damage(model, content=content):
                    model.file("tokenizer.json").unlink()
                    model.file("tiktoken.model").write_bytes(content)
                self.refused(damage, "tiktoken.model")

    def test_tokenizer_config(self):
        self.refused(write("tokenizer_config.json", b"{"), "tokenizer_config.json")

    def test_chat_template(self):
        for template in (b"{% for m in messages %}", b"{{ 1 / 0 }}", b"{{ raise_exception('no') }}",
                         b"{{ messages[7].content }}", b"{% include 'x' %}"):
            with self.subTest(template=template):
                with ModelCopy(DOCS) as model:
                    model.file("chat_template.jinja").write_bytes(template)
                    result = kilin("chat", model.path, stdin=b"hello\n")
                    self.assert_refused(result, "template")


if __name__ == "__main__":
    unittest.main()
