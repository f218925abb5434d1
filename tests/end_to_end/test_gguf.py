# SPDX-License-Identifier: Apache-2.0
"""kilin convert and kilin quantize: files that run, that keep the text, and that are refused when damaged."""
import lzma
import os
import pathlib
import signal
import struct
import subprocess
import tempfile
import unittest

from support import BINARY, DOCS, REFERENCE, ROOT, TIMEOUT, TINY, ModelCopy, TestCase, golden, kilin

WINDOWS = 16
# Allowed change of perplexity over bfloat16 on 16 windows of 512 tokens of the reference text.
LIMITS = {"q8_0": 0.003, "q4_k": 0.03, "q4_0": 0.06}


class Files(TestCase):
    """The bundled model as GGUF, made once."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory(prefix="kilin-gguf-")
        cls.addClassCleanup(temporary.cleanup)
        cls.directory = pathlib.Path(temporary.name)
        cls.docs = cls.directory / "docs.gguf"
        done = kilin("convert", DOCS, cls.docs)
        assert done.returncode == 0, done.stderr

    def run_ok(self, *arguments):
        result = kilin(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr.decode(errors="replace"))
        self.assertEqual(result.stdout, b"")
        return result.stderr.decode()


class RoundTrip(Files):
    def check_text(self, model):
        tensors, metadata = golden("docs_prompt_7")
        result = self.run_json("run", model, "--prompt", metadata["prompt"], "-n", 64, "--ignore-eos")
        self.assertEqual(result["ids"], tensors["greedy_ids"])
        self.assertEqual(result["text"], metadata["greedy"])

    def test_gguf_gives_the_text_of_the_reference(self):
        self.check_text(self.docs)

    def test_every_long_prompt(self):
        for name in ("docs_prompt_65", "docs_prompt_300", "docs_prompt_chat"):
            tensors, _ = golden(name)
            ids = ",".join(map(str, tensors["input_ids"]))
            result = self.run_json("run", self.docs, "--prompt-ids", ids, "-n", 64, "--ignore-eos")
            self.assertEqual(result["ids"], tensors["greedy_ids"], name)

    def test_end_tokens_and_chat_template_come_along(self):
        for command in (("run", "--prompt", "DESCRIPTION", "-n", "300"), ("chat",)):
            found = [kilin(command[0], model, *command[1:], stdin=b"What is a lock?\n") for model in (DOCS, self.docs)]
            self.assertEqual(found[0].stdout, found[1].stdout)
            self.assertEqual(found[1].returncode, 0, found[1].stderr)

    def test_back_to_hugging_face(self):
        back = self.directory / "back"
        self.run_ok("convert", self.docs, back)
        self.check_text(back)
        for name in ("config.json", "generation_config.json", "chat_template.jinja"):
            self.assertEqual((back / name).read_bytes(), (DOCS / name).read_bytes(), name)
        again = self.directory / "again.gguf"
        self.run_ok("convert", back, again)
        self.check_text(again)

    def test_info_counts_the_same_parameters(self):
        infos = [self.run_json("info", model) for model in (DOCS, self.docs)]
        for key in ("parameters", "active_parameters", "layers", "vocab_size", "max_length", "tokenizer",
                    "chat_template"):
            self.assertEqual(infos[0][key], infos[1][key], key)

    def test_model_without_tokenizer(self):
        tensors, _ = golden("tiny_random_t130")
        file = self.directory / "tiny.gguf"
        self.run_ok("convert", TINY, file)
        ids = ",".join(map(str, tensors["input_ids"]))
        result = self.run_json("run", file, "--prompt-ids", ids, "-n", 16, "--ignore-eos")
        self.assertEqual(result["ids"], tensors["greedy_ids"])
        self.assertIn("tokenizer", kilin("run", file, "--prompt", "x").stderr.decode())

    def test_random_weights(self):
        file = self.directory / "random.gguf"
        self.run_ok("convert", "--random", TINY / "config.json", file, "--seed", 7)
        first = file.read_bytes()
        self.run_ok("convert", "--random", TINY / "config.json", file, "--seed", 7, "--force")
        self.assertEqual(file.read_bytes(), first)
        result = self.run_json("run", file, "--prompt-ids", "1,2,3", "-n", 4, "--ignore-eos")
        self.assertEqual(len(result["ids"]), 4)

    def test_variant_that_llama_cpp_does_not_know(self):
        with ModelCopy(TINY) as model:
            model.change_json("config.json", lambda found: found.update(moe_renormalize=False))
            file = self.directory / "variant.gguf"
            self.assertIn("llama.cpp will not run this", self.run_ok("convert", model.path, file))
            options = ("--prompt-ids", "1,2,3,4,5", "-n", 8, "--ignore-eos")
            expected = self.run_json("run", model.path, *options)["ids"]
            self.assertEqual(self.run_json("run", file, *options)["ids"], expected)
        self.assertNotIn("llama.cpp", self.run_ok("convert", TINY, self.directory / "plain.gguf"))


class Quantized(Files):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.text = cls.directory / "valid.txt"
        cls.text.write_bytes(lzma.decompress((REFERENCE / "corpus/valid.txt.xz").read_bytes()))

    def perplexity(self, model):
        return self.run_json("eval", "perplexity", model, "--file", self.text, "--max-windows", WINDOWS)["perplexity"]

    def test_perplexity_and_sizes(self):
        plain = self.perplexity(DOCS)
        self.assertAlmostEqual(self.perplexity(self.docs), plain, delta=1e-4 * plain)
        size = self.docs.stat().st_size
        for kind, share in (("q8_0", 0.6), ("q4_k", 0.5), ("q4_0", 0.45)):
            file = self.directory / f"{kind}.gguf"
            report = self.run_ok("quantize", DOCS, file, "--type", kind)
            self.assertIn(kind.upper(), report)
            found = self.perplexity(file)
            print(f"{kind}: perplexity {found:.4f}, bfloat16 {plain:.4f}: {100 * (found / plain - 1):+.3f} %; "
                  f"{file.stat().st_size / size:.3f} of the size")
            self.assertLess(abs(found / plain - 1), LIMITS[kind], kind)
            self.assertLess(file.stat().st_size, share * size)

    def test_bf16_of_a_bf16_model_is_the_converted_file(self):
        file = self.directory / "bf16.gguf"
        self.run_ok("quantize", DOCS, file, "--type", "bf16")
        self.assertEqual(file.read_bytes(), self.docs.read_bytes())

    def test_from_gguf_and_from_directory_are_the_same_weights(self):
        first, second = self.directory / "first.gguf", self.directory / "second.gguf"
        self.run_ok("quantize", DOCS, first, "--type", "q4_k")
        self.run_ok("quantize", self.docs, second, "--type", "q4_k")
        self.assertEqual(first.read_bytes()[-8_000_000:], second.read_bytes()[-8_000_000:])

    def test_threads_do_not_change_the_file(self):
        files = [self.directory / f"threads{n}.gguf" for n in (1, 3)]
        for n, file in zip((1, 3), files):
            self.run_ok("quantize", DOCS, file, "--type", "q4_0", "--threads", n)
        self.assertEqual(files[0].read_bytes(), files[1].read_bytes())

    def test_quantized_back_to_hugging_face(self):
        file, back = self.directory / "q.gguf", self.directory / "q-back"
        self.run_ok("quantize", DOCS, file, "--type", "q8_0")
        self.assertIn("bfloat16", self.run_ok("convert", file, back))
        self.assertLess(abs(self.perplexity(back) / self.perplexity(file) - 1), 0.003)

    def test_tells_of_rows_that_blocks_do_not_fill(self):
        self.assertIn("16 tensors have rows",
                      self.run_ok("quantize", DOCS, self.directory / "rows.gguf", "--type", "q4_k"))


class Refused(Files):
    def refused(self, content, *words):
        path = self.directory / "bad.gguf"
        path.write_bytes(content)
        for command in (("run", path, "--prompt-ids", "1,2"), ("quantize", path, self.directory / "out.gguf", "--type",
                                                               "q8_0")):
            self.assert_refused(kilin(*command), *words)
        self.assertFalse((self.directory / "out.gguf").exists())

    def test_not_a_gguf(self):
        self.refused(b"something else", "bad.gguf", "GGUF")
        self.refused(b"", "bad.gguf", "GGUF")

    def test_truncated(self):
        whole = self.docs.read_bytes()
        for length in (4, 5, 24, 100, 10_000, 400_000, 1_000_000, len(whole) - 40):
            self.refused(whole[:length], "bad.gguf")

    def test_missing_tensor(self):
        whole = self.docs.read_bytes()
        self.refused(whole.replace(b"blk.3.attn_k_b.weight", b"blk.3.attn_k_x.weight", 1), "bad.gguf", "layers.3",
                     "kv_b")
        self.refused(whole.replace(b"blk.0.ssm_a", b"blk.0.ssm_b", 1), "bad.gguf", "A_log")

    def test_wrong_architecture(self):
        whole = self.docs.read_bytes()
        key = b"general.architecture" + struct.pack("<IQ", 8, 11)
        self.refused(whole.replace(key + b"kimi-linear", key + b"kimi-linaer", 1), "bad.gguf", "general.architecture",
                     "kimi-linaer")

    def test_metadata_that_contradicts_kilin_config(self):
        whole = self.docs.read_bytes()
        key = b"kimi-linear.embedding_length" + struct.pack("<I", 4)
        self.refused(whole.replace(key + struct.pack("<I", 256), key + struct.pack("<I", 128), 1), "bad.gguf",
                     "embedding_length", "128", "256")

    def test_existing_output(self):
        for command in (("convert", DOCS, self.docs), ("quantize", DOCS, self.docs, "--type", "q8_0"),
                        ("convert", "--random", TINY / "config.json", self.docs)):
            before = self.docs.stat().st_mtime_ns
            self.assert_refused(kilin(*command), "docs.gguf", "--force")
            self.assertEqual(self.docs.stat().st_mtime_ns, before)
        with tempfile.TemporaryDirectory() as directory:
            (pathlib.Path(directory) / "notes.txt").write_text("mine")
            self.assert_refused(kilin("convert", self.docs, directory), directory, "--force")
            self.assertEqual(os.listdir(directory), ["notes.txt"])
            self.run_ok("convert", self.docs, directory, "--force")
            self.assertIn("notes.txt", os.listdir(directory))
            self.assertIn("config.json", os.listdir(directory))

    def test_output_that_cannot_be(self):
        self.assert_refused(kilin("convert", DOCS, self.directory / "no" / "such.gguf"), "such.gguf")
        self.assert_refused(kilin("convert", DOCS, self.directory), "directory")
        self.assert_refused(kilin("convert", self.docs, self.docs, "--force"), "docs.gguf")
        other = self.directory / "other.gguf"
        self.assert_refused(kilin("convert", self.docs, other), "other.gguf", "directory", "quantize")
        self.assertFalse(other.exists())

    def test_input_that_cannot_be(self):
        out = self.directory / "out.gguf"
        self.assert_refused(kilin("convert", self.directory / "none", out), "none")
        self.assert_refused(kilin("convert", self.directory, out), "config.json")
        with ModelCopy(TINY) as model:
            model.change_json("config.json", lambda found: found.update(vocab_size=511))
            self.assert_refused(kilin("convert", model.path, out), "model.embed_tokens.weight", "511")
        with ModelCopy(TINY) as model:
            def infinite(data):
                data[0:4] = struct.pack("<f", float("inf"))
            model.change_data("lm_head.weight", infinite)
            self.assert_refused(kilin("quantize", model.path, out, "--type", "q8_0"), "lm_head.weight", "inf")
        self.assertFalse(out.exists())

    def test_wrong_usage(self):
        out = self.directory / "usage.gguf"
        self.assert_wrong_usage(kilin("quantize", DOCS, out), "--type")
        self.assert_wrong_usage(kilin("quantize", DOCS, out, "--type", "q3_k"), "q3_k")
        self.assert_wrong_usage(kilin("convert", DOCS, out, "--type", "q8_0"), "q8_0")
        self.assert_wrong_usage(kilin("convert", DOCS, out, "--seed", "1"), "--random")
        self.assert_wrong_usage(kilin("convert", DOCS))
        self.assertFalse(out.exists())

    def test_full_disk(self):
        """On a file system of 8 MiB, where there is the right to mount one."""
        with tempfile.TemporaryDirectory() as place:
            mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
            if mount.returncode != 0:
                self.skipTest("no right to mount a small file system")
            try:
                self.assert_refused(kilin("convert", DOCS, f"{place}/out.gguf"), "out.gguf", "space")
                self.assert_refused(kilin("convert", self.docs, f"{place}/out"), "space")
                self.assertEqual(os.listdir(place), [])
            finally:
                subprocess.run(["umount", place], check=True)

    def test_ctrl_c_leaves_nothing(self):
        out = self.directory / "interrupted.gguf"
        config = ROOT / "configs/bench/twelve-layers.json"
        process = subprocess.Popen([BINARY, "convert", "--random", str(config), str(out)], stderr=subprocess.PIPE)
        self.addCleanup(process.wait, TIMEOUT)
        self.addCleanup(process.kill)
        try:
            process.wait(0.3)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=TIMEOUT)[1]
        self.assertEqual(process.returncode, 130, errors)
        self.assertIn(b"cancelled", errors)
        self.assertEqual([name for name in os.listdir(self.directory) if "interrupted" in name], [])


if __name__ == "__main__":
    unittest.main()
