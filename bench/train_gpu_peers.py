# SPDX-License-Identifier: Apache-2.0
"""What bench/train_gpu.py compares `kilin train` with: a torch loop over FLA's KDA layer, as its users write it.

Matrix products in bfloat16 over float32 weights (autocast), AdamW of one kernel, gradients clipped to norm 1, one wait
for the GPU a step. "layer": the rest of the model in torch's own modules. "fused": norms, MLP and loss in FLA's fused
kernels too. Nothing of FLA is copied; the package is loaded from a folder given on the command line.
"""
import importlib
import json
import os
import statistics
import sys
import time
import types

import torch
from torch import nn
from torch.nn import functional


def load_fla(folder):
    """{name: class} of FLA. Its packages are loaded module by module: `import fla.layers` would load all layers."""
    os.environ["FLA_FLASH_KDA"] = "0"
    if folder:
        sys.path.insert(0, folder)
    import fla

    layers = types.ModuleType("fla.layers")
    layers.__path__ = [os.path.join(os.path.dirname(fla.__file__), "layers")]
    sys.modules["fla.layers"] = layers
    kda = importlib.import_module("fla.layers.kda")
    from fla.modules import FusedCrossEntropyLoss, GatedMLP, RMSNorm

    return {"kda": kda.KimiDeltaAttention, "norm": RMSNorm, "mlp": GatedMLP, "loss": FusedCrossEntropyLoss}


class Mlp(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, fla, shape, fused):
        super().__init__()
        hidden = shape["hidden"]
        self.norm1 = fla["norm"](hidden, eps=1e-5) if fused else nn.RMSNorm(hidden, eps=1e-5)
        self.attention = fla["kda"](hidden_size=hidden, head_dim=shape["head_dim"], num_heads=shape["heads"],
                                    conv_size=4, layer_idx=0)
        self.norm2 = fla["norm"](hidden, eps=1e-5) if fused else nn.RMSNorm(hidden, eps=1e-5)
        self.mlp = (fla["mlp"](hidden_size=hidden, intermediate_size=shape["mlp"]) if fused
                    else Mlp(hidden, shape["mlp"]))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, fla, shape, fused):
        super().__init__()
        hidden = shape["hidden"]
        self.embedding = nn.Embedding(shape["vocabulary"], hidden)
        self.layers = nn.ModuleList(Layer(fla, shape, fused) for _ in range(shape["layers"]))
        self.norm = fla["norm"](hidden, eps=1e-5) if fused else nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, shape["vocabulary"], bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def measure(kind, fla, shape, warmup, steps, device):
    """{tokens_per_second, step_ms, parameters, loss, warmup_seconds, memory_gb} of the median step."""
    fused = kind == "fused"
    torch.manual_seed(0)
    model = Model(fla, shape, fused).to(device)
    loss_function = fla["loss"]() if fused else nn.CrossEntropyLoss()
    cuda = device.startswith("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["sequence"] + 1), device=device)
    times, start = [], time.perf_counter()
    for step in range(warmup + steps):
        begin = time.perf_counter()
        with torch.autocast("cuda" if cuda else "cpu", dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        logits = logits.flatten(0, 1)
        loss = loss_function(logits if fused else logits.float(), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = loss.item()
        if cuda:
            torch.cuda.synchronize()
        if step >= warmup:
            times.append(time.perf_counter() - begin)
        elif step == warmup - 1:
            warmed = time.perf_counter() - start
    median = statistics.median(times)
    return {"tokens_per_second": shape["batch"] * shape["sequence"] / median, "step_ms": median * 1e3,
            "parameters": sum(p.numel() for p in model.parameters()), "loss": last, "warmup_seconds": warmed,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0}


def main():
    """Run by train_gpu.py in a process of its own: its argument is JSON, a JSON line comes out for each kind."""
    task = json.loads(sys.argv[1])
    if task["compile_threads"] > 1:
        import kda_gpu_peers

        kda_gpu_peers.compile_in_parallel(task["compile_threads"])
    fla = load_fla(task["fla"])
    for kind in task["kinds"]:
        try:
            result = measure(kind, fla, task["shape"], task["warmup"], task["steps"], task["device"])
        except torch.OutOfMemoryError as error:
            result = {"error": str(error)[:200]}
        print(json.dumps({"kind": kind, "torch": torch.__version__, **result}), flush=True)


if __name__ == "__main__":
    main()
