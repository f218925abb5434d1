# SPDX-License-Identifier: Apache-2.0
"""kilin run: the text of the reference, sampling, stop texts, output."""
import unittest

from support import DOCS, TINY, TestCase, golden, kilin

PROMPT = ("--prompt", "The Linux kernel")


def ids_text(ids):
    return ",".join(map(str, ids))


class Greedy(TestCase):
    def check_prompt(self, name):
        tensors, _ = golden(name)
        result = self.run_json("run", DOCS, "--prompt-ids", ids_text(tensors["input_ids"]), "-n", 64, "--ignore-eos")
        self.assertEqual(result["ids"], tensors["greedy_ids"])
        self.assertEqual(result["prompt_tokens"], len(tensors["input_ids"]))
        self.assertEqual(result["finish_reason"], "length")

    def test_prompt_7(self):
        self.check_prompt("docs_prompt_7")

    def test_prompt_65(self):
        self.check_prompt("docs_prompt_65")

    def test_prompt_300(self):
        self.check_prompt("docs_prompt_300")

    def test_prompt_chat(self):
        self.check_prompt("docs_prompt_chat")

    def test_text_prompt_is_encoded_as_the_reference(self):
        tensors, metadata = golden("docs_prompt_7")
        for prompt in (metadata["prompt"], metadata["prompt"].removeprefix("[BOS]")):
            result = self.run_json("run", DOCS, "--prompt", prompt, "-n", 64, "--ignore-eos")
            self.assertEqual(result["ids"], tensors["greedy_ids"])
            self.assertEqual(result["text"], metadata["greedy"])
            self.assertEqual(result["prompt_tokens"], 7)

    def test_tiny_model_without_tokenizer(self):
        tensors, _ = golden("tiny_random_t130")
        ids = ids_text(tensors["input_ids"])
        result = self.run_json("run", TINY, "--prompt-ids", ids, "-n", 16, "--ignore-eos")
        self.assertEqual(result["ids"], tensors["greedy_ids"])
        plain = kilin("run", TINY, "--prompt-ids", ids, "-n", 16, "--ignore-eos")
        self.assertEqual(plain.stdout.decode(), ids_text(tensors["greedy_ids"]) + "\n")

    def test_any_threads_and_chunks_give_the_same_text(self):
        tensors, _ = golden("docs_prompt_300")
        prompt = ids_text(tensors["input_ids"])
        for options in (("--threads", 1), ("--threads", 3), ("--pin",), ("--cache-type", "f32"), ("--activations", "exact"), ("--activations", "auto"),
                        ("--prefill-chunk", 7), ("--prefill-chunk", 64)):
            result = self.run_json("run", DOCS, "--prompt-ids", prompt, "-n", 16, "--ignore-eos", *options)
            self.assertEqual(result["ids"], tensors["greedy_ids"][:16], options)


class Beginning(TestCase):
    def tokens(self, *arguments):
        return self.run_json("run", DOCS, *arguments, "-n", 1)["prompt_tokens"]

    def test_bos_goes_in_front_of_plain_text_only(self):
        plain = self.tokens(*PROMPT)
        self.assertEqual(self.tokens(*PROMPT, "--no-bos"), plain - 1)
        self.assertEqual(self.tokens("--prompt", "[BOS]The Linux kernel"), plain)
        self.assertEqual(self.tokens("--prompt", "<|im_user|>The Linux kernel"), plain)
        self.assertEqual(self.tokens("--prompt", "<|im_user|>The Linux kernel", "--bos"), plain + 1)

    def test_empty_prompt_is_bos_alone(self):
        self.assertEqual(self.tokens("--prompt", ""), 1)
        self.assert_refused(kilin("run", DOCS, "--prompt", "", "--no-bos"), "--prompt")

    def test_prompt_from_standard_input_and_file(self):
        text = "The Linux kernel"
        expected = self.run_json("run", DOCS, "--prompt", text, "-n", 8)["ids"]
        found = self.run_json("run", DOCS, "--prompt-file", "-", "-n", 8, stdin=text.encode())["ids"]
        self.assertEqual(found, expected)


class Sampling(TestCase):
    def text(self, *options):
        return self.run_json("run", DOCS, *PROMPT, "-n", 40, *options)["text"]

    def test_seeds(self):
        options = ("--temperature", 1.0, "--seed")
        self.assertEqual(self.text(*options, 7), self.text(*options, 7))
        self.assertNotEqual(self.text(*options, 7), self.text(*options, 8))
        self.assertEqual(self.text("--temperature", 1.0), self.text(*options, 0))

    def test_each_filter_can_leave_the_best_token_only(self):
        greedy = self.text()
        for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
            self.assertEqual(self.text("--temperature", 1.5, *narrow), greedy, narrow)

    def test_repetition_penalty_changes_the_text(self):
        self.assertNotEqual(self.text("--repetition-penalty", 1.3), self.text())


class Output(TestCase):
    def test_json_has_the_promised_keys(self):
        result = self.run_json("run", DOCS, *PROMPT, "-n", 8)
        self.assertEqual(set(result), {"ids", "text", "prompt_tokens", "finish_reason", "timings"})
        self.assertEqual(set(result["timings"]),
                         {"load_seconds", "prefill_seconds", "prefill_tokens_per_second", "decode_seconds",
                          "decode_tokens_per_second"})
        self.assertTrue(all(seconds > 0 for seconds in result["timings"].values()))
        self.assertEqual(len(result["ids"]), 8)

    def test_streamed_text_is_the_text(self):
        expected = self.run_json("run", DOCS, *PROMPT, "-n", 40)["text"]
        result = kilin("run", DOCS, *PROMPT, "-n", 40)
        self.assertEqual(result.returncode, 0)
        self.assertEqual(result.stdout.decode().rstrip("\n"), expected.rstrip("\n"))
        self.assertEqual(result.stderr.decode().count("\n"), 1)
        self.assertIn("tokens/s", result.stderr.decode())

    def test_stop_text_is_left_out(self):
        whole = self.run_json("run", DOCS, *PROMPT, "-n", 40)["text"]
        stop = whole[20:26]
        result = self.run_json("run", DOCS, *PROMPT, "-n", 40, "--stop", "never there", "--stop", stop)
        self.assertEqual(result["text"], whole[:whole.index(stop)])
        self.assertEqual(result["finish_reason"], "stop")

    def test_end_of_turn_ends(self):
        prompt = golden("docs_prompt_chat")[1]["prompt"]
        result = self.run_json("run", DOCS, "--prompt", prompt)
        self.assertEqual(result["finish_reason"], "stop")
        self.assertEqual(result["ids"][-1], 7938)
        self.assertEqual(result["text"], "(Unix) A Unix command that is executed by a Unix shell.")

    def test_long_prompt_shows_progress_when_asked(self):
        ids = ids_text([7936] + [100, 200, 300] * 8000)
        result = kilin("run", DOCS, "--prompt-ids", ids, "-n", 1, "--progress")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn(b"/ 24,001 tokens", result.stderr)


if __name__ == "__main__":
    unittest.main()
