# SPDX-License-Identifier: Apache-2.0
"""What surrounds training and needs no libtorch: kilin tokenize, plot and train --dry-run, and every way to get a
configuration wrong, each refused in one line with the place and the key before anything is trained."""
import json
import os
import re
import shutil
import struct
import subprocess
import unittest

from support import BINARY, DOCS, ROOT, TINY, kilin
from train_support import SMALL, TrainCase, write_kbin

# (what SMALL's text becomes, words of the error); LINE is replaced by the number of the line with the mark "# here".
BAD = {
    "unknown section": ("[optimiser]\nlr = 1  # here\n", ["key 'optimiser' is unknown"]),
    "unknown key": ("lr = 1e-3", "lr = 1e-3\nbeta3 = 0.9  # here", ["LINE", "key 'optimizer.beta3' is unknown"]),
    "unknown key at the top": ("[run]", "colour = 1  # here\n[run]", ["LINE", "key 'colour' is unknown"]),
    "unknown shape key": ("hidden_size = 32", "hidden_size = 32\nhiden = 1  # here", ["LINE", "key 'model.hiden' is unknown"]),
    "text for a number": ("lr = 1e-3", 'lr = "0.001"  # here', ["LINE", "optimizer.lr", "a number from 0 to 10"]),
    "fraction for a whole number": ("steps = 12", "steps = 12.5  # here", ["LINE", "run.steps", "12.5", "a whole number"]),
    "number for a text": ('kind = "wsd"', "kind = 3  # here", ["LINE", "schedule.kind", '"wsd" or "cosine" or "constant"']),
    "number for a section": ("[schedule]\nkind = \"wsd\"\nwarmup = 2\ndecay = 4\n", "", "schedule = 5  # here\n",
                             ["LINE", "key 'schedule'", "a section"]),
    "negative steps": ("steps = 12", "steps = -1  # here", ["LINE", "run.steps", "-1"]),
    "no steps": ("steps = 12\n", "", ["key 'run.steps' is missing"]),
    "no rate": ("lr = 1e-3\n", "", ["key 'optimizer.lr' is missing"]),
    "no data": ('kind = "synthetic"\n', "", ["key 'data.kind' is missing"]),
    "unknown task": ('"palindrome"', '"sorting"  # here', ["LINE", "data.task", '"palindrome", "mqar" or "stack"']),
    "odd palindrome": ("sequence = 32", "sequence = 31", ["[data]", "31"]),
    "vocabulary above the model's": ("vocabulary = 64", "vocabulary = 65  # here", ["LINE", "data.vocabulary", "65", "64"]),
    "no layers": ('layers = "3:1"\n', "", ["key 'model.layers' is missing"]),
    "no ratio": ('layers = "3:1"', 'layers = "3:x"  # here', ["LINE", "model.layers", "a ratio"]),
    "unknown layer": ('layers = "3:1"', 'layers = ["kda", "mamba"]  # here', ["LINE", "model.layers", "mamba"]),
    "head too wide": ("\nhead_dim = 16", "\nhead_dim = 512  # here", ["LINE", "model.linear_attn_config.head_dim", "512"]),
    "width missing": ("intermediate_size = 64\n", "", ["intermediate_size"]),
    "experts chosen above experts": ("num_experts_per_token = 2", "num_experts_per_token = 5  # here",
                                     ["LINE", "model.num_experts_per_token", "5"]),
    "value heads no multiple": ("num_heads = 2", "num_heads = 2\nnum_value_heads = 3  # here",
                                ["LINE", "num_value_heads", "a multiple"]),
    "checkpoint without config": ("vocab_size = 64", 'checkpoint = "/nowhere"  # here', ["LINE", "model.checkpoint", "/nowhere/config.json"]),
    "batch not divisible": ("\nsequences = 8", "\nsequences = 8\naccumulate = 3  # here", ["LINE", "batch.accumulate", "8 sequences"]),
    "batch tokens no multiple": ("\nsequences = 8", "\ntokens = 100  # here", ["LINE", "batch.tokens", "32 tokens"]),
    "warm-up above the run": ("warmup = 2", "warmup = 13  # here", ["LINE", "schedule.warmup", "12 steps"]),
    "lora without a checkpoint": ("[schedule]", '[lora]\ntargets = ["q_proj"]\n[schedule]', ["model.checkpoint", "[lora]"]),
    "no TOML": ("steps = 12", "steps = = 12  # here", ["LINE"]),
    "the same key twice": ("steps = 12", "steps = 12\nsteps = 13  # here", ["LINE"]),
    "a date": ("steps = 12", "steps = 2026-01-01  # here", ["LINE", "run.steps".split(".")[1], "a date"]),
}


