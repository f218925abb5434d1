# SPDX-License-Identifier: Apache-2.0
"""kilin eval and kilin info against the reference's figures; kilin bench's shape."""
import json
import lzma
import pathlib
import tempfile
import unittest

from support import DOCS, REFERENCE, TestCase, golden, kilin

REFERENCE_PERPLEXITY = 10.153877
TOLERANCE = 0.001 * REFERENCE_PERPLEXITY


class Perplexity(TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.directory = pathlib.Path(temporary.name)

    def test_of_the_golden_ids(self):
        ids = golden("docs_valid_perplexity_64x512")[0]["input_ids"]
        path = self.directory / "windows.ids"
        lines = (" ".join(map(str, ids[begin:begin + 512])) for begin in range(0, len(ids), 512))
        path.write_text("\n".join(lines) + "\n")
        result = self.run_json("eval", "perplexity", DOCS, "--ids", path)
        self.assertAlmostEqual(result["perplexity"], REFERENCE_PERPLEXITY, delta=TOLERANCE)
        self.assertEqual((result["tokens"], result["windows"], result["window"]), (32704, 64, 512))

    def test_of_the_validation_text(self):
        path = self.directory / "valid.txt"
        path.write_bytes(lzma.decompress((REFERENCE / "corpus/valid.txt.xz").read_bytes()))
        result = self.run_json("eval", "perplexity", DOCS, "--file", path, "--max-windows", 64)
        self.assertAlmostEqual(result["perplexity"], REFERENCE_PERPLEXITY, delta=TOLERANCE)
        self.assertEqual((result["tokens"], result["windows"], result["window"]), (32704, 64, 512))

    def test_jsonl_and_file_are_the_same_stream(self):
        documents = ["The kernel provides locks.\n" * 20, "DESCRIPTION\n", "A library of functions. " * 20]
        text, records = self.directory / "text.txt", self.directory / "text.jsonl"
        text.write_text("\f".join(documents))
        records.write_text("\n".join(json.dumps({"body": document, "n": 1}) for document in documents))
        options = ("--window", 64)
        first = self.run_json("eval", "perplexity", DOCS, "--file", text, *options)
        second = self.run_json("eval", "perplexity", DOCS, "--jsonl", records, "--field", "body", *options)
        self.assertEqual(first["perplexity"], second["perplexity"])
        self.assertEqual(first["window"], 64)
        self.assertEqual(first["tokens"], first["windows"] * 63)

    def test_plain_output_and_lists(self):
        path = self.directory / "short.ids"
        path.write_text("1 2 3\n4 5\n")
        result = kilin("eval", "perplexity", DOCS, "--ids", path)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout.decode(), r"^perplexity [0-9.]+ +loss [0-9.]+ +3 tokens predicted in 2 windows")
        self.assertIn(b"perplexity", kilin("eval", "list").stdout)

    def test_bad_inputs(self):
        cases = [("--ids", b"1 2 x\n", "line 1"), ("--ids", b"1 2\n5\n", "line 2"), ("--ids", b"1 8192\n", "8191"),
                 ("--ids", b"", "no token ids"), ("--jsonl", b"{", "line 1"), ("--jsonl", b'{"a": 1}', "text"),
                 ("--file", b"too short", "window"), ("--file", b"\xff\xfe", "UTF-8")]
        for option, content, word in cases:
            with self.subTest(option=option, content=content):
                path = self.directory / "input"
                path.write_bytes(content)
                self.assert_refused(kilin("eval", "perplexity", DOCS, option, path), str(path), word)


class Info(TestCase):
    def test_json_of_the_bundled_model(self):
        info = self.run_json("info", DOCS)
        expected = {"architecture": "KimiLinearForCausalLM", "parameters": 12896536, "layers": 8, "kda_layers": 6,
                    "gdn_layers": 0, "mla_layers": 2, "moe_layers": 7, "hidden_size": 256, "vocab_size": 8192,
                    "max_length": 1048576, "tokenizer": True, "chat_template": True}
        self.assertEqual({key: info[key] for key in expected}, expected)
        self.assertGreater(info["weight_bytes"], 25_000_000)
        self.assertLess(info["active_weight_bytes"], info["weight_bytes"])
        self.assertAlmostEqual(info["active_parameters"], 6.0e6, delta=0.1e6)
        # 6 KDA layers of 4 heads x 64 x 64 floats, and convolution states; 2 MLA layers of 64 + 16 floats.
        self.assertGreaterEqual(info["state_bytes_per_sequence"], 6 * 4 * 64 * 64 * 4)
        self.assertLessEqual(info["state_bytes_per_sequence"], 6 * 4 * 64 * (64 + 3 * 4) * 4)
        self.assertEqual(info["cache_bytes_per_token"], 2 * (64 + 16) * 2)
        growth = info["sequence_bytes"]["1048576"] - info["sequence_bytes"]["131072"]
        self.assertEqual(growth, (1048576 - 131072) * info["cache_bytes_per_token"])

    def test_table(self):
        result = kilin("info", DOCS)
        self.assertEqual(result.returncode, 0)
        self.assertEqual(result.stderr, b"")
        self.assertIn("12,896,536 (12.9 M)", result.stdout.decode())

    def test_compatibility_is_said(self):
        for name in ("transformers", "remote-code", "vllm"):
            self.assertTrue(self.run_json("info", DOCS, "--compat", name)["compatibility"].startswith(name))


class Bench(TestCase):
    def check(self, share, *arguments):
        result = self.run_json("bench", *arguments, "--repeat", 2)
        low, high = result["tokens_per_second_range"]
        self.assertLessEqual(low, result["tokens_per_second"])
        self.assertLessEqual(result["tokens_per_second"], high)
        self.assertGreater(result["bytes_per_token"], 0)
        self.assertGreater(result[share], 0)

    def test_prefill(self):
        self.check("share_of_peak", "prefill", DOCS, "--tokens", 64)

    def test_prefill_of_random_weights(self):
        self.check("share_of_peak", "prefill", "--config", DOCS / "config.json", "--tokens", 64)

    def test_decode(self):
        self.check("share_of_bandwidth", "decode", DOCS, "--depth", 32, "--tokens", 8)

    def test_kda(self):
        self.check("share_of_peak", "kda", "--tokens", 64, "--heads", 2)


if __name__ == "__main__":
    unittest.main()
