#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Accuracy and speed of KDA on a GPU: Kilin beside FLA (Triton) and FlashKDA.

    python3 bench/kda_gpu.py --fla DIR --flash-kda DIR [--quick] [--only check,fwd,varlen,bwd,decode] [--backward]
                             [--impl kilin,fla] [--repeats N] [--budget SECONDS] [--json FILE] [--triton-cache FILE.tgz]

Accuracy: against the float64 recurrence (kda_gpu_reference.py), RMS of the difference over RMS of the result, and
the largest difference. bf16 outputs alone cost about 0.0017.
Speed, D 128, bf16, float32 state, l2norm, gate and sigmoid of beta inside the call, final state written:
    kernel   median over replays of a CUDA graph that holds one call per input set (sets together larger than twice
             the L2 cache); "events" where an implementation cannot be captured, which then includes launch gaps
    call     median of a call with a synchronisation after it
    host     what the CPU needs to issue a call
    floor    share of the time that moving q, k, v, g, beta, o and the states once takes at measured copy bandwidth
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import kda_gpu_peers as peers  # noqa: E402
import kda_gpu_reference as reference  # noqa: E402

MIXED = [1300, 547, 2048, 963, 271, 3063]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", help="folder that holds the package fla")
    parser.add_argument("--flash-kda", help="folder that holds flash_kda and flash_kda_C")
    parser.add_argument("--impl", default="", help="names, parted by commas; all without it")
    parser.add_argument("--only", default="", help="check, fwd, varlen, bwd, decode, parted by commas")
    parser.add_argument("--backward", action="store_true", help="forward and backward too")
    parser.add_argument("--cases", default="0/1", help="K/N: every Nth accuracy case from K, to run N processes")
    parser.add_argument("--quick", action="store_true", help="few shapes, few repeats")
    parser.add_argument("--repeats", type=int, help="of a measurement; 30, with --quick 10")
    parser.add_argument("--budget", type=float, default=1e9, help="start no new row after so many seconds")
    parser.add_argument("--json", help="write all figures there, one JSON object per line")
    parser.add_argument("--triton-cache", help="write FLA's tuning results and kernels there")
    parser.add_argument("--compile-threads", type=int, default=os.cpu_count())
    return parser.parse_args()


class Report:
    def __init__(self, path, budget):
        self.file = open(path, "w") if path else None
        self.start = time.monotonic()
        self.budget = budget
        self.left_out = 0

    def row(self, **values):
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def seconds(self):
        return time.monotonic() - self.start

    def over_budget(self):
        if self.seconds() > self.budget:
            self.left_out += 1
            return True
        return False


def synchronize():
    torch.cuda.synchronize()


def copy_bandwidth():
    """Bytes read plus bytes written per second of a device copy of 1 GiB, the best of some."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / min(times)


def event_times(function, repeats):
    """Milliseconds of each of some runs of function, by device events."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        function()
        end.record()
    synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def time_calls(calls, repeats):
    """{kernel_us, how, call_us, host_us} of calls: functions without arguments that do the same work on different
    inputs."""
    for call in calls[:2]:
        call()
    synchronize()
    how = "graph"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        synchronize()
        times = event_times(graph.replay, repeats)
        kernel = statistics.median(times) / len(calls)
        del graph
    except Exception as error:  # an implementation that synchronises or allocates behind torch's back
        how = f"events ({type(error).__name__})"
        synchronize()

        def run_all():
            for call in calls:
                call()

        run_all()
        kernel = statistics.median(event_times(run_all, repeats)) / len(calls)
    latencies, host = [], []
    for i in range(max(8, repeats)):
        synchronize()
        begin = time.perf_counter()
        calls[i % len(calls)]()
        issued = time.perf_counter()
        synchronize()
        latencies.append(time.perf_counter() - begin)
        host.append(issued - begin)
    return {"kernel_us": kernel * 1e3, "how": how, "call_us": statistics.median(latencies) * 1e6,
            "host_us": statistics.median(host) * 1e6}


