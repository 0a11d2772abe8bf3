"""act(first half) * second half over the last dimension, and the activations by transformers' names."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from porter.kernels.backend import tl, triton, use_triton
from porter.kernels.cpu_library import CpuFunction, cpu_function

Activation = Callable[[torch.Tensor], torch.Tensor]

CASES: list[dict[str, Any]] = [
    {"num_tokens": tokens, "size": size, "hidden_act": act}
    for tokens, size, act in [(1, 64, "silu"), (5, 96, "gelu"), (3, 33, "gelu_pytorch_tanh"), (2, 130, "relu")]
]


def _gelu_tanh_spelled(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "gelu_accurate": _gelu_tanh_spelled,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh_spelled,
    "gelu_python": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_python_tanh": _gelu_tanh_spelled,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}

# the activations that the Triton kernel has a branch for
FUSED = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}


def act_and_mul_reference(x: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """x `[..., 2 * size]` -> `[..., size]`."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[hidden_act](gate) * up


@triton.jit  # type: ignore[untyped-decorator]
def activate(g, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation numbered ACT in FUSED, of a float32 block."""
    if ACT == 0:
        act = g / (1.0 + tl.exp(-g))
    elif ACT == 1:
        act = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == 2:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        act = g / (1.0 + tl.exp(-2.0 * inner))
    else:
        act = tl.maximum(g, 0.0)
    return act


@triton.jit  # type: ignore[untyped-decorator]
def _act_and_mul_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, stride_x, size, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    # masked lanes hold 0 and are not stored
    gate = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * stride_x + size + columns, mask=inside, other=0.0)
    act = activate(gate.to(tl.float32), ACT)
    tl.store(out_ptr + row * size + columns, act.to(up.dtype) * up, mask=inside)


def _launch(x: torch.Tensor, hidden_act: str) -> torch.Tensor:
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape[0], size, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        grid = (rows.shape[0], triton.cdiv(size, 1024))
        _act_and_mul_kernel[grid](rows, out, rows.stride(0), size, ACT=FUSED[hidden_act], BLOCK=1024)
    return out.view(*x.shape[:-1], size)


def _on_cpu(function: CpuFunction, x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype)
    function(rows.data_ptr(), rows.stride(0), out.data_ptr(), rows.shape[0], size)
    return out


def act_and_mul(x: torch.Tensor, hidden_act: str) -> torch.Tensor:
    """x `[..., 2 * size]` -> act(x[..., :size]) * x[..., size:]."""
    if hidden_act in FUSED and use_triton(x):
        return _launch(x, hidden_act)
    if hidden_act in ("silu", "swish") and x.is_cpu:
        function = cpu_function("silu_and_mul", x.dtype, "pipii")
        if function is not None:
            return _on_cpu(function, x)
    return act_and_mul_reference(x, hidden_act)
