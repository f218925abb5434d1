# SPDX-License-Identifier: Apache-2.0
"""Loads libkilin_torch.so, which registers the operators torch.ops.kilin.*."""
import os

import torch


def _load():
    # KILIN_TORCH_LIBRARY: another build, for example build/python/libkilin_torch.so while developing.
    path = os.environ.get("KILIN_TORCH_LIBRARY") or os.path.join(os.path.dirname(__file__), "libkilin_torch.so")
    if not os.path.exists(path):
        raise ImportError(f"{path} is missing: the package kilin was not built (docs/guides/python.md)")
    torch.ops.load_library(path)


_load()
torch.ops.kilin.set_num_threads(max(1, torch.get_num_threads()))


# Asked once: torch.compile does not trace the question.
_BUILT_WITH_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("kilin::kda", "CUDA")


def built_with_cuda():
    """Whether this build holds the CUDA kernels (they need a Hopper GPU)."""
    return _BUILT_WITH_CUDA


def require_device(tensor):
    """Refuses devices that this build has no kernels for."""
    if tensor.device.type in ("cpu", "meta"):
        return
    if tensor.device.type != "cuda":
        raise NotImplementedError(f"kilin: there are no kernels for device '{tensor.device.type}', only cpu and cuda")
    if not built_with_cuda():
        raise NotImplementedError(
            "kilin: this build has CPU kernels only; build it with nvcc 13 for CUDA tensors (docs/guides/python.md)")
