# SPDX-License-Identifier: Apache-2.0
"""kilin eval classification, choice, extraction and the synthetic tasks, against plain Python and transformers."""
import collections
import json
import math
import os
import pathlib
import re
import string
import subprocess
import tempfile
import unittest

from support import DOCS, ROOT, TINY, TestCase, golden, kilin

# Python with transformers, if there is one: KILIN_TRANSFORMERS_PYTHON, else that of .venv.
PYTHON = os.environ.get("KILIN_TRANSFORMERS_PYTHON", str(ROOT / ".venv/bin/python"))
TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1] + "/tokenizer.json")
for line in sys.stdin:
    prompt, answer = json.loads(line)
    context = [7936] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = context + tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    print(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
"""


def has_transformers():
    if not pathlib.Path(PYTHON).exists():
        return False
    return subprocess.run([PYTHON, "-c", "import torch, transformers"], capture_output=True).returncode == 0


class Tasks(TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="kilin-eval-")
        self.addCleanup(temporary.cleanup)
        self.directory = pathlib.Path(temporary.name)

    def write(self, records):
        path = self.directory / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def answers(self, task, records, *arguments, model=DOCS):
        """The report, and the result of every record."""
        output = self.directory / "output.jsonl"
        report = self.run_json("eval", task, model, "--jsonl", self.write(records), "--output", output, *arguments)
        return report, [json.loads(line) for line in output.read_text().splitlines()]


QUESTIONS = [("The Linux kernel", ["is a program", "boils in water", "of the"], 0),
             ("The printf() function", ["returns", "sleeps well at night", "prints"], 0),
             ("SYNOPSIS\n#include", ["<stdio.h>", "banana"], 0),
             ("In the beginning God created the heaven and the", ["earth.", "module", "é ü"], 0),
             ("sqlite3 is a", ["terminal", "library", "heaven"], 1)]


class Choice(Tasks):
    def test_log_likelihoods_are_those_of_the_reference(self):
        """Texts of golden prompts cut in two: transformers' log probabilities of the second part."""
        for name in ("docs_prompt_65", "docs_prompt_300"):
            tensors = golden(name)[0]
            ids, values = tensors["input_ids"], tensors["logprob_of_next"]
            self.assertEqual(ids[0], 7936)  # [BOS]
            decode = {}
            for cut in (len(ids) // 2, len(ids) - 3):
                for part in (ids[1:cut], ids[cut:]):
                    decode[len(part)] = self.text_of(part)
                record = {"prompt": decode[cut - 1], "choices": [decode[len(ids) - cut], "x"], "answer": 0}
                _, results = self.answers("choice", [record], "--delimiter", "", "--cache-type", "f32")
                expected = sum(values[cut - 1:len(ids) - 1])
                self.assertAlmostEqual(results[0]["log_likelihoods"][0], expected, delta=1e-3 + 1e-5 * abs(expected))

    def text_of(self, ids):
        """The text of ids that encode to the same ids again."""
        vocabulary = json.loads((DOCS / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        characters = {value: key for key, value in byte_characters().items()}
        names = {value: key for key, value in vocabulary.items()}
        return bytes(characters[c] for i in ids for c in names[i]).decode()

    def test_accuracy_is_that_of_python(self):
        records = [{"prompt": p, "choices": c, "answer": a if i % 2 else c[a]}
                   for i, (p, c, a) in enumerate(QUESTIONS)]
        report, results = self.answers("choice", records)
        right, right_norm = [], []
        for (_, choices, answer), result in zip(QUESTIONS, results, strict=True):
            values = result["log_likelihoods"]
            per_byte = [value / len(choice.encode()) for value, choice in zip(values, choices, strict=True)]
            self.assertEqual(result["predicted"], values.index(max(values)))
            self.assertEqual(result["predicted_norm"], per_byte.index(max(per_byte)))
            right.append(result["predicted"] == answer)
            right_norm.append(result["predicted_norm"] == answer)
        self.assertAlmostEqual(report["accuracy"], sum(right) / 5)
        self.assertAlmostEqual(report["accuracy_norm"], sum(right_norm) / 5)
        p = sum(right) / 5
        self.assertAlmostEqual(report["accuracy_stderr"], math.sqrt(p * (1 - p) / 4))
        self.assertEqual(report["records"], 5)
        self.assertGreaterEqual(report["accuracy"], 0.6)  # of a trained model

    def test_prompts_are_read_once_for_all_choices(self):
        """Sharing the prompt's state changes nothing: each choice alone gives the same."""
        prompt, choices, _ = QUESTIONS[3]
        _, together = self.answers("choice", [{"prompt": prompt, "choices": choices, "answer": 0}])
        for i, choice in enumerate(choices):
            _, alone = self.answers("choice", [{"prompt": prompt, "choices": [choice, "zzz"], "answer": 0}])
            self.assertEqual(alone[0]["log_likelihoods"][0], together[0]["log_likelihoods"][i])

    @unittest.skipUnless(has_transformers(), "no Python with torch and transformers")
    def test_log_likelihoods_are_those_of_transformers(self):
        pairs = [(prompt, " " + choice) for prompt, choices, _ in QUESTIONS for choice in choices]
        lines = "\n".join(json.dumps(pair) for pair in pairs)
        done = subprocess.run([PYTHON, "-c", TRANSFORMERS, str(DOCS)], input=lines, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        records = [{"prompt": p, "choices": c, "answer": a} for p, c, a in QUESTIONS]
        _, results = self.answers("choice", records, "--cache-type", "f32")
        found = [value for result in results for value in result["log_likelihoods"]]
        for value, expected in zip(found, map(float, done.stdout.split()), strict=True):
            self.assertAlmostEqual(value, expected, delta=2e-3)


def byte_characters():
    """GPT-2's printable character of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Classification(Tasks):
    RECORDS = [{"text": "int main(void)", "label": "code"}, {"text": "And God said", "label": "bible"},
               {"text": "And it came to pass that Moses", "label": "bible"}, {"text": "#define N 3", "label": "code"},
               {"text": "SELECT a FROM b", "label": "code"}, {"text": "git commit", "label": "shell"}]

    def test_scores_are_those_of_python(self):
        report, results = self.answers("classification", self.RECORDS)
        labels = [record["label"] for record in self.RECORDS]
        predicted = [result["predicted"] for result in results]
        for result, label in zip(results, labels, strict=True):
            values = result["log_likelihoods"]
            self.assertEqual(sorted(values), ["bible", "code", "shell"])
            self.assertEqual(result["predicted"], max(values, key=values.get))
            self.assertEqual(result["label"], label)
        self.assertAlmostEqual(report["accuracy"], sum(a == b for a, b in zip(labels, predicted)) / 6)
        f1s = []
        for entry in report["classes"]:
            label = entry["label"]
            hits = sum(a == b == label for a, b in zip(labels, predicted))
            precision = hits / predicted.count(label) if label in predicted else 0
            recall = hits / labels.count(label)
            self.assertAlmostEqual(entry["precision"], precision)
            self.assertAlmostEqual(entry["recall"], recall)
            f1s.append(2 * precision * recall / (precision + recall) if hits else 0)
            self.assertAlmostEqual(entry["f1"], f1s[-1])
            self.assertEqual((entry["records"], entry["predicted"]), (labels.count(label), predicted.count(label)))
        self.assertAlmostEqual(report["macro_f1"], sum(f1s) / 3)
        self.assertGreater(report["macro_f1_stderr"], 0)

    def test_training_files_chat_and_limits(self):
        chat = [{"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]}
                for r in self.RECORDS]
        _, from_messages = self.answers("classification", chat)
        _, from_text = self.answers("classification", self.RECORDS, "--chat")
        self.assertEqual(from_messages, from_text)
        _, with_system = self.answers("classification", chat, "--system", "Answer in one word.")
        self.assertNotEqual(from_messages[0]["log_likelihoods"], with_system[0]["log_likelihoods"])
        completion = [{"prompt": r["text"], "completion": " " + r["label"]} for r in self.RECORDS]
        _, from_completion = self.answers("classification", completion)
        _, plain = self.answers("classification", self.RECORDS)
        self.assertEqual(from_completion, plain)
        report, some = self.answers("classification", self.RECORDS, "--limit", 2, "--label", "bible", "--label", "code",
                                    "--label", "poem")
        self.assertEqual((report["records"], len(some)), (2, 2))
        self.assertEqual(sorted(some[0]["log_likelihoods"]), ["bible", "code", "poem"])

    def test_table(self):
        result = kilin("eval", "classification", DOCS, "--jsonl", self.write(self.RECORDS))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout.decode(), r"^accuracy [0-9.]+ % \(standard error [0-9.]+ %\)   macro F1 ")
        self.assertEqual(len(result.stdout.decode().splitlines()), 5)

    def test_bad_input(self):
        def refused(lines, *words, arguments=()):
            path = self.directory / "bad.jsonl"
            path.write_text(lines)
            result = kilin("eval", "classification", DOCS, "--jsonl", path, *arguments)
            self.assert_refused(result, str(path), *words)
        good = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
        refused(good + '{"text": "b"}', ":3: ", "'label'")
        refused(good + '{"text": "b", "label": 3}', ":3: ", "'label'", "found 3")
        refused(good + "{", ":3: ")
        refused("", "no records")
        refused('{"text": "a", "label": "x"}', "at least two")
        refused(good, ":2: ", "'y'", arguments=("--label", "x", "--label", "z"))
        missing = self.directory / "missing.jsonl"
        self.assert_refused(kilin("eval", "classification", DOCS, "--jsonl", missing), str(missing))
        self.assert_wrong_usage(kilin("eval", "classification", DOCS), "--jsonl")


def squad_words(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


class Extraction(Tasks):
    QUESTIONS = ["What is memory mapped I/O?", "What is instantiate?", "What is LISA?", "What is a tty?", "What is Unix?"]

    def test_scores_are_those_of_python(self):
        """The model's own greedy answers, cut and spoilt, as expected answers."""
        texts = [self.run_json("run", DOCS, "--prompt", chat(question), "-n", 24)["text"] for question in self.QUESTIONS]
        expected = [texts[0], texts[1].upper(), [texts[2][:20], "nothing"], texts[3] + " indeed", "quite another"]
        records = [{"prompt": q, "answer": a} for q, a in zip(self.QUESTIONS, expected, strict=True)]
        report, results = self.answers("extraction", records, "--chat", "-n", 24, "--batch", 2)
        exact, f1 = [], []
        for text, answers, result in zip(texts, expected, results, strict=True):
            self.assertEqual(result["predicted"], text.strip())
            best = [0, 0]
            for answer in answers if isinstance(answers, list) else [answers]:
                words, wanted = squad_words(text), squad_words(answer)
                common = sum((collections.Counter(words) & collections.Counter(wanted)).values())
                best = [max(best[0], words == wanted), max(best[1], 2 * common / (len(words) + len(wanted)))]
            self.assertAlmostEqual(result["exact"], best[0])
            self.assertAlmostEqual(result["f1"], best[1])
            exact.append(best[0])
            f1.append(best[1])
        self.assertEqual(exact[:2], [1, 1])
        self.assertAlmostEqual(report["exact_match"], sum(exact) / 5)
        self.assertAlmostEqual(report["f1"], sum(f1) / 5)
        mean = sum(f1) / 5
        self.assertAlmostEqual(report["f1_stderr"], math.sqrt(sum((x - mean) ** 2 for x in f1) / 4 / 5))

    def test_stop_and_batches(self):
        records = [{"prompt": f"{q}\nIt is", "answer": "x"} for q in self.QUESTIONS]
        _, whole = self.answers("extraction", records, "-n", 20, "--batch", 1)
        _, batched = self.answers("extraction", records, "-n", 20, "--batch", 5)
        self.assertEqual(whole, batched)
        _, cut = self.answers("extraction", records, "-n", 20, "--stop", " of", "--stop", "e")
        for long, short in zip(whole, cut, strict=True):
            text = re.split(r" of|e", long["predicted"])[0]
            self.assertEqual(short["predicted"], text.strip())


def chat(question):
    return f"<|im_user|>user<|im_middle|>{question}<|im_end|><|im_assistant|>assistant<|im_middle|>"


class Synthetic(Tasks):
    def test_an_untrained_model_guesses(self):
        for task, options in (("palindrome", ()), ("mqar", ("--kv-pairs", 4)), ("stack", ("--stacks", 8))):
            with self.subTest(task=task):
                first = self.run_json("eval", task, TINY, "--length", 64, "--examples", 20, *options)
                self.assertEqual((first["task"], first["examples"], first["length"]), (task, 20, 64))
                self.assertLess(first["accuracy"], 0.2)
                self.assertLess(first["exact"], 0.05)
                vocabulary = first["vocabulary"]
                self.assertEqual(vocabulary, self.run_json("info", TINY)["vocab_size"])
                self.assertGreater(first["loss"], math.log(vocabulary) - 1.5)
                if task == "palindrome":
                    self.assertEqual(first["labels"], 20 * 32)
                again = self.run_json("eval", task, TINY, "--length", 64, "--examples", 20, *options, "--threads", 1)
                self.assertEqual(again["loss"], first["loss"])
                other = self.run_json("eval", task, TINY, "--length", 64, "--examples", 20, *options, "--first", 20)
                self.assertNotEqual(other["loss"], first["loss"])

    def test_impossible_tasks_are_refused(self):
        def refused(*arguments, words):
            self.assert_refused(kilin("eval", *arguments), *words)
        refused("palindrome", TINY, "--length", 7, words=("length", "7", "even"))
        refused("mqar", TINY, "--length", 64, "--kv-pairs", 17, words=("kv_pairs", "17", "16"))
        refused("stack", TINY, "--length", 64, "--vocabulary", 30, words=("vocabulary", "30"))
        refused("palindrome", TINY, "--vocabulary", 100000, words=("vocabulary", "100000", "model"))
        result = kilin("eval", "palindrome", TINY, "--stacks", 3)
        self.assert_wrong_usage(result, "--stacks")

    def test_list_names_every_task(self):
        listed = kilin("eval", "list").stdout.decode()
        self.assertEqual([line.split()[0] for line in listed.splitlines()],
                         ["perplexity", "classification", "choice", "extraction", "palindrome", "mqar", "stack"])


if __name__ == "__main__":
    unittest.main()
