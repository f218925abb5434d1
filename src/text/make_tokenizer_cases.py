#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Random texts with the ids that tokenizers and tiktoken give them, to compare the C++ tokenizer with.

  python3 -m venv /tmp/refvenv && /tmp/refvenv/bin/pip install tiktoken tokenizers
  /tmp/refvenv/bin/python src/text/make_tokenizer_cases.py models/kilin-docs-10m /tmp/cases.json --count 20000 --seed 1
  KILIN_TOKENIZER_CASES=/tmp/cases.json build/release/kilin_text_test --gtest_filter='*cases_file*'

tests/data/tokenizer/hard_cases.json is --count 300 --seed 7 --longest 40. Each case: text, ids, and plain, the ids
with special tokens read as ordinary text. Both libraries read the same files and gave the same ids for every text
tried so far; where they differ the script says so and keeps tokenizers' ids, as it is tokenizer.json that counts.
"""
import argparse
import base64
import json
import random
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer

NEW = [  # assigned after Unicode 14: where tables of different age disagree
    (0x2EBF0, 0x2EE5D), (0x31350, 0x323AF), (0x11F00, 0x11F59), (0x1E4D0, 0x1E4F9), (0x10D40, 0x10D8F),
    (0xA7CB, 0xA7DC), (0x1C89, 0x1C8A), (0x16D40, 0x16D79), (0x13460, 0x143FA), (0x1E5D0, 0x1E5FF),
    (0x1CCF0, 0x1CCF9), (0x1DF25, 0x1DF2A), (0x11240, 0x11241), (0x323B0, 0x33479)]
SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
    (0x2070, 0x218F), (0x2E80, 0x2FDF), (0x3000, 0x30FF), (0x3100, 0x33FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x16FE0, 0x16FF1),
    (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F),
    (0xE0000, 0xE01EF), (0x10FFF0, 0x10FFFF)]
SPACES = [chr(c) for c in [*range(0x9, 0xE), 0x1C, 0x1F, 0x20, 0x20, 0x20, 0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x200A,
                           0x200B, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0xFEFF]]
WORDS = ["camelCase", "HTTPServer2Go", "iPhone", "isn't", "I'LL", "we'Ve", "x'S", "\u017f'\u017f", "'\u212a", "Ka",
         "they\u2019re", "1234567", "3.14", "snake_case", "a/b.c", "ǅ", "ʰ", "ªº", "e\u0301", "\u0301", "ﬁ", "ﷺ", "中文", "漢",
         "〇々", "カナ", "한국어", "Ⅷ", "½", "٣٤٥", "🙂", "👍🏽", "👩\u200d💻", "🇩🇪", "\r\n", "\n\n", "\t", "  ", "   ", "...", "!!",
         "=>", "```", "\x00", "\x7f", "�", "'", "’s", "'t", "'re", "'ll", "'D", "'M", "\u0130", "\u0131", "ß", "ẞ"]


class Texts:
    def __init__(self, seed, specials, longest):
        self.random, self.specials, self.longest = random.Random(seed), specials, longest

    def char(self, low, high):
        while True:
            code = self.random.randint(low, high)
            if not 0xD800 <= code <= 0xDFFF:
                return chr(code)

    def atom(self, kind):
        r = self.random
        if kind == 0:
            return self.char(0, 0x10FFFF)
        if kind == 1:
            return self.char(*r.choice(SCRIPTS))
        if kind == 2:
            return self.char(*r.choice(NEW))
        if kind == 3:
            return r.choice(SPACES)
        if kind == 4:
            return r.choice(WORDS)
        if kind == 5:
            special = r.choice(self.specials)
            return special if r.random() < 0.6 else special[r.randint(0, 3):r.randint(3, len(special))]
        if kind == 6:
            return self.char(0x20, 0x7E)
        return self.char(0, 0x7F) * r.randint(1, 4)

    def text(self):
        r = self.random
        kinds = r.choice([[0], [1], [2], [3], [4], [6], [7], [0, 1, 2, 3], [2, 3, 4], [3, 4], [4, 5], [1, 3, 4, 5, 6],
                          [0, 1, 2, 3, 4, 5, 6, 7], [6, 3], [5, 3]])
        script = r.choice(SCRIPTS) if r.random() < 0.3 else None
        count = r.randint(0, self.longest)
        return "".join(self.char(*script) if script and r.random() < 0.7 else self.atom(r.choice(kinds))
                       for _ in range(r.randint(0, count)))


def load(model):
    fast = Tokenizer.from_file(str(model / "tokenizer.json"))
    pattern = json.loads((model / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    lines = [line.split() for line in (model / "tiktoken.model").read_bytes().splitlines()]
    added = json.loads((model / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    specials = {entry["content"]: int(token) for token, entry in added.items()}
    tik = tiktoken.Encoding("kilin", pat_str=pattern, mergeable_ranks={base64.b64decode(t): int(i) for t, i in lines},
                            special_tokens=specials)
    return fast, tik, list(specials)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=120)
    options = parser.parse_args()
    fast, tik, specials = load(options.model)
    source = Texts(options.seed, specials, options.longest)
    texts = [source.text() for _ in range(options.count)]
    cases, differ = [], 0

    def ids(parse):
        fast.encode_special_tokens = not parse
        return [e.ids for e in fast.encode_batch(texts, add_special_tokens=False)]

    for text, parsed, plain in zip(texts, ids(True), ids(False)):
        if parsed != tik.encode(text, allowed_special="all") or plain != tik.encode_ordinary(text):
            differ += 1
            print("tiktoken differs from tokenizers:", ascii(text))
        cases.append({"text": text, "ids": parsed, "plain": plain})
    rows = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    options.out.write_text(f"[\n{rows}\n]\n")
    print(f"{len(cases)} cases, tiktoken and tokenizers differ in {differ}")


if __name__ == "__main__":
    main()
