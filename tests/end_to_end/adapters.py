# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters and checkpoints as plain Python lists: to write adapters, and to merge them independently."""
import json
import pathlib
import random
import struct

FORMATS = {"F32": ("f", 4), "F16": ("e", 2), "BF16": (None, 2), "I32": ("i", 4)}
PREFIX = "base_model.model."


def to_floats(dtype, data):
    code, size = FORMATS[dtype]
    if dtype == "BF16":
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        return list(struct.unpack(f"<{len(halves)}f", struct.pack(f"<{len(halves)}I", *(h << 16 for h in halves))))
    return list(struct.unpack(f"<{len(data) // size}{code}", data))


def read_file(path):
    """{name: (dtype, shape, bytes)}"""
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    result = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        result[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return result


def read_model(directory):
    tensors = {}
    for path in sorted(pathlib.Path(directory).glob("*.safetensors")):
        tensors.update(read_file(path))
    return tensors


def write_file(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


class Adapter:
    """Random pairs for modules {name: (out, in)}."""

    def __init__(self, modules, rank=4, alpha=8, seed=1, size=0.1):
        generator = random.Random(seed)
        self.rank = rank
        self.config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
                       "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
                       "target_modules": sorted({name.split(".")[-1] for name in modules}), "modules_to_save": None,
                       "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": "model"}
        self.pairs = {}
        for name, (out, width) in modules.items():
            def values(count):  # as float32, so that everyone computes with the same numbers
                exact = [generator.gauss(0, size) for _ in range(count)]
                return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}f", *exact)))
            self.pairs[name] = (values(rank * width), values(out * rank), out, width)

    def write(self, directory):
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        tensors = {}
        for name, (a, b, out, width) in self.pairs.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = ("F32", [self.rank, width], struct.pack(f"<{len(a)}f", *a))
            tensors[f"{PREFIX}{name}.lora_B.weight"] = ("F32", [out, self.rank], struct.pack(f"<{len(b)}f", *b))
        write_file(directory / "adapter_model.safetensors", tensors)
        return directory

    def merged(self, name, weights):
        """W + alpha / r B A in double."""
        a, b, out, width = self.pairs[name]
        scale = self.config["lora_alpha"] / self.rank
        columns = [a[i::width] for i in range(width)]
        result = []
        for o in range(out):
            row = b[o * self.rank:(o + 1) * self.rank]
            base = o * width
            result += [weights[base + i] + scale * sum(x * y for x, y in zip(row, column))
                       for i, column in enumerate(columns)]
        return result
