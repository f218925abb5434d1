# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: kilin run, eval, chat and info with --lora, kilin merge; against weights merged in Python."""
import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

from adapters import PREFIX, Adapter, read_file, read_model, to_floats, write_file
from support import DOCS, ROOT, TINY, ModelCopy, TestCase, kilin

# Python with transformers and peft, if there is one: KILIN_TRANSFORMERS_PYTHON, else that of .venv.
PYTHON = os.environ.get("KILIN_TRANSFORMERS_PYTHON", str(ROOT / ".venv/bin/python"))
PEFT = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
directory, out, ids, stabilised = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4] == "1"
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
targets = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, use_rslora=stabilised)
model = get_peft_model(model, config).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.mul_(0.3)
    values = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
model.save_pretrained(out)
print(-float(values[:-1].gather(1, torch.tensor(ids)[1:, None]).mean()))
"""


def has_peft():
    if not pathlib.Path(PYTHON).exists():
        return False
    return subprocess.run([PYTHON, "-c", "import torch, transformers, peft"], capture_output=True).returncode == 0


IDS = [(7 * i + 3) % 200 for i in range(90)]
# Every kind of matrix: KDA's projections and gates, latent attention, dense MLP, experts, shared, router, head.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj",
         "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate", "lm_head")


def matrices(model, kinds=KINDS):
    found = {}
    for name, (_, shape, _) in read_model(model).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.split(".")[-1] in kinds and len(shape) == 2:
            found[module] = tuple(shape)
    return found


class Lora(TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="kilin-lora-")
        self.addCleanup(temporary.cleanup)
        self.directory = pathlib.Path(temporary.name)
        self.ids = self.directory / "a.ids"
        self.ids.write_text(" ".join(map(str, IDS)))

    def adapter(self, model=TINY, **options):
        adapter = Adapter(matrices(model), **options)
        return adapter, adapter.write(self.directory / "adapter")

    def loss(self, model, *arguments):
        return self.run_json("eval", "perplexity", model, "--ids", self.ids, "--cache-type", "f32", *arguments)["loss"]

    def greedy(self, model, *arguments):
        ids = ",".join(map(str, IDS[:20]))
        return self.run_json("run", model, "--prompt-ids", ids, "-n", 8, "--ignore-eos", *arguments)["ids"]

    def test_every_kind_of_matrix_is_there(self):
        self.assertEqual({name.split(".")[-1] for name in matrices(TINY)}, set(KINDS))

    def test_is_the_model_that_python_merged(self):
        adapter, path = self.adapter()
        tensors = read_file(TINY / "model.safetensors")
        for module in adapter.pairs:
            dtype, shape, data = tensors[f"{module}.weight"]
            merged = adapter.merged(module, to_floats(dtype, data))
            tensors[f"{module}.weight"] = ("F32", shape, struct.pack(f"<{len(merged)}f", *merged))
        with ModelCopy(TINY) as model:
            write_file(model.file("model.safetensors"), tensors)
            loss, ids = self.loss(model.path), self.greedy(model.path)
        self.assertAlmostEqual(self.loss(TINY, "--lora", path), loss, delta=2e-6 * loss)
        self.assertEqual(self.greedy(TINY, "--lora", path), ids)
        self.assertGreater(abs(self.loss(TINY) - loss), 0.01)
        out = self.directory / "merged"
        self.assertEqual(kilin("merge", TINY, path, out).returncode, 0)
        self.assertAlmostEqual(self.loss(out), loss, delta=2e-6 * loss)
        written = read_model(out)
        self.assertEqual(written.keys(), tensors.keys())
        for name, (dtype, shape, data) in tensors.items():
            self.assertEqual(written[name][0], dtype, name)
            self.assertEqual([x for x in written[name][1] if x != 1], [x for x in shape if x != 1], name)
            for found, expected in zip(to_floats(dtype, written[name][2]), to_floats(dtype, data)):
                self.assertAlmostEqual(found, expected, delta=1e-6)

    def test_bfloat16_sums_are_rounded_once(self):
        some = {name: shape for name, shape in matrices(DOCS, ("f_b_proj", "kv_b_proj", "w2")).items()
                if ".experts." not in name or ".experts.3." in name}
        adapter = Adapter(some, size=0.05)
        path = adapter.write(self.directory / "adapter")
        out = self.directory / "merged"
        result = kilin("merge", DOCS, path, out)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn(f"{len(some)} matrices changed".encode(), result.stderr)
        before, after = read_model(DOCS), read_model(out)
        self.assertEqual(before.keys(), after.keys())
        for name, (dtype, _, data) in before.items():
            self.assertEqual(after[name][0], dtype, name)
            module = name.removesuffix(".weight")
            if module not in some:
                self.assertEqual(after[name][2], data, name)
                continue
            exact = adapter.merged(module, to_floats(dtype, data))
            for found, expected in zip(to_floats(dtype, after[name][2]), exact):
                self.assertLessEqual(abs(found - expected), 2**-8 * abs(expected) * 1.0001 + 1e-9, name)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja",
                     "generation_config.json", "special_tokens_map.json"):
            self.assertEqual((out / name).read_bytes(), (DOCS / name).read_bytes(), name)
        rounded, exact = self.loss(out), self.loss(DOCS, "--lora", path)
        self.assertAlmostEqual(rounded, exact, delta=0.02)
        self.assertAlmostEqual(self.loss(self.merge_f32(path)), exact, delta=2e-6 * exact)
        self.assertNotEqual(self.loss(DOCS), exact)

    def merge_f32(self, path):
        out = self.directory / "merged32"
        self.assertEqual(kilin("merge", DOCS, path, out, "--type", "f32").returncode, 0)
        return out

    def test_scales_and_several_adapters(self):
        adapter, path = self.adapter()
        half = self.loss(TINY, "--lora", f"{path}:0.5")
        adapter.config["lora_alpha"] /= 2
        halved = adapter.write(self.directory / "halved")
        self.assertEqual(self.loss(TINY, "--lora", halved), half)
        self.assertEqual(self.loss(TINY, "--lora", f"{path}:0"), self.loss(TINY))
        twice = self.loss(TINY, "--lora", halved, "--lora", halved)
        self.assertAlmostEqual(twice, self.loss(TINY, "--lora", path), delta=2e-6 * twice)
        with_colon = self.directory / "name:2"
        shutil.copytree(path, with_colon)
        self.assertEqual(self.loss(TINY, "--lora", with_colon), self.loss(TINY, "--lora", path))
        self.assert_refused(kilin("run", TINY, "--prompt-ids", "1", "--lora", f"{path}:x"), "'x'", "expected a number")
        self.assertAlmostEqual(self.loss(TINY, "--lora", f"{self.rank_stabilised(adapter)}"), half, delta=2e-6 * half)

    def rank_stabilised(self, adapter):
        adapter.config.update(use_rslora=True, lora_alpha=adapter.config["lora_alpha"] / adapter.rank ** 0.5)
        return adapter.write(self.directory / "rs")

    def test_quantised_weights(self):
        adapter, path = self.adapter()
        gguf = self.directory / "m.gguf"
        self.assertEqual(kilin("quantize", TINY, gguf, "--type", "q8_0").returncode, 0)
        exact, quantised = self.loss(TINY, "--lora", path), self.loss(gguf, "--lora", path)
        self.assertAlmostEqual(quantised, exact, delta=0.02)
        self.assertNotEqual(quantised, self.loss(gguf))
        out = self.directory / "merged"
        result = kilin("merge", gguf, path, out, "--type", "f32")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertAlmostEqual(self.loss(out), quantised, delta=2e-6 * quantised)

    def test_info_and_chat_say_and_take_it(self):
        adapter = Adapter(matrices(DOCS, ("q_proj",)), size=1.0)
        path = adapter.write(self.directory / "adapter")
        text = kilin("info", DOCS, "--lora", path).stdout.decode()
        self.assertIn("rank 4, times 2, 8 matrices, now float32", text)
        answers = [kilin("chat", DOCS, "--temperature", 0, "-n", 12, *extra, stdin=b"What is a tty?\n").stdout
                   for extra in ((), ("--lora", path), ("--lora", f"{path}:0"))]
        self.assertEqual(answers[0], answers[2])
        self.assertNotEqual(answers[0], answers[1])

    @unittest.skipUnless(has_peft(), "no Python with transformers and peft")
    def test_adapters_of_peft_itself(self):
        """On every Linear of transformers' class, whose names for some modules are not Moonshot's."""
        for stabilised in ("0", "1"):
            path = self.directory / f"peft{stabilised}"
            command = [PYTHON, "-c", PEFT, DOCS, path, json.dumps(IDS), stabilised]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            self.assertEqual(done.returncode, 0, done.stderr)
            expected = float(done.stdout.split()[-1])
            self.assertAlmostEqual(self.loss(DOCS, "--lora", path), expected, delta=2e-6 * expected)
            self.assertGreater(abs(self.loss(DOCS) - expected), 1e-3)

    def test_bad_adapters_are_refused(self):
        def refused(damage, *words):
            adapter, path = self.adapter()
            damage(adapter, path)
            self.assert_refused(kilin("run", TINY, "--prompt-ids", "1,2", "--lora", path), *words)
            out = self.directory / "out"
            self.assert_refused(kilin("merge", TINY, path, out), *words)
            self.assertFalse(out.exists())
            shutil.rmtree(path, ignore_errors=True)

        def rewrite(change):
            def damage(_, path):
                tensors = read_file(path / "adapter_model.safetensors")
                change(tensors)
                write_file(path / "adapter_model.safetensors", tensors)
            return damage

        head = PREFIX + "lm_head.lora_A.weight"
        refused(lambda _, path: shutil.rmtree(path), "no directory")
        refused(lambda _, path: (path / "adapter_config.json").unlink(), "adapter_config.json")
        refused(lambda _, path: (path / "adapter_config.json").write_text("{"), "adapter_config.json", "line 1")
        refused(lambda _, path: os.truncate(path / "adapter_model.safetensors", 50_000), "adapter_model.safetensors")
        refused(rewrite(lambda t: t.pop(head)), head, "missing")
        refused(rewrite(lambda t: t.update({head: ("F32", [4, 1], bytes(16))})), "lm_head", "expected [")
        refused(rewrite(lambda t: t.update({head: ("F32", [2, 2], bytes(16))})), head, "[2, 2]")
        refused(rewrite(lambda t: t.update({head: ("I32", t[head][1], t[head][2])})), head, "I32")
        refused(rewrite(lambda t: t.update({head.replace("lm_head", "model.layers.77.mlp.gate_proj"): t[head]})),
                "model.layers.77.mlp.gate_proj", "missing")
        adapter = Adapter(matrices(TINY, ("q_proj",))).write(self.directory / "tiny")
        self.assert_refused(kilin("run", DOCS, "--prompt-ids", "1,2", "--lora", adapter), "q_proj", "expected [256, 256]")

    def test_merge_writes_whole_directories_or_none(self):
        _, path = self.adapter()
        out = self.directory / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        self.assert_refused(kilin("merge", TINY, path, out), str(out), "--force")
        result = kilin("merge", TINY, path, out, "--force")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual((out / "notes.txt").read_text(), "mine")
        self.assertEqual(json.loads((out / "config.json").read_text()), json.loads((TINY / "config.json").read_text()))
        self.assertEqual([p.name for p in self.directory.iterdir() if "out" in p.name], ["out"])
        self.assert_wrong_usage(kilin("merge", TINY, path, out, "--type", "q8_0"), "q8_0")


if __name__ == "__main__":
    unittest.main()
