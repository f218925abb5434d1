# SPDX-License-Identifier: Apache-2.0
"""What bench/kda_gpu.py compares: Kilin, FLA (Triton) and FlashKDA behind one call each.

forward(x) -> (o [B, T, HV, V], final state [N, HV, V, K] float32). decode(x, pool) updates the pool in place.
Nothing here is copied from the peers; they are loaded from folders given on the command line.
"""
import concurrent.futures
import contextlib
import os
import sys
import tarfile

import torch


class Unsupported(Exception):
    """This implementation does not offer what the case asks for."""


class Kilin:
    name = "kilin"

    def __init__(self):
        import kilin
        import kilin.fla

        if not kilin.cuda_available():
            raise ImportError("this build of kilin has no CUDA kernels")
        self.ops = kilin.fla
        self.recurrent = kilin.fla.fused_recurrent_kda_fwd

    def forward(self, x):
        return call_fla_like(self.ops.chunk_kda, x)

    def decode(self, x, pool, indices):
        return decode_like_fla(self.recurrent, x, pool, indices)


class Fla:
    name = "fla"

    def __init__(self, folder, threads):
        os.environ["FLA_FLASH_KDA"] = "0"  # FLA would hand bounded-gate inference to FlashKDA
        if folder:
            sys.path.insert(0, folder)
        compile_in_parallel(threads)
        import fla.ops.kda
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

        self.ops = fla.ops.kda
        self.recurrent = fused_recurrent_kda_fwd

    def forward(self, x):
        return call_fla_like(self.ops.chunk_kda, x)

    def decode(self, x, pool, indices):
        return decode_like_fla(self.recurrent, x, pool, indices)


def call_fla_like(chunk_kda, x):
    kwargs = {}
    if x.gate != "none":
        kwargs.update(use_gate_in_kernel=True, A_log=x.a_log, dt_bias=x.dt_bias)
    if x.gate == "bounded":
        kwargs.update(safe_gate=True, lower_bound=x.lower_bound)
    if x.beta_scale == 2.0:
        kwargs.update(allow_neg_eigval=True)
    return chunk_kda(x.q, x.k, x.v, x.g, x.beta, scale=x.scale, initial_state=x.initial_state,
                     output_final_state=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                     state_v_first=True, cu_seqlens=x.cu_seqlens, **kwargs)


def decode_like_fla(fused_recurrent_kda_fwd, x, pool, indices):
    """The way vLLM calls it: state pool in place."""
    return fused_recurrent_kda_fwd(
        q=x.q, k=x.k, v=x.v, g=x.g, beta=x.beta, A_log=x.a_log, dt_bias=x.dt_bias, initial_state=pool,
        scale=x.scale, inplace_final_state=True, state_v_first=True, cu_seqlens=x.cu_seqlens,
        ssm_state_indices=indices, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, lower_bound=x.lower_bound if x.gate == "bounded" else None)[0]


class FlashKda:
    name = "flashkda"

    def __init__(self, folder):
        sys.path.insert(0, folder)
        import flash_kda

        self.module = flash_kda

    def forward(self, x):
        if x.gate != "bounded":
            raise Unsupported("FlashKDA has the bounded gate only")
        if x.beta_scale != 1.0:
            raise Unsupported("FlashKDA has beta in (0, 1) only")
        if x.v.shape[2] != x.q.shape[2]:
            raise Unsupported("FlashKDA has no grouped heads")
        out = torch.empty_like(x.v)
        state = torch.empty(x.sequences, x.v.shape[2], x.v.shape[3], x.q.shape[3], device=x.v.device)
        self.module.fwd(x.q, x.k, x.v, x.g, x.beta, x.scale, out, A_log=x.a_log,
                        dt_bias=x.dt_bias.view(x.v.shape[2], -1), lower_bound=x.lower_bound,
                        initial_state=x.initial_state, final_state=state, cu_seqlens=x.cu_seqlens)
        return out, state

    def decode(self, x, pool, indices):
        raise Unsupported("FlashKDA has no decode kernel")


def load(arguments):
    """([implementations], [why one is left out])."""
    found, missing = [], []
    for name, make in (("kilin", Kilin), ("fla", lambda: Fla(arguments.fla, arguments.compile_threads)),
                       ("flashkda", lambda: FlashKda(arguments.flash_kda))):
        if arguments.impl and name not in arguments.impl.split(","):
            continue
        if name == "flashkda" and not arguments.flash_kda:
            missing.append("flashkda: --flash-kda not given")
            continue
        try:
            found.append(make())
        except (ImportError, OSError) as error:
            missing.append(f"{name}: {error}")
    return found, missing


used_kernels = set()
tuning = True


@contextlib.contextmanager
def without_tuning():
    """Triton's autotuner takes its first candidate: for checks, where the time does not count."""
    global tuning
    tuning = False
    try:
        yield
    finally:
        tuning = True


def compile_in_parallel(threads):
    """Triton's autotuner compiles its candidates one after another. Compile them on all cores first; what is
    timed and chosen stays the same. Also notes which compiled kernels are used, for save_triton_cache."""
    import triton.runtime._async_compile as async_compile
    from triton.runtime.autotuner import Autotuner

    bench, run = Autotuner._bench, Autotuner.run
    executor = concurrent.futures.ThreadPoolExecutor(threads)

    def bench_after_compiling(self, *args, config, **meta):
        if getattr(self, "_compiled_for", None) is not self.nargs:
            self._compiled_for = self.nargs
            try:
                with async_compile.AsyncCompileMode(executor, ignore_errors=True):
                    for candidate in self.prune_configs(meta):
                        self.fn.run(*args, **{**meta, **candidate.all_kwargs(), "warmup": True})
            except Exception as error:  # a candidate that cannot compile is found again, and skipped, by _bench
                print(f"# compiling candidates of {self.base_fn.__name__}: {type(error).__name__}: {error}")
        return bench(self, *args, config=config, **meta)

    def noting_run(self, *args, **kwargs):
        candidates = self.configs
        if not tuning:
            self.configs = candidates[:1]
        try:
            kernel = run(self, *args, **kwargs)
        finally:
            self.configs = candidates
        used_kernels.add(getattr(kernel, "hash", None))
        return kernel

    if threads > 1:
        Autotuner._bench = bench_after_compiling
    Autotuner.run = noting_run


def save_triton_cache(path):
    """Autotuner results and the kernels that won, so that the next run need not tune again."""
    import base64

    folder = os.environ.get("TRITON_CACHE_DIR")
    if not folder or not os.path.isdir(folder):
        return
    wanted = set()
    for name in used_kernels - {None}:
        wanted.add(name)
        wanted.add(base64.b32encode(bytes.fromhex(name)).decode().rstrip("="))
    with tarfile.open(path, "w:gz") as archive:
        for entry in sorted(os.listdir(folder)):
            directory = os.path.join(folder, entry)
            if not os.path.isdir(directory):
                continue
            for name in os.listdir(directory):
                keep = name.endswith(".autotune.json") or (entry in wanted and name.endswith((".json", ".cubin")))
                if keep:
                    archive.add(os.path.join(directory, name), os.path.join(entry, name))
