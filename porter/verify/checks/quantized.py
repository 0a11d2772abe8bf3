"""Int8 weights through every layer's linear_method, against the same port holding the dequantised weights."""

from typing import Any

import torch
from torch import nn

from porter.runtime.quantization.registry import get_linear_method
from porter.verify.compare import logits_error
from porter.verify.port_run import load_port_weights
from porter.verify.result import Check
from porter.verify.subject import Subject

NAME = "int8"


def check(subject: Subject) -> Check:
    """PASS if each quantized layer computes what its own dequantised weights give; also says what int8 costs."""
    quantized = load_port_weights(subject.build(get_linear_method("int8")), subject.folder)
    twin = load_port_weights(subject.build(), subject.folder)
    layers = _copy_dequantized(quantized, twin)
    if not layers:
        return Check(NAME, "FAIL", "0 layers", "", "no layer takes linear_method")
    ours, expected = subject.logits(quantized), subject.logits(twin)
    error = logits_error(ours, expected, subject.half)
    limit = subject.tolerance.quantized
    cost = _divergence(ours, subject.port_run.logits)
    detail = f"{layers} layers; int8 itself costs KL {cost:.1e}"
    return Check(
        NAME, "PASS" if error <= limit else "FAIL", f"{error:.1e}", f"{limit:g}", detail, {"worst": error, "kl": cost}
    )


@torch.no_grad()
def _copy_dequantized(quantized: nn.Module, twin: nn.Module) -> int:
    """Give `twin` the weights that `quantized` stands for; returns how many there are."""
    scales = [name for name, _ in quantized.named_parameters() if name.endswith("_scale")]
    for scale in scales:
        path, _, name = scale.removesuffix("_scale").rpartition(".")
        layer: Any = quantized.get_submodule(path)
        twin.get_parameter(f"{path}.{name}").copy_(layer.linear_method.dequantize(layer, name))
    return len(scales)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
