#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that every #include follows the arrows between the rooms of src/ (architecture: who may look into which).

  tools/check_rooms.py [ROOT]      prints file:line: rule for each forbidden include; exit code 1 when there is one
  tools/check_rooms.py --self-test checks the checker on small trees with known faults
"""
import pathlib
import re
import sys
import tempfile

# room -> rooms it may include besides itself
ROOMS = {
    "base": "",
    "tensor": "base",
    "quant": "base tensor",
    "kernels": "base tensor quant",
    "io": "base tensor quant",
    "text": "base io",
    "model": "base tensor quant io",  # docs/decisions/model-reads-config.md
    "engine": "base tensor model kernels quant io text",
    "server": "base engine text",
    "train": "base tensor model kernels io text eval",  # eval: the synthetic tasks it trains on
    "eval": "base io text",
}
ROOMS = {room: set(allowed.split()) for room, allowed in ROOMS.items()}
# Tests and benchmarks beside the code may also read files (golden vectors, checkpoints).
TEST_EXTRA = {"base", "tensor", "io"}
# Folders outside src/: which rooms they may look into (None: all of them).
OUTSIDE = {"apps": None, "bench": None, "tests": None, "fuzz": None, "examples": set()}
# Rooms and folders that may include the public headers of include/kilin.
PUBLIC_USERS = {"engine", "server", "apps", "bench", "tests", "fuzz", "examples"}

SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
STANDARD_HEADER = re.compile(r"^[a-z0-9_]+(\.h)?$")
C_HEADERS = {"assert.h", "ctype.h", "errno.h", "float.h", "inttypes.h", "limits.h", "math.h", "stdarg.h", "stdbool.h",
             "stddef.h", "stdint.h", "stdio.h", "stdlib.h", "string.h", "time.h"}


def includes(path):
    """Yields (line number, '<' or '"', name) of each include; comments that span lines are skipped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.S)
    for number, line in enumerate(text.split("\n"), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1), match.group(2)


def files_under(folder):
    if folder.is_dir():
        yield from (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file())


def names(rooms):
    return ", ".join(sorted(rooms)) or "no other room"


def room_rule(room, path, quote, target):
    """The rule that an include in src/<room>/ breaks, or None."""
    head = target.split("/")[0]
    if head == "kilin" and "/" in target:
        return None if room in PUBLIC_USERS else f"room '{room}' must not include the public header '{target}'"
    if head not in ROOMS or "/" not in target:
        return None if quote == "<" else f'write "room/..." from src/, not "{target}"'
    if quote == "<":
        return f'"{target}" is ours: include it with quotes'
    allowed = ROOMS[room] | {room}
    if path.stem.endswith(("_test", "_bench")) or path.stem.startswith("test_"):
        allowed = allowed | TEST_EXTRA
    if head not in allowed:
        return f"room '{room}' must not include '{target}': it may look into {names(ROOMS[room])}"
    return None


def outside_rule(folder, target):
    """The rule that an include in apps/, bench/, ... breaks, or None."""
    head = target.split("/")[0]
    if head in ROOMS and "/" in target and OUTSIDE[folder] is not None:
        return f"{folder}/ must not include '{target}': it may include only include/kilin"
    return None


def public_rule(quote, target):
    if target.startswith("kilin/"):
        return None
    standard = STANDARD_HEADER.match(target) and ("." not in target or target in C_HEADERS)
    if quote == "<" and standard:
        return None
    return f"a public header must not include '{target}': only standard headers and kilin/..."


def cmake_faults(root):
    """Rooms linked in src/*/CMakeLists.txt must be allowed too, or an include of them would build."""
    for room in sorted(ROOMS):
        path = root / "src" / room / "CMakeLists.txt"
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            line = line.split("#")[0]
            match = re.search(r"\bROOMS\s+([a-z ]+)", line)
            for target in match.group(1).split() if match else []:
                if target not in ROOMS[room]:
                    yield f"{path.relative_to(root)}:{number}: room '{room}' must not link '{target}': it may look " \
                          f"into {names(ROOMS[room])}"


