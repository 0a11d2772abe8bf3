"""Where values of a flat program go: what feeds attention, which linears form an MLP, what may be sharded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from porter.analyze.facts import World
from porter.analyze.values import Layer, Repeated, Scalar, Sequence, Tensor, Value

ELEMENTWISE = frozenset(
    [
        "mul",
        "add",
        "sub",
        "div",
        "pow",
        "tanh",
        "sigmoid",
        "activation",
        "silu",
        "gelu",
        "relu",
        "neg",
        "clamp",
        "square",
        "erf",
        "exp",
        "softplus",
        "sqrt",
        "rsqrt",
        "abs",
        "to",
        "float",
        "type",
        "type_as",
        "clone",
        "contiguous",
        "act_and_mul",
        "maximum",
        "minimum",
    ]
)
RESHAPES = frozenset(["view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze", "shard", "piece", "getitem"])

_REDUCING = frozenset(["mean", "sum", "layer_norm", "rms_norm", "softmax", "norm", "var", "amax", "matmul"])


class Flows:
    """The uses of every tensor of one path."""

    def __init__(self, world: World) -> None:
        self.live = {id(v) for v in world.result.walk()} if world.result is not None else None
        self.uses: dict[int, list[Value]] = defaultdict(list)
        self.tensors: dict[int, Tensor] = {}
        for values in world.values.values():
            for value in values:
                self._add(value)

    def _add(self, value: Value) -> None:
        if isinstance(value, Sequence):
            for item in value.items:
                self._add(item)
        if not isinstance(value, Tensor) or id(value) in self.tensors:
            return
        self.tensors[id(value)] = value
        for arg in _flat_args(value):
            if self.live is None or id(value) in self.live:  # what leads nowhere uses nothing
                self.uses[id(arg)].append(value)
            if isinstance(arg, Tensor):
                self._add(arg)

    def linears(self) -> Iterator[Tensor]:
        return (v for v in self.tensors.values() if v.op == "linear")

    def of(self, op: str) -> Iterator[Tensor]:
        return (v for v in self.tensors.values() if v.op == op)


def _flat_args(value: Value) -> Iterator[Value]:
    for arg in value.args:
        if isinstance(arg, Sequence):
            yield from _flat_args(arg)
            yield from arg.items
        elif isinstance(arg, Repeated):
            yield arg.item
        else:
            yield arg


def layer_of(value: Value) -> Layer | None:
    layer = value.attrs.get("layer")
    return layer if isinstance(layer, Layer) else None


def behind(value: Value, through: frozenset[str]) -> list[Tensor]:
    """The tensors that `value` is made of by operations in `through` only: the frontier, parameters left out."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Value] = [value]
    while todo:
        current = todo.pop()
        if id(current) in seen or isinstance(current, Scalar | Layer):
            continue
        seen.add(id(current))
        if isinstance(current, Tensor) and current.op not in through:
            found.append(current)
        else:
            todo.extend(_flat_args(current))
    return found


def tensors_behind(value: Value, until: frozenset[str]) -> list[Tensor]:
    """The tensors whose contents `value` is computed from, not beyond operations in `until`; sizes lead nowhere."""
    found: dict[int, Tensor] = {}
    todo: list[Value] = [value]
    while todo:
        current = todo.pop()
        if isinstance(current, Sequence) and current.op not in ("shape", "part"):
            todo.extend(current.items)
        elif isinstance(current, Repeated):
            todo.append(current.item)
        elif isinstance(current, Tensor) and id(current) not in found:
            found[id(current)] = current
            todo.extend(current.args if current.op not in until else ())
    return list(found.values())


def mixes_features(value: Tensor, source: Tensor, width: object) -> bool:
    """Whether something between `source` and `value` looks at more than one head, as a norm over all does.

    Tokens are flat, so that a permutation is one of heads with their dims.
    """
    for inner in tensors_behind(value, frozenset({"linear"})):
        if inner is source:
            continue
        if inner.op == "permute" or (inner.op == "cat" and isinstance(inner.args[0], Repeated)):
            return True  # the latter: heads one by one, each with a layer of its own
        if inner.op in _REDUCING:
            seen = inner.args[0]
            if isinstance(seen, Tensor) and seen.shape and seen.shape[-1] != width:
                return True
        if inner.op == "parameter" and inner.shape and (len(inner.shape) > 1 or inner.shape[-1] != width):
            return True
    return False


def heads_meet(flows: Flows, value: Tensor, width: object) -> bool:
    """Whether a norm or a sum over more than one head comes before the linear that an attention's output goes into."""
    seen: set[int] = set()
    todo: list[Value] = [value]
    while todo:
        for use in flows.uses[id(todo.pop())]:
            if id(use) in seen or use.op == "linear" or not isinstance(use, Tensor):
                continue
            seen.add(id(use))
            over = use.args[0]
            if use.op in _REDUCING and isinstance(over, Tensor) and over.shape and over.shape[-1] != width:
                return True
            todo += [use] if use.op in ELEMENTWISE | RESHAPES else []
    return False


def all_uses_are(flows: Flows, value: Tensor, through: frozenset[str], ends: set[int]) -> bool:
    """Whether every path from `value` through elementwise operations ends in one of `ends`."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        for use in flows.uses[id(todo.pop())]:
            if id(use) in ends or id(use) in seen:
                continue
            seen.add(id(use))
            if use.op not in through or not isinstance(use, Tensor):
                return False
            todo.append(use)
    return True
