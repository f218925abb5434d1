#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training throughput on a GPU: `kilin train` beside a torch loop over FLA's KDA layer, the same work in both.

    python3 bench/train_gpu.py --kilin FOLDER/kilin --fla DIR [--layers 12 --hidden 1024 --heads 8 --mlp 2816
                               --vocabulary 16384 --sequence 4096 --batch 8] [--steps 20] [--json FILE]

A model of KDA layers and dense MLPs, forward, backward, clipping and AdamW, on random tokens, bfloat16 products over
float32 weights. Each is warmed up (FLA's kernels are compiled and tuned in its first step) and then timed; `kilin` is
run before and after the others, which shows how much the machine drifts. Share of peak: operations that the model needs
(src/train/cost.h) per second over 989.4 TFLOP/s, what the data sheet of the H100 SXM gives for dense bfloat16.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile

PEAK = 989.4e12

CONFIG = """
[run]
out = "{out}"
steps = {total}
log_every = 1
device = "{device}"
[model]
vocab_size = {vocabulary}
hidden_size = {hidden}
num_hidden_layers = {layers}
layers = "1:0"
intermediate_size = {mlp}
num_attention_heads = {heads}
kv_lora_rank = 128
qk_nope_head_dim = {head_dim}
qk_rope_head_dim = 0
v_head_dim = {head_dim}
[model.linear_attn_config]
num_heads = {heads}
head_dim = {head_dim}
short_conv_kernel_size = 4
[data]
kind = "tokens"
train = "{tokens}"
sequence = {sequence}
[batch]
sequences = {batch}
[optimizer]
lr = 1e-4
[schedule]
kind = "constant"
warmup = 0
[precision]
kind = "bf16"
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilin", required=True, help="the program, built with training and CUDA (scripts/train-cuda)")
    parser.add_argument("--fla", help="folder that holds the package fla; without it FLA is left out")
    parser.add_argument("--kinds", default="layer,fused", help="of train_gpu_peers.py")
    for name, value in (("layers", 12), ("hidden", 1024), ("heads", 8), ("head-dim", 128), ("mlp", 2816),
                        ("vocabulary", 16384), ("sequence", 4096), ("batch", 8)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile-threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=400, help="seconds for a process, which is ended then")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there, an object a line")
    return parser.parse_args()


def write_tokens(path, vocabulary, count):
    """A token file (src/train/token_file.h) of random ids."""
    import numpy

    ids = numpy.random.default_rng(0).integers(0, vocabulary, count)
    width = 2 if vocabulary <= 65536 else 4
    head = b"KILINTOK" + struct.pack("<IIQQQQii", 1, width, vocabulary, 0, count, 1, -1, -1)
    mark = 14695981039346656037
    for byte in head:
        mark = ((mark ^ byte) * 1099511628211) % (1 << 64)
    path.write_bytes(head + struct.pack("<Q", mark) + ids.astype(f"<u{width}").tobytes())


def run_kilin(arguments, shape, folder):
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    text = CONFIG.format(out=out, total=arguments.warmup + arguments.steps, device=arguments.device,
                         tokens=folder / "tokens.kbin", **shape)
    (folder / "train.toml").write_text(text, encoding="utf-8")
    try:
        done = subprocess.run([arguments.kilin, "train", "--config", folder / "train.toml", "--json"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {arguments.limit:.0f} s"}
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1]}
    result = json.loads(done.stdout.splitlines()[-1])
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = [r["tokens_per_second"] for r in records if r["step"] > arguments.warmup]
    speed = statistics.median(timed)
    shutil.rmtree(out)
    return {"tokens_per_second": speed, "step_ms": 1e3 * shape["batch"] * shape["sequence"] / speed,
            "loss": records[-1]["loss"],
            "flops_per_token": result["share_of_peak"] * result["peak_flops"] / result["tokens_per_second"],
            "measured_peak": result["peak_flops"]}


def run_peers(arguments, shape):
    task = {"fla": arguments.fla, "kinds": arguments.kinds.split(","), "shape": shape, "warmup": arguments.warmup,
            "steps": arguments.steps, "device": arguments.device, "compile_threads": arguments.compile_threads}
    script = pathlib.Path(__file__).with_name("train_gpu_peers.py")
    try:
        done = subprocess.run([sys.executable, script, json.dumps(task)], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=arguments.limit)
        out, wrong = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        out = late.stdout or ""
        out, wrong = out if isinstance(out, str) else out.decode(), f"not done after {arguments.limit:.0f} s"
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if wrong:
        found.append({"kind": "rest", "error": wrong.strip().splitlines()[-1][:300]})
    return found


def main():
    arguments = parse()
    shape = {name: getattr(arguments, name) for name in
             ("layers", "hidden", "heads", "head_dim", "mlp", "vocabulary", "sequence", "batch")}
    print("# " + ", ".join(f"{name} {value}" for name, value in shape.items()))
    print(f"{'':16s} {'ms a step':>10s} {'tokens/s':>10s} {'of peak':>8s} {'kilin is':>9s}")
    shared = pathlib.Path("/dev/shm")
    rows = []

    def show(name, row, flops=None, ours=None):
        rows.append({"name": name, **row})
        if "error" in row:
            print(f"{name:16s} {row['error']}", flush=True)
            return
        share = f"{100 * row['tokens_per_second'] * flops / PEAK:7.1f}%" if flops else ""
        ratio = f"{ours / row['tokens_per_second']:8.2f}x" if ours else ""
        print(f"{name:16s} {row['step_ms']:10.1f} {row['tokens_per_second']:10,.0f} {share:>8s} {ratio:>9s}", flush=True)

    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder = pathlib.Path(name)
        write_tokens(folder / "tokens.kbin", shape["vocabulary"], 64 * shape["batch"] * shape["sequence"] + 1)
        first = run_kilin(arguments, shape, folder)
        flops, ours = first.get("flops_per_token"), first.get("tokens_per_second")
        show("kilin", first, flops)
        if arguments.fla:
            for row in run_peers(arguments, shape):
                show("fla " + row.pop("kind"), row, flops, ours)
            show("kilin again", run_kilin(arguments, shape, folder), flops)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps({**shape, **row}) + "\n" for row in rows), encoding="utf-8")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