def faults(root):
    """All faults of a tree as 'file:line: rule', and the number of files read."""
    found, count = [], 0

    def check(path, rule_of):
        nonlocal count
        count += 1
        for number, quote, target in includes(path):
            rule = rule_of(quote, target)
            if rule:
                found.append(f"{path.relative_to(root)}:{number}: {rule}")

    src = root / "src"
    for folder in sorted(src.iterdir()) if src.is_dir() else []:
        if not folder.is_dir():
            continue
        if folder.name not in ROOMS:
            if any(files_under(folder)):
                found.append(f"src/{folder.name}:1: no room of this name in tools/check_rooms.py")
            continue
        for path in files_under(folder):
            check(path, lambda quote, target: room_rule(folder.name, path, quote, target))
    for folder in sorted(OUTSIDE):
        for path in files_under(root / folder):
            check(path, lambda quote, target: outside_rule(folder, target))
    for path in files_under(root / "include"):
        check(path, public_rule)
    found.extend(cmake_faults(root))
    return found, count


SELF_TEST = [  # file, content, the fault expected ("" for none)
    ("src/io/a.cc", '#include "io/a.h"\n#include "base/error.h"\n#include <fmt/format.h>\n', ""),
    ("src/base/a.cc", '\n#include "io/json.h"\n',
     "src/base/a.cc:2: room 'base' must not include 'io/json.h': it may look into no other room"),
    ("src/model/b.h", '#include "kernels/kda/kda.h"\n',
     "src/model/b.h:1: room 'model' must not include 'kernels/kda/kda.h': it may look into base, io, quant, tensor"),
    ("src/model/b_test.cc", '#include "io/safetensors.h"\n', ""),
    ("src/kernels/kda/k_isa.cc", '/* a\n#include "io/x.h"\n*/\n// #include "io/x.h"\n#include "engine/x.h"\n',
     "src/kernels/kda/k_isa.cc:5: room 'kernels' must not include 'engine/x.h': it may look into base, quant, tensor"),
    ("src/io/c.cc", '#include "json.h"\n', 'src/io/c.cc:1: write "room/..." from src/, not "json.h"'),
    ("src/io/d.cc", "#include <base/error.h>\n", 'src/io/d.cc:1: "base/error.h" is ours: include it with quotes'),
    ("src/attic/a.cc", "\n", "src/attic:1: no room of this name in tools/check_rooms.py"),
    ("src/text/CMakeLists.txt", "kilin_room(text\n  ROOMS base engine)\n",
     "src/text/CMakeLists.txt:2: room 'text' must not link 'engine': it may look into base, io"),
    ("apps/kilin/run.cc", '#include "engine/engine.h"\n#include "run.h"\n', ""),
    ("examples/hello.cc", '#include <kilin/kilin.h>\n#include "engine/engine.h"\n',
     "examples/hello.cc:2: examples/ must not include 'engine/engine.h': it may include only include/kilin"),
    ("include/kilin/kilin.h", "#include <string>\n#include <stdint.h>\n#include <kilin/types.h>\n", ""),
    ("include/kilin/x.h", "#include <fmt/format.h>\n",
     "include/kilin/x.h:1: a public header must not include 'fmt/format.h': only standard headers and kilin/..."),
    ("include/kilin/y.h", "#include <unistd.h>\n",
     "include/kilin/y.h:1: a public header must not include 'unistd.h': only standard headers and kilin/..."),
    ("src/io/e.cc", '#include "kilin/kilin.h"\n',
     "src/io/e.cc:1: room 'io' must not include the public header 'kilin/kilin.h'"),
]


def self_test():
    failed = 0
    for name, content, expected in SELF_TEST:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, name)
            path.parent.mkdir(parents=True)
            path.write_text(content, encoding="utf-8")
            found, _ = faults(pathlib.Path(folder))
            if found != ([expected] if expected else []):
                failed += 1
                print(f"self-test: {name}: found {found}, expected {expected!r}")
    for room, allowed in ROOMS.items():
        for other in allowed:
            if other not in ROOMS or room in ROOMS[other]:
                failed += 1
                print(f"self-test: the arrow {room} -> {other} has no target or goes both ways")
    print(f"self-test: {len(SELF_TEST)} trees, {failed} failed")
    return 1 if failed else 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    root = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).resolve().parent.parent
    found, count = faults(root)
    for fault in found:
        print(fault)
    if count == 0:
        print(f"{root}: found no sources")
    print(f"rooms: {count} files, {len(found)} forbidden includes")
    return 1 if found or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
