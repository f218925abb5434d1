# SPDX-License-Identifier: Apache-2.0
"""Small training runs for the end-to-end tests."""
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

from support import BINARY, ROOT, TestCase, kilin

# KDA and MLA layers, dense and mixture-of-experts MLPs: every kind of parameter.
SMALL = """
[run]
out = "run"
steps = 12
threads = 1
log_every = 1
save_every = 4
keep = 9
[model]
vocab_size = 64
hidden_size = 32
num_hidden_layers = 4
layers = "3:1"
intermediate_size = 64
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
num_experts = 4
num_experts_per_token = 2
num_shared_experts = 1
moe_intermediate_size = 16
first_k_dense_replace = 1
routed_scaling_factor = 2.446
[model.linear_attn_config]
num_heads = 2
head_dim = 16
short_conv_kernel_size = 4
[data]
kind = "synthetic"
task = "palindrome"
vocabulary = 64
sequence = 32
valid_sequences = 8
[batch]
sequences = 8
[optimizer]
lr = 1e-3
[schedule]
kind = "wsd"
warmup = 2
decay = 4
"""


def write_kbin(path, ids, vocabulary=64, bos=-1, eos=-1, tokenizer_hash=0):
    """A token file (src/train/token_file.h)."""
    header = b"KILINTOK" + struct.pack("<IIQQQQii", 1, 2, vocabulary, tokenizer_hash, len(ids), 1, bos, eos)
    digest = 0xcbf29ce484222325
    for byte in header:
        digest = (digest ^ byte) * 0x100000001b3 % 2**64
    path.write_bytes(header + struct.pack("<Q", digest) + struct.pack(f"<{len(ids)}H", *ids))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TrainCase(TestCase):
    """Each test has a directory of its own, self.dir, with a configuration, self.config."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory(prefix="kilin-train-")
        self.addCleanup(self.temporary.cleanup)
        self.dir = pathlib.Path(self.temporary.name)
        self.config = self.write("small.toml", SMALL)

    def write(self, name, text):
        path = self.dir / name
        path.write_text(text, encoding="utf-8")
        return path

    def arguments(self, out, *sets, config=None):
        arguments = ["train", "--config", config or self.config, "--out", self.dir / out]
        for assignment in sets:
            arguments += ["--set", assignment]
        return arguments

    def train(self, out, *sets, config=None, flags=(), timeout=600):
        """Trains; the object that --json prints."""
        result = kilin(*self.arguments(out, *sets, config=config), "--json", *flags, timeout=timeout)
        self.assertEqual(result.returncode, 0, result.stderr.decode(errors="replace"))
        return json.loads(result.stdout.decode().splitlines()[-1])

    def refuse(self, out, *sets, config=None, flags=()):
        """The error line of a run that is refused."""
        result = kilin(*self.arguments(out, *sets, config=config), *flags)
        errors = result.stderr.decode(errors="replace")
        self.assertEqual(result.returncode, 1, errors)
        self.assertEqual(result.stdout, b"")
        self.assertTrue(errors.splitlines()[-1].startswith("kilin: error: "), errors)
        return errors.splitlines()[-1]

    def start(self, out, *sets, flags=(), env=None):
        command = [BINARY, *map(str, self.arguments(out, *sets)), *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, **(env or {})})
        self.addCleanup(self.stop, process)
        return process

    @staticmethod
    def stop(process):
        if process.poll() is None:
            process.kill()
        process.communicate()

    def log(self, out, key="loss"):
        """{step: value} of the run's log."""
        records = [json.loads(line) for line in (self.dir / out / "log.jsonl").read_text().splitlines()]
        return {record["step"]: record[key] for record in records if key in record}

    def steps(self, out):
        return sorted(int(path.name[5:]) for path in (self.dir / out).glob("step-*"))

    def checkpoint(self, out, step):
        return self.dir / out / f"step-{step:06}"

    def assert_same_files(self, first, second, names=("model.safetensors", "optimizer.safetensors", "config.json")):
        for name in names:
            self.assertEqual((first / name).read_bytes(), (second / name).read_bytes(), name)
