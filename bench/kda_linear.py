#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of KDA layers over the length of the prompt, 1k to 128k tokens.

  bench/kda_linear.py [--kilin build/release/kilin] [--threads 2] [--longest 131072] [--repeat 3]

Two tables in one: the KDA operator alone (kilin bench kda, 8 heads x 128) and prefill of a model that has only KDA layers
(configs/bench/kda-only.json, random weights), each length in a process of its own, whose peak memory is told. Linear means:
the time per token and the memory stay what they are. The last line is a JSON object.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command):
    """Standard output and peak resident bytes of one process."""
    print("+", " ".join(map(str, command)), file=sys.stderr)
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out = process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"kda_linear: {' '.join(map(str, command))}: {errors[-1000:]}")
    return json.loads(out.strip().split("\n")[-1]), usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilin", default=str(ROOT / "build/release/kilin"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=131072)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rows = []
    tokens = 1024
    print("| tokens | KDA operator, ns per token | KDA-only model, us per token | peak memory, MiB |")
    print("| --- | --- | --- | --- |")
    while tokens <= options.longest:
        common = ["--threads", options.threads, "--repeat", options.repeat, "--json"]
        kernel, _ = run([options.kilin, "bench", "kda", "--tokens", tokens, *common])
        model, peak = run([options.kilin, "bench", "prefill", "--config", ROOT / "configs/bench/kda-only.json", "--tokens",
                           tokens, *common])
        rows.append({"tokens": tokens, "kernel_ns_per_token": 1e9 / kernel["tokens_per_second"],
                     "model_us_per_token": 1e6 / model["tokens_per_second"], "peak_bytes": peak})
        r = rows[-1]
        print(f"| {r['tokens']:,} | {r['kernel_ns_per_token']:.0f} | {r['model_us_per_token']:.1f} | "
              f"{r['peak_bytes'] / 2**20:.0f} |", flush=True)
        tokens *= 2
    print(json.dumps({"bench": "kda_linear", "threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
