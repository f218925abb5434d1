# SPDX-License-Identifier: Apache-2.0
"""kilin chat over a pipe: messages, commands, what is remembered."""
import json
import pathlib
import tempfile
import unittest

from support import DOCS, TINY, TestCase, kilin

UNIX = "(Unix) A Unix command that is executed by a Unix shell."


class Chat(TestCase):
    def chat(self, text, *options, code=0):
        result = kilin("chat", DOCS, "--temperature", 0, *options, stdin=text.encode())
        self.assertEqual(result.returncode, code, result.stderr.decode())
        return result

    def test_answers_each_line(self):
        result = self.chat("What is Unix?\nWhat is COBOL?\n")
        lines = result.stdout.decode().splitlines()
        self.assertEqual(lines[0], UNIX)
        self.assertEqual(len(lines), 2)
        self.assertEqual(result.stderr, b"")

    def test_line_without_end_and_empty_input(self):
        self.assertEqual(self.chat("What is Unix?").stdout.decode(), UNIX + "\n")
        self.assertEqual(self.chat("").stdout, b"")
        self.assertEqual(self.chat("\n\n").stdout, b"")

    def test_reset_forgets(self):
        lines = self.chat("What is Unix?\n/reset\nWhat is Unix?\n").stdout.decode().splitlines()
        self.assertEqual(lines, [UNIX, UNIX])

    def test_command_with_nothing_but_spaces_behind_it(self):
        lines = self.chat("/system  \nWhat is Unix?\n").stdout.decode().splitlines()
        self.assertEqual(lines, [UNIX])

    def test_penalty_remembers_the_whole_conversation(self):
        # The second question's tokens are few, but the first answer's count as seen too, fed anew or not.
        lines = self.chat("What is Unix?\nWhat is Unix?\n", "-n", 6, "--repetition-penalty", 5).stdout.decode().splitlines()
        self.assertEqual(len(lines), 2)
        self.assertNotIn("Unix", lines[1])

    def test_quit_leaves(self):
        self.assertEqual(self.chat("/quit\nWhat is Unix?\n").stdout, b"")

    def test_help_goes_to_stderr(self):
        result = self.chat("/help\n")
        self.assertIn(b"/reset", result.stderr)
        self.assertEqual(result.stdout, b"")

    def test_save_writes_the_messages(self):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "chat.json"
            self.chat(f"/system Be brief.\nWhat is Unix?\n/save {path}\n")
            messages = json.loads(path.read_text())
        self.assertEqual([message["role"] for message in messages], ["system", "user", "assistant"])
        self.assertEqual(messages[0]["content"], "Be brief.")

    def test_system_option(self):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "chat.json"
            self.chat(f"What is Unix?\n/save {path}\n", "--system", "Be brief.")
            self.assertEqual(json.loads(path.read_text())[0], {"role": "system", "content": "Be brief."})

    def test_same_seed_same_conversation(self):
        text = b"What is Unix?\nWhat is COBOL?\n"
        options = ("chat", DOCS, "--seed", 3, "-n", 24)
        self.assertEqual(kilin(*options, stdin=text).stdout, kilin(*options, stdin=text).stdout)

    def test_errors(self):
        self.assert_refused(kilin("chat", TINY))
        for text in ("/nonsense\n", "/save\n", "/save /nonexistent/file\n"):
            self.assertIn(b"kilin: error: ", self.chat(text, code=1).stderr)
        result = kilin("chat", DOCS, stdin=b"\xff\xfe\n")
        self.assert_refused(result, "UTF-8")


if __name__ == "__main__":
    unittest.main()
