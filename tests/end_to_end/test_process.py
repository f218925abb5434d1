# SPDX-License-Identifier: Apache-2.0
"""The program as a process: signals, pipes, full disks, help, exit codes, memory of long prompts."""
import json
import os
import signal
import subprocess
import time
import unittest

from support import BINARY, DOCS, TIMEOUT, TINY, TestCase, kilin

ENDLESS = [BINARY, "run", str(DOCS), "--prompt", "The Linux kernel", "-n", "1000000", "--ignore-eos"]


class Interrupt(TestCase):
    def start(self, command):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.wait, TIMEOUT)
        self.addCleanup(process.kill)
        return process

    def test_first_ctrl_c_ends_the_text_cleanly(self):
        process = self.start(ENDLESS)
        self.assertTrue(process.stdout.read(20))  # it generates
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)
        self.assertTrue(text.endswith(b"\n"))
        self.assertIn(b"cancelled", errors)
        self.assertEqual(errors.count(b"\n"), 1, errors)

    def test_json_tells_what_was_generated(self):
        process = self.start(ENDLESS + ["--json"])
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)
        result = json.loads(text)
        self.assertEqual(result["finish_reason"], "cancelled")
        self.assertTrue(result["ids"])

    def test_one_wish_delivered_twice_is_one(self):
        process = self.start(ENDLESS)
        self.assertTrue(process.stdout.read(20))
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)

    def test_ctrl_c_reaches_a_model_that_makes_no_text(self):
        process = self.start([BINARY, "run", str(TINY), "--prompt-ids", "1,2", "-n", "1000000", "--ignore-eos"])
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)
        self.assertRegex(text.decode(), r"^\d+(,\d+)*\n$")

    def test_ctrl_c_in_a_long_prompt(self):
        ids = ",".join(["7936"] + ["100", "200", "300"] * 100_000)
        command = [BINARY, "eval", "perplexity", str(DOCS), "--ids", "/dev/stdin", "--progress"]
        process = self.start(command)
        process.stdin.write(ids.encode() + b"\n")
        process.stdin.close()
        process.stdin = None
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, 130, errors)


class Pipes(TestCase):
    def test_reader_that_goes_away(self):
        process = subprocess.Popen(ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
        process.stderr.close()
        self.assertEqual(process.wait(TIMEOUT), 0, errors)
        self.assertNotIn(b"error", errors)

    def test_full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        for command in (["info", str(DOCS)], ["run", str(DOCS), "--prompt", "The", "-n", "4", "--json"]):
            with open("/dev/full", "wb") as full:
                result = subprocess.run([BINARY, *command], stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT)
            self.assertEqual(result.returncode, 1)
            self.assertIn(b"kilin: error: standard output: No space left", result.stderr)


class Usage(TestCase):
    def test_help_of_every_command(self):
        commands = [(), ("run",), ("chat",), ("info",), ("eval",), ("eval", "perplexity"), ("bench",),
                    ("bench", "prefill"), ("bench", "decode"), ("bench", "kda"), ("bench", "bandwidth")]
        for command in commands:
            with self.subTest(command=command):
                result = kilin(*command, "--help")
                self.assertEqual((result.returncode, result.stderr), (0, b""))
                self.assertIn(" ".join(("Usage: kilin", *command)), result.stdout.decode())

    def test_version(self):
        result = kilin("--version")
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout.decode(), r"^kilin \d+\.\d+\.\d+ ")

    def test_wrong_usage_is_2(self):
        self.assertEqual(kilin().returncode, 2)
        cases = [("sing",), ("run",), ("run", DOCS), ("run", DOCS, "--prompt", "a", "--prompt-ids", "1"),
                 ("run", DOCS, "--prompt"), ("run", DOCS, "--prompt", "a", "--wrong"),
                 ("run", DOCS, "--prompt", "a", "-n", "many"), ("run", DOCS, "--prompt", "a", "-n", "0"),
                 ("run", DOCS, "--prompt", "a", "--temperature", "-1"),
                 ("run", DOCS, "--prompt", "a", "--top-p", "1.5"), ("run", DOCS, "--prompt", "a", "--top-p", "0"),
                 ("run", DOCS, "--prompt", "a", "--threads", "0"),
                 ("run", DOCS, "--prompt", "a", "--compat", "mine"), ("run", DOCS, "--prompt-ids", "1", "--bos"),
                 ("run", DOCS, "--prompt", "a", "--device", "tpu"), ("eval",), ("eval", "perplexity", DOCS),
                 ("eval", "perplexity", DOCS, "--ids", "f", "--window", "1"), ("bench",), ("bench", "prefill"),
                 ("bench", "decode", DOCS, "--config", "c.json"), ("info",), ("chat",)]
        for arguments in cases:
            with self.subTest(arguments=arguments):
                self.assert_wrong_usage(kilin(*arguments))


class Memory(TestCase):
    def test_long_prompt_grows_by_the_cache_only(self):
        """60,000 tokens take 36.6 MiB of MLA latents; chunks keep the rest as it is at 4,000."""
        def peak(tokens):
            command = [BINARY, "run", str(DOCS), "--prompt-file", "/dev/stdin", "-n", "1"]
            text = b"The kernel provides locks.\n" * (tokens // 6)
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE) as process:
                process.stdin.write(text)
                process.stdin.close()
                errors = process.stderr.read()
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            self.assertEqual(process.returncode, 0, errors)
            return usage.ru_maxrss / 1024

        self.assertLess(peak(60_000) - peak(4_000), 36.6 + 60)


if __name__ == "__main__":
    unittest.main()
