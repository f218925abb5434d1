# SPDX-License-Identifier: Apache-2.0
"""Arguments that are well formed but wrong: one clear line, exit code 1."""
import os
import pathlib
import tempfile
import unittest

from support import DOCS, TINY, ModelCopy, TestCase, kilin


class BadArguments(TestCase):
    def test_token_ids(self):
        cases = {"512": "512", "-1": "-1", "1,two": "two", "1.5": "1.5", "99999999999999999999": "99999999999999999999",
                 "": "--prompt-ids", ",": "--prompt-ids", "1;2": "1;2"}
        for ids, word in cases.items():
            with self.subTest(ids=ids):
                self.assert_refused(kilin("run", TINY, "--prompt-ids", ids), "--prompt-ids", word)

    def test_prompt_that_is_not_utf8(self):
        for text in (b"\xff", b"abc\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"):
            with self.subTest(text=text):
                self.assert_refused(kilin("run", DOCS, "--prompt", os.fsdecode(text)), "--prompt", "UTF-8")
        self.assert_refused(kilin("run", DOCS, "--prompt-file", "-", stdin=b"abc\xff"), "UTF-8")

    def test_stop_text_that_is_not_utf8(self):
        result = kilin("run", DOCS, "--prompt", "a", "--stop", os.fsdecode(b"\xff"))
        self.assert_refused(result, "--stop", "UTF-8")

    def test_values_that_no_run_can_have_are_wrong_usage(self):
        for option, value in (("--seed", "18446744073709551616"), ("--seed", "010"), ("--seed", "-1"), ("--seed", ""),
                              ("--max-tokens", "010"), ("--temperature", "1001"), ("--repetition-penalty", "1001"),
                              ("--prefill-chunk", "1048577"), ("--cache-type", "f8"), ("--activations", "8"), ("--stop", "")):
            with self.subTest(option=option, value=value):
                self.assert_wrong_usage(kilin("run", DOCS, "--prompt", "a", option, value), option)
        self.assert_wrong_usage(kilin("generate", DOCS), "generate")

    def test_instruction_set_that_does_not_exist(self):
        result = kilin("info", DOCS, env={"KILIN_ISA": "mmx"})
        self.assert_refused(result, "KILIN_ISA", "mmx")
        self.assertNotIn(str(DOCS), result.stderr.decode())

    def test_prompt_file(self):
        self.assert_refused(kilin("run", DOCS, "--prompt-file", "/nonexistent/file"), "/nonexistent/file")
        self.assert_refused(kilin("run", DOCS, "--prompt-file", "/tmp"), "/tmp")

    def test_input_of_eval(self):
        for option in ("--file", "--jsonl", "--ids"):
            self.assert_refused(kilin("eval", "perplexity", DOCS, option, "/nonexistent/f"), "/nonexistent/f")

    def test_model_that_is_not_there(self):
        for command in (("run", "/nonexistent/m", "--prompt", "a"), ("info", "/nonexistent/m"),
                        ("chat", "/nonexistent/m"), ("bench", "decode", "/nonexistent/m"),
                        ("bench", "decode", "--config", "/nonexistent/m")):
            with self.subTest(command=command):
                self.assert_refused(kilin(*command), "/nonexistent/m")

    def test_model_that_is_a_file(self):
        self.assert_refused(kilin("info", DOCS / "config.json"), str(DOCS / "config.json"))

    def test_directory_without_a_model(self):
        with tempfile.TemporaryDirectory() as directory:
            self.assert_refused(kilin("info", directory), directory, "config.json")

    def test_name_with_control_characters_stays_one_line(self):
        self.assert_refused(kilin("info", "/nonexistent/a\nb\x1b[31m"))

    def test_cuda(self):
        self.assert_refused(kilin("run", DOCS, "--prompt", "a", "--device", "cuda"), "--device", "CUDA")

    def test_text_prompt_without_tokenizer(self):
        self.assert_refused(kilin("run", TINY, "--prompt", "a"), str(TINY), "tokenizer")

    def test_stop_text_without_tokenizer(self):
        self.assert_refused(kilin("run", TINY, "--prompt-ids", "1", "--stop", "a"), "tokenizer")

    def test_prompt_longer_than_the_limit(self):
        with ModelCopy(TINY) as model:
            model.change_json("config.json", lambda config: config.update(model_max_length=8))
            ids = ",".join(["5"] * 9)
            self.assert_refused(kilin("run", model.path, "--prompt-ids", ids), "model_max_length", "9", "8")
            result = self.run_json("run", model.path, "--prompt-ids", ids[:-2], "-n", 5, "--ignore-eos")
            self.assertEqual(result["finish_reason"], "length")

    def test_depth_beyond_the_limit(self):
        result = kilin("bench", "decode", TINY, "--depth", 1048576, "--tokens", 1)
        self.assert_refused(result, "--depth", "1048576")

    def test_unknown_instruction_set(self):
        self.assert_refused(kilin("info", TINY, env={"KILIN_ISA": "sse9"}), "KILIN_ISA", "sse9")

    def test_unreadable_file(self):
        if os.geteuid() == 0:
            self.skipTest("root reads everything")
        with ModelCopy(TINY) as model:
            pathlib.Path(model.file("config.json")).chmod(0)
            self.assert_refused(kilin("info", model.path), "config.json")


if __name__ == "__main__":
    unittest.main()
