"""Int8 weights through every layer's linear_method, against the same port holding the dequantised weights."""

from contextlib import ExitStack
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
    """PASS if each quantized layer gives, on what it is given, what its dequantised weights give; says what int8 costs.

    Layers are compared one by one: over a whole port, rounding may tip a router and change all that follows.
    """
    quantized = load_port_weights(subject.build(get_linear_method("int8")), subject.folder)
    twin = load_port_weights(subject.build(), subject.folder)
    layers = _copy_dequantized(quantized, twin)
    if not layers:
        return Check(NAME, "FAIL", "0 layers", "", "no layer takes linear_method")
    ours, errors = _run_beside(quantized, twin, sorted({name.rpartition(".")[0] for name in layers}), subject)
    worst, error = max(errors.items(), key=lambda item: item[1], default=("", float("inf")))
    limit = subject.tolerance.quantized
    cost = _divergence(ours, subject.port_logits)
    detail = f"{len(layers)} layers; int8 itself costs KL {cost:.1e}"
    if error > limit:
        detail = f"look at {worst}; {detail}"
    return Check(
        NAME, "PASS" if error <= limit else "FAIL", f"{error:.1e}", f"{limit:g}", detail, {"worst": error, "kl": cost}
    )


@torch.no_grad()
def _copy_dequantized(quantized: nn.Module, twin: nn.Module) -> list[str]:
    """Give `twin` the weights that `quantized` stands for; returns the names of their scales."""
    scales = [name for name, _ in quantized.named_parameters() if name.endswith("_scale")]
    for scale in scales:
        path, _, name = scale.removesuffix("_scale").rpartition(".")
        layer: Any = quantized.get_submodule(path)
        twin.get_parameter(f"{path}.{name}").copy_(layer.linear_method.dequantize(layer, name))
    return scales


def _run_beside(
    quantized: nn.Module, twin: nn.Module, paths: list[str], subject: Subject
) -> tuple[torch.Tensor, dict[str, float]]:
    """The logits of `quantized`, and the error of each of its layers against the twin's on the same input."""
    errors: dict[str, float] = {}

    def compare(path: str, args: tuple[Any, ...], output: torch.Tensor) -> None:
        error = logits_error(output, twin.get_submodule(path)(*args), subject.half)
        errors[path] = max(error, errors.get(path, 0.0))

    with ExitStack() as hooks:
        for path in paths:
            layer = quantized.get_submodule(path)
            handle = layer.register_forward_hook(lambda module, args, output, path=path: compare(path, args, output))
            hooks.callback(handle.remove)
        return subject.logits(quantized), errors


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
