"""Module by module, in execution order: how far the port is from the original, and where that begins."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from porter.runtime.loader import WeightRules
from porter.runtime.resolution import arrangement
from porter.verify.names import NameMap, map_names
from porter.verify.trace import Call, Inputs, Trace

Originals = dict[str, list[Call]]  # module name -> its calls
Key = tuple[str, int]  # a module's name, and which of its calls

_SUSPICIOUS = 0.1  # of the limit, for a module that is run alone
_LEAST = 1e-30  # the norm of an output that is zero: half precision may round a small one to it
_TINY = 0.1  # a token whose output is smaller than this share of the usual is measured against that share


@dataclass(frozen=True)
class ModuleError:
    """One call of one module: relative errors `[num_tokens]` against the original's output, and the one that counts.

    That is the largest over tokens in float32. Against a rounded original it is the usual error of tokens divided by
    `rounding`, what rounding alone costs; `rounded` is that as a relative error. `place` is the token and feature that
    is furthest off, `output` which of several outputs;
    `other_widths`: further outputs differ in width, which is no error yet but names the module once something is wrong;
    `other_choices`: so do whole numbers for some token (which experts), in any order.
    """

    module: str
    kind: str
    index: int
    token_errors: torch.Tensor
    error: float
    place: tuple[int, int]
    output: int = 0
    other_widths: bool = False
    other_choices: bool = False
    rounding: float | None = None
    rounded: float | None = None

    def to_json(self) -> dict[str, object]:
        """The figures of a row of the report."""
        median, high = (float(self.token_errors.nan_to_num(float("inf")).quantile(share)) for share in (0.5, 0.95))
        figures = {"error": self.error, "p50": median, "p95": high, "place": list(self.place), "rounded": self.rounded}
        return {"module": self.module, "kind": self.kind, "call": self.index, **figures}


@dataclass(frozen=True)
class Comparison:
    """Errors in the order in which the port's modules returned, and the modules that had nothing to compare with.

    `expected` and `inputs` are what the original returned and was given, by (module, index of the call), `ours` what
    the port returned; `names` are the original's modules by the port's.
    """

    errors: tuple[ModuleError, ...]
    not_compared: tuple[str, ...]
    expected: Mapping[Key, torch.Tensor]
    inputs: Mapping[Key, Inputs]
    ours: Mapping[Key, torch.Tensor]
    names: Mapping[str, tuple[str, ...]]


def compare(model: nn.Module, port: Trace, original: Originals, rounded: Originals | None = None) -> Comparison:
    """Compare each module of the port with the module or packed modules that it stands for.

    `rounded` is the original in the working dtype, when that is a half precision.
    """
    names = map_names(_widths(port.by_module()), _widths(original), rules_of(model))
    errors, expected, inputs, ours = [], {}, {}, {}
    for key, call in port.keyed():
        target = expected_output(model, call, key[1], names, original)
        if target is not None:
            half = None if rounded is None else expected_output(model, call, key[1], names, rounded)
            theirs = original[names.pairs[call.module][0]][key[1]]
            found = [_module_error(model, call, key[1], 0, target, half)]
            halves = None if rounded is None else rounded[names.pairs[call.module][0]][key[1]]
            found += _further_errors(model, call, key[1], theirs, halves)
            worst = max(found, key=lambda error: error.error)
            choices = other_choices(call.outputs, theirs.outputs) > 0
            errors.append(replace(worst, other_widths=_other_widths(call, theirs), other_choices=choices))
            expected[key] = theirs.outputs[errors[-1].output] if errors[-1].output else target
            ours[key] = call.outputs[errors[-1].output]
            inputs[key] = theirs.inputs
    left = [name for name in port.by_module() if name and (name, 0) not in expected]
    return Comparison(tuple(errors), tuple(left), expected, inputs, ours, names.pairs)


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
    """|ours - theirs| / |theirs| of each row; `[num_tokens]`, float64.

    What is usual is the median: a row that happens to end near zero must not make rounding look like a mistake (a gate
    of one feature does), and a row of huge values must not hide the others.
    """
    size = theirs.double().square().sum(1).sqrt()
    distance = (ours.double() - theirs.double()).square().sum(1).sqrt()
    smallest = _TINY if theirs.shape[1] > 1 else 1.0  # one number may cross zero
    return distance / size.clamp_min(float(size.median()) * smallest + 1e-30)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """|ours - theirs| / |theirs| over all elements; infinite if anything is not a number."""
    return finite(distance(ours, theirs) / max(float(theirs.double().norm()), _LEAST))


def first_divergence(errors: Iterable[ModuleError], limit: float) -> ModuleError | None:
    """The first module, in execution order, that is further than `limit` from the original."""
    return next((error for error in errors if not error.error <= limit), None)


def wrong_by_itself(
    errors: Iterable[ModuleError], limit: float, rerun: Callable[[ModuleError], float | None]
) -> ModuleError | None:
    """The first module that is wrong when given the original's input.

    Once something diverges, a tenth of the limit counts as wrong: a small mistake grows in the modules that follow. If
    all that could be re-run were right, it is the first divergent one that could not: what it calls is right, and it is
    not.
    """

    def threshold(error: ModuleError) -> float:
        return limit * _SUSPICIOUS if error.rounding is None else limit

    unknown = None
    for error in errors:
        if error.other_widths:
            return error
        if error.other_choices or not error.error <= threshold(error):
            local = rerun(error)
            if local is not None and not local <= threshold(error):
                return error
            unknown = unknown or (error if local is None and not error.error <= limit else None)
    return unknown


def _further_errors(
    model: nn.Module, call: Call, index: int, theirs: Call, halves: Call | None
) -> Iterator[ModuleError]:
    """Of the outputs after the first, where both modules return alike: a router's weights, say."""
    for place, (ours, expected) in enumerate(zip(call.outputs, theirs.outputs, strict=False)):
        alike = len(call.outputs) == len(theirs.outputs) and ours.shape == expected.shape
        if place and alike and ours.is_floating_point():
            yield _module_error(model, call, index, place, expected, None if halves is None else halves.outputs[place])