def sets_needed(nbytes, most):
    """How many input sets of so many bytes do not stay in the L2 cache."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, -(-2 * l2 // nbytes)))


def show(report, label, name, result, floor_us):
    share = floor_us / result["kernel_us"]
    note = "" if result["how"] == "graph" else "  " + result["how"]
    print(f"{label:34s} {name:9s} {result['kernel_us']:10.1f} {result['call_us']:10.1f} {result['host_us']:8.1f}"
          f" {100 * share:6.1f}%{note}", flush=True)
    report.row(row=label, impl=name, floor_us=floor_us, share=share, **result)


def guarded(report, label, implementation, function):
    """Runs function; prints what went wrong instead of stopping the others."""
    torch.cuda.empty_cache()
    try:
        return function()
    except peers.Unsupported:
        pass
    except NotImplementedError as error:
        print(f"{label:34s} {implementation.name:9s} not there: {str(error)[:80]}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"{label:34s} {implementation.name:9s} FAILED {text[:160]}", flush=True)
        report.row(row=label, impl=implementation.name, error=text)
    return None


def check(report, implementations, part):
    print(f"{'accuracy':30s} {'impl':9s} {'o rms':>9s} {'o max':>9s} {'state rms':>9s} {'state max':>9s}")
    which, parts = (int(n) for n in part.split("/"))
    for name, x in reference.accuracy_cases()[which::parts]:
        if report.over_budget():
            continue
        expected_o, expected_state = reference.recurrence(x)
        for implementation in implementations:
            def run(implementation=implementation):
                with torch.no_grad(), peers.without_tuning():
                    o, state = implementation.forward(x)
                synchronize()
                return reference.errors(o, expected_o) + reference.errors(state, expected_state)

            result = guarded(report, name, implementation, run)
            if result:
                print(f"{name:30s} {implementation.name:9s} " + " ".join(f"{e:9.2e}" for e in result), flush=True)
                report.row(row=f"check {name}", impl=implementation.name, o_rms=result[0], o_max=result[1],
                           state_rms=result[2], state_max=result[3])


def time_forward(report, implementations, bandwidth, shapes, repeats):
    for label, gate, tokens, heads, cu_seqlens in shapes:
        if report.over_budget():
            continue

        sets = [reference.make_inputs(tokens, heads, gate=gate, cu_seqlens=cu_seqlens)]
        for seed in range(1, sets_needed(sets[0].nbytes(), 8)):
            sets.append(reference.make_inputs(tokens, heads, gate=gate, cu_seqlens=cu_seqlens, seed=seed))
        floor_us = sets[0].nbytes() / bandwidth * 1e6
        for implementation in implementations:
            def run(implementation=implementation):
                with torch.no_grad():
                    return time_calls([lambda x=x: implementation.forward(x) for x in sets], repeats)

            result = guarded(report, label, implementation, run)
            if result:
                show(report, label, implementation.name, result, floor_us)


def time_backward(report, implementations, bandwidth, repeats):
    tokens, heads = 8192, 32
    for gate in ("softplus", "bounded"):
        label = f"fwd+bwd {gate} T{tokens} H{heads}"
        if report.over_budget():
            continue
        x = reference.make_inputs(tokens, heads, gate=gate)
        leaves = x.leaves() + [x.a_log, x.dt_bias]
        for leaf in leaves:
            leaf.requires_grad_()
        upstream = torch.randn_like(x.v)
        # forward: inputs and o; backward: inputs and do again, the five gradients
        floor_us = (2 * x.nbytes() + sum(t.numel() * t.element_size() for t in x.leaves())) / bandwidth * 1e6
        for implementation in implementations:
            def call(implementation=implementation):
                o, _ = implementation.forward(x)
                torch.autograd.grad(o, leaves, upstream)

            result = guarded(report, label, implementation, lambda: time_calls([call], repeats))
            if result:
                show(report, label, implementation.name, result, floor_us)


def time_decode(report, implementations, bandwidth, batches, repeats):
    heads, dim = 32, 128
    for batch in batches:
        label = f"decode B{batch} H{heads}"
        if report.over_budget():
            continue
        sets = []
        state_bytes = batch * heads * dim * dim * 4
        for seed in range(sets_needed(state_bytes, 64)):
            x = reference.make_inputs(batch, heads, gate="softplus", cu_seqlens=list(range(batch + 1)), seed=seed)
            pool = torch.randn(batch, heads, dim, dim, device="cuda")
            sets.append((x, pool, torch.arange(batch, dtype=torch.int32, device="cuda")))
        x = sets[0][0]
        floor_us = (2 * state_bytes + sum(t.numel() * t.element_size() for t in x.leaves() + [x.v])) / bandwidth * 1e6
        for implementation in implementations:
            def run(implementation=implementation):
                with torch.no_grad():
                    return time_calls([lambda s=s: implementation.decode(*s) for s in sets], repeats)

            result = guarded(report, label, implementation, run)
            if result:
                show(report, label, implementation.name, result, floor_us)


def shapes(quick):
    """(label, gate, tokens, heads, cu_seqlens) of the forward rows and of the rows with several sequences."""
    gates = ("softplus", "bounded")
    sizes = [(8192, 32), (8192, 96)] if quick else (
        [(8192, h) for h in (16, 32, 64, 96)] + [(512, 32), (2048, 32), (32768, 32), (131072, 32), (65536, 8)])
    forward = [(f"fwd {g} T{t} H{h}", g, t, h, None) for t, h in sizes for g in gates]
    mixed = [sum(MIXED[:i]) for i in range(len(MIXED) + 1)]
    equal = list(range(0, 8193, 1024))
    varlen = [(f"varlen {g} {name} H96", g, 8192, 96, cu) for name, cu in (("8x1024", equal), ("mixed", mixed))
              for g in (gates[1:] if quick else gates)]
    return forward, varlen


def main():
    arguments = parse()
    only = arguments.only.split(",") if arguments.only else ["check", "fwd", "varlen", "decode"]
    if arguments.backward and "bwd" not in only:
        only.append("bwd")
    torch.manual_seed(0)
    report = Report(arguments.json, arguments.budget)
    implementations, missing = peers.load(arguments)
    for line in missing:
        print(f"# left out: {line}")
    bandwidth = copy_bandwidth()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, "
          f"{', '.join(i.name for i in implementations)}")
    report.row(row="machine", device=torch.cuda.get_device_name(), torch=torch.__version__, bandwidth=bandwidth)
    repeats = arguments.repeats or (10 if arguments.quick else 30)
    if "check" in only:
        check(report, implementations, arguments.cases)
    if only == ["check"]:
        return
    forward, varlen = shapes(arguments.quick)
    print(f"{'speed, microseconds':34s} {'impl':9s} {'kernel':>10s} {'call':>10s} {'host':>8s} {'floor':>7s}")
    if "fwd" in only:
        time_forward(report, implementations, bandwidth, forward, repeats)
    if "varlen" in only:
        time_forward(report, implementations, bandwidth, varlen, repeats)
    if "bwd" in only:
        time_backward(report, implementations, bandwidth, repeats)
    if "decode" in only:
        time_decode(report, implementations, bandwidth, (1, 128) if arguments.quick else (1, 16, 128, 512), repeats)
    if arguments.triton_cache:
        peers.save_triton_cache(arguments.triton_cache)
    print(f"# {report.seconds():.0f} s" + (f", {report.left_out} rows left out (budget)" if report.left_out else ""))


if __name__ == "__main__":
    main()
