# SPDX-License-Identifier: Apache-2.0
"""tools/make_finetuning_data.py: what it writes is the same every time, held-out texts are new, kilin takes the files."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

from support import DOCS, ROOT, TestCase

TOOL = ROOT / "tools/make_finetuning_data.py"


def make(directory, *arguments):
    command = [sys.executable, TOOL, directory, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def texts(path):
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["messages"][0]["content"]: record["messages"][1]["content"] for record in records}


class FinetuningData(TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="kilin-ft-")
        self.addCleanup(temporary.cleanup)
        self.directory = pathlib.Path(temporary.name)

    def test_files(self):
        out, again, other = (self.directory / name for name in ("a", "b", "c"))
        for directory, arguments in ((out, ()), (again, ()), (other, ("--seed", 2))):
            result = make(directory, *arguments)
            self.assertEqual(result.returncode, 0, result.stderr)
        names = sorted(path.name for path in out.iterdir())
        self.assertEqual(names, ["LICENCES.txt", "field_train.jsonl", "field_valid.jsonl", "source_train.jsonl",
                                 "source_valid.jsonl"])
        for name in names:
            self.assertEqual((out / name).read_bytes(), (again / name).read_bytes(), name)
        self.assertNotEqual((out / names[1]).read_bytes(), (other / names[1]).read_bytes())
        for task in ("source", "field"):
            train, valid = texts(out / f"{task}_train.jsonl"), texts(out / f"{task}_valid.jsonl")
            self.assertFalse(set(train) & set(valid))
            self.assertGreater(len(train), 50)
            self.assertGreater(len(valid), 20)
        self.assertEqual(set(texts(out / "source_valid.jsonl").values()), set(texts(out / "source_train.jsonl").values()))
        for question, answer in texts(out / "field_valid.jsonl").items():
            self.assertIn(answer, question)
        report = self.run_json("eval", "classification", DOCS, "--jsonl", out / "source_valid.jsonl", "--limit", 20)
        self.assertEqual(report["records"], 20)
        report = self.run_json("eval", "extraction", DOCS, "--jsonl", out / "field_valid.jsonl", "--limit", 2, "-n", 4)
        self.assertEqual(report["records"], 2)

    def test_a_corpus_without_collections_is_refused(self):
        corpus = self.directory / "text.txt"
        corpus.write_text("something else\f" * 5)
        result = make(self.directory / "out", "--corpus", corpus)
        self.assertEqual(result.returncode, 1)
        self.assertIn("text.txt: found 0 known collections", result.stderr)
        self.assertFalse((self.directory / "out").exists())


if __name__ == "__main__":
    unittest.main()
