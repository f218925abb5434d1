# SPDX-License-Identifier: Apache-2.0
"""kilin train as users run it: it learns, goes on exactly after any stop, and its checkpoints are models."""
import json
import os
import random
import shutil
import signal
import subprocess
import time
import unittest

from support import BINARY, DOCS, ROOT, TINY, ModelCopy, kilin, read_safetensors
from train_support import TrainCase, free_port, write_kbin

TINY_CONFIG = ROOT / "configs/synthetic/palindrome-tiny.toml"
PYTHON = os.environ.get("KILIN_TRANSFORMERS_PYTHON", str(ROOT / ".venv/bin/python"))

# Greedy tokens and the log-probability of each, by transformers.
TRANSFORMERS = """
import json, sys, torch
from transformers import KimiLinearForCausalLM
model, info = KimiLinearForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
ids = json.loads(sys.argv[2])
with torch.no_grad():
    for _ in range(8):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
print(json.dumps(ids[-8:]))
"""


class Learning(TrainCase):
    def test_palindrome_is_learnt(self):
        result = self.train("run", config=TINY_CONFIG)
        self.assertGreater(result["valid_accuracy"], 0.95)
        self.assertLess(result["train_loss"], 0.2)
        accuracy = self.log("run", "accuracy")
        self.assertLess(accuracy[10], 0.2)  # it had to learn
        self.assertGreater(accuracy[600], 0.95)
        # The engine reads the same weights and reverses the text.
        prompt = [5, 9, 12, 30, 7, 8]
        run = kilin("run", result["checkpoint"], "--prompt-ids", ",".join(map(str, prompt + [0])), "-n", "5", "--json")
        self.assertEqual(json.loads(run.stdout)["ids"], prompt[-1:0:-1])

    def test_overfits_one_row(self):
        generator = random.Random(1)
        write_kbin(self.dir / "t.kbin", [generator.randrange(64) for _ in range(65)])
        for optimizer, rate in (("adamw", 0.01), ("muon", 0.01)):
            config = self.tokens_config("t.kbin", sequence=64)
            result = self.train(f"run-{optimizer}", "run.steps=120", "run.save_every=0", "batch.sequences=1",
                                f"optimizer.lr={rate}", f"optimizer.kind={optimizer}", "optimizer.weight_decay=0",
                                "schedule.warmup=5", "schedule.decay=40", config=config)
            self.assertGreater(self.log(f"run-{optimizer}")[1], 3.5)  # log 64 is 4.16
            self.assertLess(result["valid_loss"], 0.05, optimizer)
            self.assertEqual(result["valid_exact"], 1)

    def tokens_config(self, name, sequence):
        text = self.config.read_text()
        begin, end = text.index("[data]"), text.index("[batch]")
        path = self.dir / name
        data = f'[data]\nkind = "tokens"\ntrain = "{path}"\nvalid = "{path}"\nsequence = {sequence}\n'
        return self.write("tokens.toml", text[:begin] + data + text[end:])

    def test_bfloat16_accumulation_and_recomputation_learn_the_same(self):
        base = self.train("base")
        parts = self.train("parts", "batch.accumulate=4")
        again = self.train("again", "precision.checkpoint_activations=true")
        low = self.train("low", "precision.kind=bf16")
        self.assertAlmostEqual(base["valid_loss"], parts["valid_loss"], delta=1e-4)
        self.assert_same_files(self.checkpoint("base", 12), self.checkpoint("again", 12))
        self.assertEqual(base["valid_loss"], again["valid_loss"])
        self.assertAlmostEqual(base["valid_loss"], low["valid_loss"], delta=0.02)
        self.assertNotEqual(base["valid_loss"], low["valid_loss"])


