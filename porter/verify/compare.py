"""Module by module, in execution order: how far the port is from the original, and where that begins."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from porter.runtime.loader import WeightRules
from porter.verify.names import NameMap, map_names
from porter.verify.trace import Call, Inputs, Trace

Originals = dict[str, list[Call]]  # module name -> its calls

_TINY = 1e-3  # a token whose output is smaller than this share of the usual is measured against the usual


@dataclass(frozen=True)
class ModuleError:
    """One call of one module: relative errors `[num_tokens]` against the original's output, and the one that counts.

    That is the largest over tokens in float32. Against a rounded original it is the error over all tokens divided by
    what rounding alone costs.
    """

    module: str
    kind: str
    index: int
    token_errors: torch.Tensor
    error: float


@dataclass(frozen=True)
class Comparison:
    """Errors in the order in which the port's modules returned, and the modules that had nothing to compare with.

    `expected` and `inputs` are what the original returned and was given, by (module, index of the call).
    """

    errors: tuple[ModuleError, ...]
    not_compared: tuple[str, ...]
    expected: Mapping[tuple[str, int], torch.Tensor]
    inputs: Mapping[tuple[str, int], Inputs]


def compare(model: nn.Module, port: Trace, original: Originals, rounded: Originals | None = None) -> Comparison:
    """Compare each module of the port with the module or packed modules that it stands for.

    `rounded` is the original in the working dtype, when that is a half precision.
    """
    names = map_names(_widths(port.by_module()), _widths(original), rules_of(model))
    errors, expected, inputs = [], {}, {}
    for key, call in port.keyed():
        target = expected_output(model, call, key[1], names, original)
        if target is not None:
            found = None if rounded is None else expected_output(model, call, key[1], names, rounded)
            errors.append(_module_error(model, call, key[1], target, found))
            expected[key] = target
            inputs[key] = original[names.pairs[call.module][0]][key[1]].inputs
    left = [name for name in port.by_module() if name and (name, 0) not in expected]
    return Comparison(tuple(errors), tuple(left), expected, inputs)


def originals(trace: Trace, model: nn.Module) -> Originals:
    """The calls of the original's modules that hold parameters; others may mean something else under the same name."""
    with_weights = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    return {name: calls for name, calls in trace.by_module().items() if name in with_weights}


def expected_output(model: nn.Module, call: Call, index: int, names: NameMap, theirs: Originals) -> torch.Tensor | None:
    """What the original says `call` should return, in the port's arrangement; None if nothing fits."""
    sources = names.pairs.get(call.module, ()) if call.module else ()
    if not call.outputs or not sources or any(index >= len(theirs.get(name, ())) for name in sources):
        return None
    width = call.outputs[0].shape[1]
    if len(sources) > 1:
        parts = [theirs[name][index].outputs[0] for name in sources]
        joined: torch.Tensor = torch.cat(parts, dim=1)
        return joined if joined.shape[1] == width else None
    layout = _fused_layout(rules_of(model), call.module, sources[0])
    module = model.get_submodule(call.module)
    fitting = [output for output in theirs[sources[0]][index].outputs if output.shape[1] == width]
    arranged = [_arranged(module, layout, output) for output in fitting]
    return min(arranged, key=lambda output: relative_error(call.outputs[0], output), default=None)


def rules_of(model: nn.Module) -> WeightRules:
    """The port's weight rules."""
    rules: WeightRules = type(model).weight_rules  # type: ignore[attr-defined]
    return rules


def token_errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """|ours - theirs| / |theirs| of each row; `[num_tokens]`, float64."""
    size = theirs.double().square().sum(1).sqrt()
    distance = (ours.double() - theirs.double()).square().sum(1).sqrt()
    smallest = _TINY if theirs.shape[1] > 1 else 1.0  # one number may cross zero: a gate's, say
    return distance / size.clamp_min(float(size.mean()) * smallest + 1e-30)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| over all elements; infinite if anything is not a number."""
    return _finite(_distance(ours, theirs) / float(theirs.double().norm()))


def first_divergence(errors: Iterable[ModuleError], limit: float) -> ModuleError | None:
    """The first module, in execution order, that is further than `limit` from the original."""
    return next((error for error in errors if not error.error <= limit), None)


def wrong_by_itself(
    errors: Iterable[ModuleError], limit: float, rerun: Callable[[ModuleError], float | None]
) -> ModuleError | None:
    """The first divergent module that is still wrong when given the original's input.

    If all that could be re-run were right, it is the first that could not: what it calls is right, and it is not.
    """
    unknown = None
    for error in errors:
        if not error.error <= limit:
            local = rerun(error)
            if local is not None and not local <= limit:
                return error
            unknown = unknown or (error if local is None else None)
    return unknown


def _module_error(
    model: nn.Module, call: Call, index: int, expected: torch.Tensor, rounded: torch.Tensor | None
) -> ModuleError:
    errors = token_errors(call.outputs[0], expected)
    error = float(errors.max())
    if rounded is not None:
        error = _distance(call.outputs[0], expected) / (_distance(rounded, expected) + 1e-12)
    kind = type(model.get_submodule(call.module)).__name__
    return ModuleError(call.module, kind, index, errors, _finite(error))


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm())


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _widths(calls: Originals) -> dict[str, int]:
    return {name: made[0].outputs[0].shape[1] for name, made in calls.items() if made[0].outputs}


def _arranged(module: Any, fused: str | None, output: torch.Tensor) -> torch.Tensor:
    """A fused q/k/v output that the original keeps by groups of heads, as [all q | all k | all v]."""
    if fused != "grouped":
        return output
    per_group = module.num_heads // module.num_kv_heads
    groups = output.view(len(output), module.num_kv_heads, per_group + 2, module.head_dim)
    parts = torch.split(groups, [per_group, 1, 1], dim=2)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _fused_layout(rules: WeightRules, *names: str) -> str | None:
    return next((rules.fused[last] for name in names if (last := name.rpartition(".")[2]) in rules.fused), None)
