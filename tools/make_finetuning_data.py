#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes two small tasks for fine-tuning out of the documentation corpus (docs/guides/finetuning.md).

  tools/make_finetuning_data.py OUT_DIR [--corpus FILE] [--passages N] [--seed N]

FILE has documents parted by a form feed, plain or .xz (default: tests/data/reference/corpus/valid.txt.xz). Written are
  source_train.jsonl, source_valid.jsonl   classification: which collection a passage of some 300 characters is from
  field_train.jsonl, field_valid.jsonl     extraction: title, maintainer or licence out of the head of a device tree
                                           binding
  LICENCES.txt                             where the text is from
A record is {"messages": [user, assistant]}: `kilin train` and `kilin eval` both take it. A third of the documents of
each collection is held out; no document is on both sides. The same arguments give the same bytes.
"""
import argparse
import json
import lzma
import pathlib
import random
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/data/reference/corpus/valid.txt.xz"
# Tried in this order on the first characters of a document.
COLLECTIONS = [
    ("man", re.compile(r"\A\S+\(\d\w*\)\s{2,}")),
    ("bible", re.compile(r"\A[1-3]? ?[A-Z][a-z]+ \d+\n\n +1 ")),
    ("postgresql", re.compile(r"\A[^\n]+\n *Prev   Up ")),
    ("sqlite", re.compile(r"\ASmall\. Fast\. Reliable\.")),
    ("vim", re.compile(r"\AVim documentation:")),
    ("perl", re.compile(r"\A(=encoding utf8\s+)?=head1 ")),
    ("devicetree", re.compile(r"%YAML 1\.2|[Rr]equired properties")),
    ("git", re.compile(r"\Agit|\AGit |\APRETTY FORMATS|Junio C Hamano")),
    ("python", re.compile(r"\A(\.\. (_using|highlight:: c|_unicode-howto)|:mod:`)")),
    ("kernel", re.compile(r"SPDX-License-Identifier: G|Kernel driver|\A=+\n|\AWhat:")),
]
HEAD = 1500  # characters in which a collection shows
LEAST, PASSAGE = 200, 320  # characters of a passage
LEAST_DOCUMENTS = 3  # of a collection that becomes a label
SOURCE_QUESTION = "Which collection is this text from?"
FIELDS = [("title", re.compile(r"^title: (.+)$", re.M)),
          ("maintainer", re.compile(r"^maintainers:\n\s+- (.+?) <", re.M)),
          ("licence", re.compile(r"SPDX-License-Identifier: \(?([^)\n]+?)\)?$", re.M))]
FIELD_HEAD = 420  # characters of a binding: licence, title and maintainers are in them
LICENCES = """The text is from Debian 12 packages, as tests/data/reference/corpus/README.md lists them with versions:
man: manpages, manpages-dev (Linux-man-pages-copyleft, BSD, GPL-2+, Expat); bible: bible-kjv-text (expired);
postgresql: postgresql-doc-15 (PostgreSQL licence); sqlite: sqlite3-doc (public domain); vim: vim-doc (Vim licence,
OPL-1+); perl: perl-doc (GPL-1+ or Artistic); devicetree, kernel: linux-doc-6.1 (GPL-2, parts BSD-2-clause, LGPL-2.1,
X11); git: git-doc (GPL-2); python: python3.11-doc (PSF licence). A passage keeps the licence of its document.
"""


def read_documents(path):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [document for document in file.read().split("\f") if document.strip()]


def collection_of(document):
    head = document[:HEAD]
    return next((name for name, pattern in COLLECTIONS if pattern.search(head)), None)


def passages_of(document):
    """Pieces of whole lines that do not overlap."""
    pieces, piece = [], ""
    for line in document.splitlines(keepends=True):
        if len(line) > PASSAGE:
            line = line[:PASSAGE]
        if len(piece) + len(line) > PASSAGE:
            pieces.append(piece)
            piece = ""
        piece += line
    return [p.strip("\n") for p in [*pieces, piece] if len(p.strip()) >= LEAST]


def record(text, question, answer):
    return {"messages": [{"role": "user", "content": f"{text}\n\n{question}"}, {"role": "assistant", "content": answer}]}


def split(documents, generator):
    """A third of them, at least one, is held out."""
    shuffled = documents[:]
    generator.shuffle(shuffled)
    held_out = max(1, len(shuffled) // 3)
    return {"train": shuffled[held_out:], "valid": shuffled[:held_out]}


def spread(lists, count, generator):
    """Up to `count` items, from each list in turn."""
    lists = [generator.sample(items, len(items)) for items in lists]
    chosen = []
    while len(chosen) < count and any(lists):
        for items in lists:
            if items and len(chosen) < count:
                chosen.append(items.pop())
    return chosen


def source_task(by_collection, passages, generator):
    sides = {"train": [], "valid": []}
    for name, documents in sorted(by_collection.items()):
        for side, part in split(documents, generator).items():
            count = passages if side == "train" else max(1, passages // 3)
            texts = spread([passages_of(document) for document in part], count, generator)
            sides[side] += [record(text, SOURCE_QUESTION, name) for text in texts]
    return sides


def field_task(bindings, generator):
    sides = {"train": [], "valid": []}
    for side, part in split(bindings, generator).items():
        for document in part:
            head = document[:FIELD_HEAD]
            for name, pattern in FIELDS:
                found = pattern.search(head)
                if found:
                    answer = found[1].strip().strip("'\"")
                    sides[side].append(record(head, f"What is the {name} of this device tree binding?", answer))
    return sides


def write(path, records, generator):
    generator.shuffle(records)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    print(f"{path}: {len(records)} records")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, metavar="OUT_DIR")
    parser.add_argument("--corpus", type=pathlib.Path, default=CORPUS)
    parser.add_argument("--passages", type=int, default=60, help="training passages of a label, a third held out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    documents = read_documents(options.corpus)
    by_collection = {}
    for document in documents:
        name = collection_of(document)
        if name:
            by_collection.setdefault(name, []).append(document)
    by_collection = {name: found for name, found in by_collection.items() if len(found) >= LEAST_DOCUMENTS}
    bindings = [d for d in by_collection.get("devicetree", []) if "%YAML" in d[:HEAD]]
    if len(by_collection) < 2 or len(bindings) < LEAST_DOCUMENTS:
        sys.exit(f"{options.corpus}: found {len(by_collection)} known collections, expected at least two and device "
                 "tree bindings")
    options.out.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    for task, sides in (("source", source_task(by_collection, options.passages, generator)),
                        ("field", field_task(bindings, generator))):
        for side, records in sides.items():
            write(options.out / f"{task}_{side}.jsonl", records, generator)
    (options.out / "LICENCES.txt").write_text(LICENCES, encoding="utf-8")
    print("documents: " + ", ".join(f"{name} {len(found)}" for name, found in sorted(by_collection.items())))


if __name__ == "__main__":
    main()
