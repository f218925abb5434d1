#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes unicode_tables.inc: the Unicode 16.0 general categories and the two properties that split patterns use.

16.0 is what both reference libraries carry (tiktoken 0.14 and tokenizers 0.23 agree on every code point).
unicodedata2 has the categories, regex the script; regex may be newer, so its answer is cut to what 16.0 assigned.

  python3 -m venv /tmp/unicode && /tmp/unicode/bin/pip install unicodedata2==16.0.0 regex tiktoken
  /tmp/unicode/bin/python src/text/make_unicode_tables.py
  /tmp/unicode/bin/python src/text/make_unicode_tables.py --check    # compares with tiktoken, code point by code point
"""
import sys
from pathlib import Path

import regex
import unicodedata2

HERE = Path(__file__).resolve().parent
CODE_POINTS = 0x110000
VERSION = "16.0.0"


def ranges(values):
    """[(first, value)] wherever the value changes."""
    out = []
    for code, value in enumerate(values):
        if not out or out[-1][1] != value:
            out.append((code, value))
    return out


def runs(values):
    """[(count, value)]"""
    found = ranges(values) + [(len(values), None)]
    return [(found[i + 1][0] - first, value) for i, (first, value) in enumerate(found[:-1])]


def wrapped(items):
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) + 1 > 110:
            lines.append(line)
            line = ""
        line += item + ","
    return "\n".join(lines + [line])


def property_pairs(member):
    found = ranges([member(c) for c in range(CODE_POINTS)]) + [(CODE_POINTS, False)]
    return [f"{{0x{a:X}, 0x{found[i + 1][0] - 1:X}}}" for i, (a, inside) in enumerate(found[:-1]) if inside]


def is_surrogate(code):
    return 0xD800 <= code <= 0xDFFF


def main():
    if unicodedata2.unidata_version != VERSION:
        sys.exit(f"unicodedata2 has Unicode {unicodedata2.unidata_version}, expected {VERSION}")
    category = [unicodedata2.category(chr(c)) for c in range(CODE_POINTS)]
    han = regex.compile(r"\p{Script=Han}")
    space = regex.compile(r"\p{White_Space}")

    def has(pattern):
        return lambda c: not is_surrogate(c) and category[c] != "Cn" and bool(pattern.match(chr(c)))

    if "--check" in sys.argv:
        return check(category, has(han), has(space))
    text = [
        "// SPDX-License-Identifier: Apache-2.0",
        f"// Unicode {VERSION}, written by make_unicode_tables.py: do not edit.",
        "// Runs of code points, from 0 to 0x10FFFF: how many, and their category.",
        "constexpr CategoryRun kCategoryRuns[] = {",
        wrapped(f"{{{count},k{value}}}" for count, value in runs(category)),
        "};",
        "constexpr CodePointRange kHan[] = {",
        wrapped(property_pairs(has(han))),
        "};",
        "constexpr CodePointRange kWhiteSpace[] = {",
        wrapped(property_pairs(has(space))),
        "};",
    ]
    (HERE / "unicode_tables.inc").write_text("\n".join(text) + "\n")


def check(category, han, space):
    import tiktoken
    codes = [c for c in range(CODE_POINTS) if not is_surrogate(c)]
    text = "".join(map(chr, codes))

    def matched(pattern):  # tiktoken drops what the pattern does not match
        ranks = {bytes([b]): b for b in range(256)}
        encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        parts = (encoding.encode_ordinary(text[i:i + 4096]) for i in range(0, len(text), 4096))
        return {ord(c) for ids in parts for c in bytes(ids).decode()}

    failures = 0
    for name in sorted(set(category) - {"Cs"}):
        failures += matched(rf"\p{{{name}}}") != {c for c in codes if category[c] == name}
    failures += matched(r"\p{Han}") != {c for c in codes if han(c)}
    failures += matched(r"\s") != {c for c in codes if space(c)}
    sys.exit(f"{failures} properties differ from tiktoken's" if failures else 0)


if __name__ == "__main__":
    main()
