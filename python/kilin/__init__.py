# SPDX-License-Identifier: Apache-2.0
"""Kilin's kernels for PyTorch: Kimi Delta Attention (KDA) on the CPU and on Hopper GPUs.

    kilin.kda          our own signature
    kilin.fla          the functions of flash-linear-attention (fla.ops.kda) with their signatures
    kilin.layer        short convolution and gated RMSNorm around KDA
    kilin.kda_decode   one decode step of a whole layer
    kilin.vllm         the functions that vLLM's KDA layers call
"""
from ._library import built_with_cuda
from ._ops import BOUNDED, NONE, SOFTPLUS, kda, kda_pool, set_num_threads
from .decode import kda_decode

__version__ = "0.1.0"
__all__ = ["BOUNDED", "NONE", "SOFTPLUS", "built_with_cuda", "cuda_available", "kda", "kda_decode", "kda_pool",
           "set_num_threads"]


def cuda_available():
    """Whether CUDA tensors can be used: kernels in this build, and a Hopper GPU here."""
    import torch

    return built_with_cuda() and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
