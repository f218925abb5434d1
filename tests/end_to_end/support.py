# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests share: running the program, reading and changing checkpoints."""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("KILIN_BINARY", str(ROOT / "build/release/kilin"))
DOCS = ROOT / "models/kilin-docs-10m"
REFERENCE = ROOT / "tests/data/reference"
TINY = REFERENCE / "tiny-random"
TIMEOUT = 120


def kilin(*arguments, stdin=b"", timeout=TIMEOUT, env=None):
    """The finished process: returncode, stdout and stderr as bytes."""
    command = [BINARY, *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, env=environment)


def read_safetensors(path):
    """All integer and float tensors as flat lists, and the metadata."""
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    metadata = header.pop("__metadata__", {})
    formats = {"I32": "i", "F32": "f", "F64": "d", "I64": "q"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] in formats:
            code = formats[entry["dtype"]]
            tensors[name] = list(struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", data[begin:end]))
    return tensors, metadata


def golden(name):
    return read_safetensors(REFERENCE / "goldens" / f"{name}.safetensors")


class ModelCopy:
    """A checkpoint in a temporary directory, to be damaged. Files are copied, so the original stays."""

    def __init__(self, source):
        self.temporary = tempfile.TemporaryDirectory(prefix="kilin-test-")
        self.path = pathlib.Path(self.temporary.name) / "model"
        shutil.copytree(source, self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.temporary.cleanup()

    def file(self, name):
        return self.path / name

    def change_json(self, name, change):
        value = json.loads(self.file(name).read_text(encoding="utf-8"))
        change(value)
        self.file(name).write_text(json.dumps(value), encoding="utf-8")

    def change_header(self, change, name="model.safetensors"):
        """Rewrites the JSON header of a safetensors file; the data stay as they are."""
        data = self.file(name).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
        change(header)
        text = json.dumps(header).encode()
        self.file(name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])

    def change_data(self, tensor, change, name="model.safetensors"):
        """change(bytearray) on the data of one tensor."""
        data = bytearray(self.file(name).read_bytes())
        size = struct.unpack("<Q", data[:8])[0]
        begin, end = (8 + size + offset for offset in json.loads(data[8:8 + size])[tensor]["data_offsets"])
        piece = data[begin:end]
        change(piece)
        data[begin:end] = piece
        self.file(name).write_bytes(data)


class TestCase(unittest.TestCase):
    maxDiff = None

    def run_json(self, *arguments, **options):
        """Runs with --json, expects success, returns the object of the last line of stdout."""
        result = kilin(*arguments, "--json", **options)
        self.assertEqual(result.returncode, 0, result.stderr.decode(errors="replace"))
        return json.loads(result.stdout.decode().splitlines()[-1])

    def assert_refused(self, result, *words):
        """Exit code 1 and one line on stderr that says what is wrong, naming `words`; nothing on stdout."""
        errors = result.stderr.decode(errors="replace")
        self.assertEqual(result.returncode, 1, errors)
        self.assertEqual(errors.count("\n"), 1, errors)
        self.assertTrue(errors.startswith("kilin: error: ") and errors.endswith("\n"), errors)
        for word in words:
            self.assertIn(word, errors)
        self.assertEqual(result.stdout, b"")

    def assert_wrong_usage(self, result, *words):
        errors = result.stderr.decode(errors="replace")
        self.assertEqual(result.returncode, 2, errors)
        self.assertTrue(errors.startswith("kilin: error: "), errors)
        self.assertIn("--help", errors)
        for word in words:
            self.assertIn(word, errors)
        self.assertEqual(result.stdout, b"")