class BadConfigurations(TrainCase):
    def refuse_text(self, text, *words):
        path = self.write("bad.toml", text)
        lines = [f"bad.toml:{number}:" for number, line in enumerate(text.split("\n"), 1) if "# here" in line]
        error = self.refuse("out", config=path, flags=("--dry-run",))
        for word in words:
            self.assertIn(lines[0] if word == "LINE" else word, error)
        self.assertFalse((self.dir / "out").exists())

    def test_each(self):
        self.assertGreater(len(BAD), 25)
        for name, (*change, words) in BAD.items():
            with self.subTest(name):
                if len(change) == 1:
                    text = SMALL + change[0]
                else:
                    self.assertIn(change[0], SMALL)
                    text = SMALL.replace(change[0], change[1], 1)
                    text = "".join(change[2:]) + text
                self.refuse_text(text, *words)

    def data(self, data, model=""):
        text = SMALL
        if model:
            text = text[:text.index("[model]")] + model + text[text.index("[data]"):]
        begin, end = text.index("[data]"), text.index("[batch]")
        return text[:begin] + "[data]\n" + data + "sequence = 32\n" + text[end:]

    def test_data_files(self):
        docs = f'[model]\ncheckpoint = "{DOCS}"\n'
        good, bad = self.dir / "good.kbin", self.dir / "bad.kbin"
        write_kbin(good, [1] * 100)
        cases = {
            "missing": ("/nowhere.kbin", "", ["LINE", "data.train", "does not exist"]),
            "no token file": (self.write("text.txt", "The text of a file, longer than any header is. " * 3), "",
                              ["LINE", "data.train", "is no token file"]),
            "another tokenizer": (good, docs, ["LINE", "another tokenizer"]),
        }
        for name, (path, model, words) in cases.items():
            with self.subTest(name):
                self.refuse_text(self.data(f'kind = "tokens"\ntrain = "{path}"  # here\n', model), *words)
        write_kbin(bad, [1] * 100, vocabulary=65)
        self.refuse_text(self.data(f'kind = "tokens"\ntrain = "{bad}"  # here\n'), "LINE", "a vocabulary of 65", "64")
        write_kbin(bad, [1] * 20)
        self.refuse_text(self.data(f'kind = "tokens"\ntrain = "{bad}"  # here\n'), "LINE", "found 20 tokens", "33")
        good.write_bytes(good.read_bytes()[:-3])
        self.refuse_text(self.data(f'kind = "tokens"\ntrain = "{good}"  # here\n'), "LINE", "is the file cut off?")
        text = self.write("t.txt", "words " * 100)
        self.refuse_text(self.data(f'kind = "text"\ntrain = "{text}"\n'), "model.tokenizer")
        self.refuse_text(self.data(f'kind = "text"\ntrain = "{text}"\n') .replace("[model]", f'[model]\ntokenizer = "{DOCS}"'),
                         "model.tokenizer", "8192", "64")

    def test_command_line(self):
        self.assert_wrong_usage(kilin("train"), "--config")
        self.assert_refused(kilin("train", "--config", "/nowhere.toml"), "/nowhere.toml")
        self.assert_refused(kilin(*self.arguments("out", "optimizer.lr")), "--set optimizer.lr: expected SECTION.KEY=VALUE")
        self.assert_refused(kilin(*self.arguments("out", "optimizer.lr=fast")), "--set optimizer.lr", "fast")

    def test_include_and_set(self):
        self.write("top.toml", 'include = "small.toml"\n[run]\nsteps = 20\n')
        plan = json.loads(kilin(*self.arguments("out", "batch.sequences=4", config=self.dir / "top.toml"), "--dry-run",
                                "--json").stdout)
        self.assertEqual((plan["steps"], plan["tokens_per_step"]), (20, 128))
        self.write("cycle.toml", 'include = "cycle.toml"\n')
        self.assertIn("include", self.refuse("out", config=self.dir / "cycle.toml"))


class Shipped(TrainCase):
    def plan(self, path, data=None):
        command = [BINARY, "train", "--config", path, "--dry-run", "--json"]
        for key in ("train", "valid") if data else ():
            command += ["--set", f"data.{key}={data}"]
        return subprocess.run(list(map(str, command)), capture_output=True, cwd=ROOT)

    def test_every_configuration_is_sound(self):
        """configs/: each is read and planned, with other data where its own has to be made first."""
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        self.write("chat.jsonl", json.dumps(chat) + "\n")
        made = kilin("tokenize", DOCS, "--text", ROOT / "README.md", ROOT / "CONTRIBUTING.md", "--out", self.dir / "tokens.kbin")
        self.assertEqual(made.returncode, 0, made.stderr)
        paths = sorted(path for path in (ROOT / "configs").rglob("*.toml") if path.parent.name != "parts")
        self.assertGreater(len(paths), 15)
        for path in paths:
            with self.subTest(path.name):
                result = self.plan(path)
                if b"key 'data.train': file" in result.stderr and b"does not exist" in result.stderr:
                    result = self.plan(path, self.dir / "tokens.kbin")
                    if result.returncode != 0:
                        result = self.plan(path, self.dir / "chat.jsonl")
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertGreater(json.loads(result.stdout)["tokens"], 0)