class Checkpoints(TrainCase):
    PROMPT = [3, 17, 40, 9, 0, 9, 40]

    def engine_ids(self, model):
        result = kilin("run", model, "--prompt-ids", ",".join(map(str, self.PROMPT)), "-n", "8", "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)["ids"]

    def test_loads_in_transformers_and_the_engine(self):
        known = subprocess.run([PYTHON, "-c", "from transformers import KimiLinearForCausalLM"], capture_output=True)
        if known.returncode != 0:
            self.skipTest(f"{PYTHON} has no transformers with Kimi Linear")
        for dtype in ("fp32", "bf16"):
            checkpoint = self.train(f"run-{dtype}", f"run.save_dtype={dtype}")["checkpoint"]
            result = subprocess.run([PYTHON, "-c", TRANSFORMERS, checkpoint, json.dumps(self.PROMPT)],
                                    capture_output=True, timeout=300)
            self.assertEqual(result.returncode, 0, result.stderr.decode()[-2000:])
            self.assertEqual(json.loads(result.stdout.decode().splitlines()[-1]), self.engine_ids(checkpoint))

    def test_has_the_tokenizer_of_its_model(self):
        write_kbin(self.dir / "t.kbin", [7936, *range(300), 7937], vocabulary=8192, bos=7936, eos=7937)
        config = self.write("docs.toml", f"""
[run]
out = "x"
steps = 1
threads = 1
save_dtype = "bf16"
[model]
checkpoint = "{DOCS}"
tokenizer = "{DOCS}"
[data]
kind = "text"
train = "{self.write('t.txt', 'The Linux kernel provides a set of ' * 30)}"
sequence = 64
[batch]
sequences = 1
[optimizer]
lr = 1e-6
""")
        checkpoint = self.train("run", config=config)["checkpoint"]
        arguments = ("--prompt", "The Linux kernel", "-n", "12", "--json")
        self.assertEqual(self.run_json("run", checkpoint, *arguments[:-1])["text"],
                         self.run_json("run", DOCS, *arguments[:-1])["text"])
        for name in ("tokenizer.json", "tiktoken.model", "chat_template.jinja"):
            self.assertEqual((DOCS / name).read_bytes(), (self.checkpoint("run", 1) / name).read_bytes())


class Resume(TrainCase):
    FORMS = {"adamw": (), "muon": ("optimizer.kind=muon",),
             "bf16": ("run.save_dtype=bf16", "precision.kind=bf16", "batch.accumulate=2")}

    def test_gives_the_same_bits(self):
        for name, sets in self.FORMS.items():
            with self.subTest(name):
                self.train(f"whole-{name}", *sets)
                self.train(f"parts-{name}", *sets)
                shutil.rmtree(self.checkpoint(f"parts-{name}", 12))
                shutil.rmtree(self.checkpoint(f"parts-{name}", 8))
                self.train(f"parts-{name}", *sets, flags=("--resume",))
                whole, parts = f"whole-{name}", f"parts-{name}"
                self.assert_same_files(self.checkpoint(whole, 12), self.checkpoint(parts, 12))
                for key in ("loss", "grad_norm", "lr", "accuracy", "tokens"):
                    self.assertEqual(self.log(whole, key), self.log(parts, key), key)

    def newest(self, out):
        return max(self.steps(out), default=0) if (self.dir / out).exists() else 0

    def kill_somewhere(self, process, wait_for, generator):
        """SIGKILL a moment after the newest checkpoint is past step `wait_for` (-1: whatever it does then)."""
        while process.poll() is None and self.newest("killed") <= wait_for:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05 if wait_for >= 0 else 0.5))
        self.assertIsNone(process.poll(), "the run ended before it was killed")
        process.kill()
        process.communicate()

    def test_kill_at_any_moment(self):
        """kill -9 at random moments, while starting and while training, each time --resume: the bits of an
        undisturbed run."""
        sets = ("run.steps=300", "run.save_every=1", "run.keep=2", "run.log_every=7")
        self.train("whole", *sets)
        generator = random.Random(2)
        begun = 0
        for kill in range(8):
            process = self.start("killed", *sets, flags=("--resume",))
            self.kill_somewhere(process, begun if kill % 2 == 0 else -1, generator)
            # At most one interval is lost, and what has a checkpoint's name is complete.
            for step in self.steps("killed"):
                state = json.loads((self.checkpoint("killed", step) / "trainer_state.json").read_text())
                self.assertEqual(state["step"], step)
                read_safetensors(self.checkpoint("killed", step) / "optimizer.safetensors")
            newest = self.newest("killed")
            self.assertGreater(newest, begun if kill % 2 == 0 else begun - 1)
            begun = newest
        self.train("killed", *sets, flags=("--resume",))
        self.assertEqual(self.steps("killed"), [299, 300])
        self.assert_same_files(self.checkpoint("whole", 300), self.checkpoint("killed", 300))
        self.assertEqual(self.log("whole"), self.log("killed"))
        self.assertEqual([path.name for path in (self.dir / "killed").glob(".*")], [])

    def test_ctrl_c_saves_and_stops(self):
        sets = ("run.steps=100000", "run.save_every=0", "schedule.warmup=0", "schedule.decay=0")
        process = self.start("run", *sets, flags=("--progress",))
        while b"step 3 " not in process.stderr.readline():
            self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 130, errors)
        self.assertIn(b"interrupted after step", errors)
        steps = self.steps("run")
        self.assertEqual(len(steps), 1)
        result = self.train("run", *sets, f"run.steps={steps[0] + 1}", flags=("--resume", "--accept-changes"))
        self.assertEqual(result["steps"], steps[0] + 1)

    def test_needs_to_be_asked_for(self):
        self.train("run", "run.steps=6")
        self.assertIn("holds checkpoints of a run already: --resume goes on from step 6", self.refuse("run"))

    def test_changed_keys_are_refused(self):
        self.train("run", "run.steps=6")
        error = self.refuse("run", "run.steps=6", "optimizer.lr=0.002", flags=("--resume",))
        self.assertIn("key 'optimizer.lr': 0.001, now 0.002 (--accept-changes", error)
        self.train("run", "run.steps=7", "optimizer.lr=0.002", flags=("--resume", "--accept-changes"))
        # Another shape cannot be accepted.
        error = self.refuse("run", "run.steps=8", "model.hidden_size=48", flags=("--resume", "--accept-changes"))
        self.assertIn("another shape: key 'hidden_size': found 32, expected 48", error)

    def test_damaged_checkpoints_are_refused(self):
        self.train("run", "run.steps=6")
        state = self.checkpoint("run", 6) / "optimizer.safetensors"
        os.truncate(state, 1000)
        self.assertIn("optimizer.safetensors", self.refuse("run", "run.steps=7", flags=("--resume", "--accept-changes")))