def _other_widths(call: Call, theirs: Call) -> bool:
    """Whether both return as many tensors and one after the first has another width: other choices are made."""
    pairs = list(zip(call.outputs, theirs.outputs, strict=False))[1:]
    return len(call.outputs) == len(theirs.outputs) and any(a.shape != b.shape for a, b in pairs)


def other_choices(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The share of tokens for which whole numbers among a module's outputs are others, whatever their order."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a.shape == b.shape and not b.is_floating_point()]
    shares = [(a.sort(1).values != b.sort(1).values).any(1).double().mean() for a, b in pairs]
    return max(map(float, shares), default=0.0)


def _module_error(
    model: nn.Module, call: Call, index: int, output: int, expected: torch.Tensor, rounded: torch.Tensor | None
) -> ModuleError:
    ours = call.outputs[output]
    errors = token_errors(ours, expected)
    kind = type(model.get_submodule(call.module)).__name__
    worst = int((ours.double() - expected.double()).abs().nan_to_num(float("inf")).argmax())
    place = (worst // ours.shape[1], worst % ours.shape[1])
    if rounded is None:
        return ModuleError(call.module, kind, index, errors, finite(float(errors.max())), place, output)
    rounding = usual_distance(rounded, expected) + 1e-12
    error = finite(usual_distance(ours, expected) / rounding)
    share = rounding / float(expected.double().norm().clamp_min(_LEAST))
    return ModuleError(call.module, kind, index, errors, error, place, output, rounding=rounding, rounded=share)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left - right| over all elements."""
    return float((left.double() - right.double()).norm())


def usual_distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left - right| over the tokens that are closest, a tenth left out.

    In half precision a router near a tie sends a few tokens to other experts, in the original as in the port, and those
    would drown all others.
    """
    rows = (left.double() - right.double()).square().sum(1)
    kept = rows.sort().values[: max(len(rows) - len(rows) // 10, 1)]
    return float(kept.sum().sqrt())


def logits_error(ours: torch.Tensor, theirs: torch.Tensor, half: bool) -> float:
    """Relative error of logits that differ by rounding at most: of the worst token, in half precision the usual."""
    if half:
        return finite(usual_distance(ours, theirs) / max(float(theirs.double().norm()), _LEAST))
    return finite(float(token_errors(ours, theirs).max()))


def finite(error: float) -> float:
    """`error`, infinite if it is not a number."""
    return error if error == error else float("inf")


def _widths(calls: Originals) -> dict[str, int]:
    return {name: made[0].outputs[0].shape[1] for name, made in calls.items() if made[0].outputs}


def _arranged(module: Any, fused: str | None, output: torch.Tensor) -> torch.Tensor:
    """A fused q/k/v output that the original keeps by groups of heads, as [all q | all k | all v]."""
    if fused is None:
        return output
    groups, order = arrangement(fused, module.num_kv_heads)
    heads = {"q": module.num_heads, "k": module.num_kv_heads, "v": module.num_kv_heads}
    sizes = [heads[shard] // groups * module.head_dim for shard in order]
    parts = dict(zip(order, output.view(len(output), groups, -1).split_with_sizes(sizes, dim=2), strict=True))
    return torch.cat([parts[shard].flatten(1) for shard in "qkv"], dim=1)


@contextmanager
def turned_layout(layer: Any, layout: str) -> Iterator[None]:
    """Let a fused q/k/v layer return what it would if its weight, in `layout`, had been contiguous, else grouped."""
    rows = torch.arange((layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim)[None]
    plain = layout == "contiguous"
    order = _arranged(layer, "grouped" if plain else layout, rows)[0]  # where each feature of [q | k | v] lies
    index = order if plain else order.argsort()

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output[..., index]

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fused_layout(rules: WeightRules, *names: str) -> str | None:
    return next((rules.fused[last] for name in names if (last := name.rpartition(".")[2]) in rules.fused), None)