class Tokenize(TrainCase):
    def test_stream_of_documents(self):
        text = self.write("t.txt", "The Linux kernel.\fA second document, with ünïcode\n")
        out = self.dir / "t.kbin"
        summary = self.run_json("tokenize", DOCS, "--text", text, "--out", out)
        data = out.read_bytes()
        ids = struct.unpack(f"<{(len(data) - 64) // 2}H", data[64:])
        self.assertEqual(summary["documents"], 2)
        self.assertEqual(summary["tokens"], len(ids))
        self.assertEqual((ids[0], ids[-1]), (7936, 7937))
        self.assertEqual(ids.count(7936), 2)
        self.assertEqual(data[:8], b"KILINTOK")
        jsonl = self.write("t.jsonl", "\n".join(json.dumps({"body": part}) for part in text.read_text().split("\f")))
        again = self.dir / "u.kbin"
        self.run_json("tokenize", DOCS, "--jsonl", jsonl, "--field", "body", "--out", again)
        self.assertEqual(again.read_bytes(), data)
        piped = kilin("tokenize", DOCS, "--text", "-", "--out", self.dir / "v.kbin", stdin=text.read_bytes())
        self.assertEqual(piped.returncode, 0, piped.stderr)
        self.assertEqual((self.dir / "v.kbin").read_bytes(), data)

    def test_bad_input_writes_nothing(self):
        out = self.dir / "t.kbin"
        bad = self.dir / "bad.txt"
        bad.write_bytes(b"good text \xff\xfe")
        self.assert_refused(kilin("tokenize", DOCS, "--text", bad, "--out", out), "bad.txt")
        self.assert_refused(kilin("tokenize", TINY, "--text", bad, "--out", out), "tokenizer.json")
        self.assert_refused(kilin("tokenize", DOCS, "--text", self.dir / "none", "--out", out), "none")
        self.assert_wrong_usage(kilin("tokenize", DOCS, "--out", out), "--text or --jsonl")
        self.assertEqual(sorted(path.name for path in self.dir.iterdir()), ["bad.txt", "small.toml"])


class Plot(TrainCase):
    def test_draws(self):
        if shutil.which("gnuplot") is None:
            self.skipTest("gnuplot is not installed")
        for name in ("one", "two"):
            (self.dir / name).mkdir()
            records = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 50)]
            (self.dir / name / "log.jsonl").write_text("\n".join(records) + "\n")
        result = kilin("plot", self.dir / "one", self.dir / "two", "--out", self.dir / "p.svg", "--title", "It's <a> \"plot\"")
        self.assertEqual(result.returncode, 0, result.stderr)
        svg = (self.dir / "p.svg").read_text()
        for word in ("one", "two", "training loss", "update", "plot"):
            self.assertIn(word, svg)
        self.assert_refused(kilin("plot", self.dir / "one", "--out", self.dir / "p.gif"), "p.gif", ".svg or .png")
        self.assert_refused(kilin("plot", self.dir / "one", "--y", "accuracy", "--out", self.dir / "q.svg"), "accuracy")
        self.assert_refused(kilin("plot", self.dir / "three", "--out", self.dir / "q.svg"), "three")
        self.assert_wrong_usage(kilin("plot", self.dir / "one", "--label", "a", "b", "--out", "x.svg"), "--label")

    def test_without_gnuplot(self):
        (self.dir / "log.jsonl").write_text('{"step":1,"loss":1}\n')
        result = kilin("plot", self.dir, "--out", self.dir / "p.svg", env={"PATH": "/nowhere"})
        self.assert_refused(result, "gnuplot is not installed", "gnuplot-nox")


class WithoutTraining(TrainCase):
    def test_says_how_to_get_it(self):
        result = kilin(*self.arguments("run", "run.steps=1", "schedule.warmup=0", "schedule.decay=0"))
        if result.returncode == 0:
            self.skipTest("this build has training")
        self.assert_refused(result, "this build has no training", "cmake --preset train")
        self.assertFalse((self.dir / "run").exists())


if __name__ == "__main__":
    unittest.main()