class Parallel(TrainCase):
    def test_two_processes_equal_one(self):
        self.train("one", "run.save_every=0")
        port = str(free_port())
        processes = [self.start("two", "run.save_every=0", flags=("--json",),
                                env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]
        outputs = [process.communicate(timeout=300) for process in processes]
        for process, (_, errors) in zip(processes, outputs):
            self.assertEqual(process.returncode, 0, errors.decode(errors="replace"))
        self.assertEqual(outputs[1], (b"", b""))  # only the first one speaks
        one, two = self.log("one"), self.log("two")
        self.assertEqual(set(one), set(two))
        for step, loss in one.items():
            self.assertAlmostEqual(loss, two[step], delta=2e-5 * loss, msg=f"step {step}")
        self.assertEqual(self.log("one", "tokens"), self.log("two", "tokens"))
        first, _ = read_safetensors(self.checkpoint("one", 12) / "model.safetensors")
        second, _ = read_safetensors(self.checkpoint("two", 12) / "model.safetensors")
        self.assertEqual(set(first), set(second))
        for name, values in first.items():
            worst = max(abs(a - b) for a, b in zip(values, second[name]))
            self.assertLess(worst, 2e-3, name)  # AdamW turns rounding of tiny gradients into steps of lr

    def test_a_lost_process_ends_the_others(self):
        port = str(free_port())
        sets = ("run.steps=100000", "run.save_every=0", "schedule.warmup=0", "schedule.decay=0")
        processes = [self.start("lost", *sets, flags=("--progress",),
                                env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]
        while b"step 3 " not in processes[0].stderr.readline():
            self.assertIsNone(processes[0].poll())
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=60)
        self.assertEqual(processes[0].returncode, 1, errors)
        last = errors.decode(errors="replace").splitlines()[-1]
        self.assertTrue(last.startswith("kilin: error: a process of the run is gone"), last)

    def test_environment_is_checked(self):
        for env, word in (({"WORLD_SIZE": "two"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK"),
                          ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
                          ({"WORLD_SIZE": "3", "RANK": "0"}, "batch.sequences")):
            result = kilin(*self.arguments("run"), env=env)
            self.assert_refused(result, word)


class Stops(TrainCase):
    def test_loss_that_is_no_number(self):
        with ModelCopy(TINY) as model:
            def damage(piece):  # finite, but not their squares
                piece[:] = b"\x00\x00\x80\x7e" * (len(piece) // 4)
            model.change_data("model.layers.0.mlp.down_proj.weight", damage)
            text = self.config.read_text()
            begin, end = text.index("[model]"), text.index("[data]")
            config = self.write("nan.toml", text[:begin] + f'[model]\ncheckpoint = "{model.path}"\n' + text[end:])
            error = self.refuse("run", config=config)
        self.assertRegex(error, "step 1: the (loss|norm of the gradients) is nan, training cannot go on")
        self.assertIn("no checkpoint was written yet", error)
        self.assertEqual(self.steps("run"), [])

    def test_divergence_keeps_the_last_good_checkpoint(self):
        sets = ("schedule.kind=constant", "schedule.warmup=0")
        text = self.config.read_text().replace("decay = 4\n", "")
        config = self.write("constant.toml", text)
        self.train("run", *sets, "run.steps=4", config=config)
        error = self.refuse("run", *sets, "run.steps=400", "run.save_every=0", "optimizer.lr=10",
                            "optimizer.weight_decay=10", "optimizer.clip=0", config=config,
                            flags=("--resume", "--accept-changes"))
        self.assertRegex(error, r"step \d+: the (loss|norm of the gradients) is -?(nan|inf)")
        self.assertIn(f"the last good checkpoint is {self.checkpoint('run', 4)}", error)
        self.assertEqual(self.steps("run"), [4])
        result = kilin("run", self.checkpoint("run", 4), "--prompt-ids", "1,2,3", "-n", "2")
        self.assertEqual(result.returncode, 0, result.stderr)


class Runner(TrainCase):
    """scripts/ablate over the shipped configurations, made small: each shape trains."""

    def ablate(self, configs, *sets):
        command = [str(ROOT / "scripts/ablate"), "--kilin", BINARY, "--out", str(self.dir / "table.md")]
        for assignment in ("run.threads=1", "run.save_every=0", f"run.out={self.dir}/{{name}}", *sets):
            command += ["--set", assignment]
        result = subprocess.run([*command, *map(str, configs)], capture_output=True, cwd=ROOT, timeout=600)
        self.assertEqual(result.returncode, 0, result.stderr.decode(errors="replace"))
        table = result.stdout.decode()
        self.assertEqual((self.dir / "table.md").read_text(), table)
        return [line.split("|") for line in table.splitlines()[2:]]

    def test_ablations(self):
        result = kilin("tokenize", DOCS, "--text", ROOT / "CONTRIBUTING.md", "--out", self.dir / "t.kbin")
        self.assertEqual(result.returncode, 0, result.stderr)
        configs = sorted((ROOT / "configs/ablations").glob("*.toml"))
        self.assertEqual(len(configs), 7)
        rows = self.ablate(configs, f"data.train={self.dir}/t.kbin", f"data.valid={self.dir}/t.kbin", "data.sequence=64",
                           "batch.sequences=2",
                           "run.tokens=384", "schedule.warmup=0", "schedule.decay=0", "data.valid_sequences=2")
        self.assertEqual([row[1].strip() for row in rows], [config.stem for config in configs])
        perplexities = [float(row[4]) for row in rows]
        self.assertEqual(len(set(perplexities)), 7)  # seven different models
        for perplexity in perplexities:
            self.assertTrue(1000 < perplexity < 20000, perplexities)

    def test_synthetic_tasks(self):
        configs = sorted((ROOT / "configs/synthetic").glob("*-*.toml"))
        configs = [config for config in configs if not config.stem.endswith("-tiny")]
        self.assertEqual(len(configs), 9)
        rows = self.ablate(configs, "data.sequence=64", "batch.sequences=2", "run.steps=2", "schedule.warmup=0",
                           "schedule.decay=0", "data.valid_sequences=2")
        self.assertEqual({row[5].strip() for row in rows}, {"256"})


class FineTuning(TrainCase):
    def config_of(self, data, more=""):
        return self.write("tune.toml", f"""
[run]
out = "x"
steps = 6
threads = 1
log_every = 1
save_every = 2
keep = 9
[model]
checkpoint = "{DOCS}"
[data]
{data}
sequence = 128
[batch]
sequences = 2
[optimizer]
lr = 1e-3
[schedule]
warmup = 0
decay = 0
{more}
""")

    def chat_file(self):
        answers = [("What is a page?", "A page is a block of memory."), ("What is a pipe?", "A pipe joins two programs.")]
        lines = [json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
                 for q, a in answers * 4]
        return self.write("chat.jsonl", "\n".join(lines) + "\n")

    def test_chat_with_lora_resumes_exactly_and_merges(self):
        chat = self.chat_file()
        config = self.config_of(f'kind = "chat"\ntrain = "{chat}"\nvalid = "{chat}"',
                                '[lora]\ntargets = ["q_proj", "v_proj", "o_proj"]\nrank = 4\nmerge = true')
        config.write_text(config.read_text().replace("lr = 1e-3", "lr = 1e-2"))
        result = self.train("whole", config=config)
        losses = self.log("whole")
        self.assertLess(losses[6], losses[1])
        self.train("parts", config=config)
        for step in (4, 6):
            shutil.rmtree(self.checkpoint("parts", step))
        shutil.rmtree(self.dir / "parts/merged")
        self.train("parts", config=config, flags=("--resume",))
        self.assert_same_files(self.checkpoint("whole", 6), self.checkpoint("parts", 6),
                               ("adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"))
        self.assertFalse((self.checkpoint("whole", 6) / "model.safetensors").exists())
        self.assertEqual(json.loads((self.checkpoint("whole", 6) / "adapter_config.json").read_text())["r"], 4)
        prompt = "<|im_user|>user<|im_middle|>What is a page?<|im_end|><|im_assistant|>assistant<|im_middle|>"
        arguments = ("--prompt", prompt, "-n", "6")
        merged = self.run_json("run", self.dir / "whole/merged", *arguments)
        adapted = self.run_json("run", DOCS, "--lora", self.checkpoint("whole", 6), *arguments)
        self.assertEqual(merged["ids"], adapted["ids"])
        self.assertNotEqual(merged["ids"], self.run_json("run", DOCS, *arguments)["ids"])
        self.assertEqual(result["steps"], 6)

    def test_unknown_lora_target(self):
        chat = self.chat_file()
        config = self.config_of(f'kind = "chat"\ntrain = "{chat}"', '[lora]\ntargets = ["nothing_proj"]')
        error = self.refuse("run", config=config)
        self.assertRegex(error, r"tune.toml:\d+: key 'lora.targets': .*nothing_proj")

    def test_bad_chat_records_name_both_places(self):
        bad = self.write("bad.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')
        config = self.config_of(f'kind = "chat"\ntrain = "{bad}"')
        error = self.refuse("run", config=config)
        self.assertRegex(error, r"tune.toml:\d+: key 'data.train': .*bad.jsonl")


if __name__ == "__main__":
    unittest.main()
