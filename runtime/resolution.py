"""Where a checkpoint tensor goes in a port, decided from its name and shape alone: no tensor is read.

The loader and the header-only ledger both ask `resolve`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from porter.runtime.errors import WeightError
from porter.runtime.layers.sharding import Part, Parts, ShardId, get_parts

if TYPE_CHECKING:  # see sharding
    import torch
    from torch import nn

Shape = tuple[int, ...]

# what old checkpoints carry and no port needs, unless a port has a parameter of that name
ALWAYS_SKIPPED = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias")

_EXPERT_LEAVES: dict[str, tuple[str, int | None]] = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}


@dataclass(frozen=True)
class WeightRules:
    """How a model family's checkpoint names map to its port's. Names are matched by whole dotted segments."""

    packed: Mapping[str, Mapping[str, str | int]] = field(default_factory=dict)  # packed module: {module: shard id}
    tied: Mapping[str, str] = field(default_factory=dict)  # parameter: the one it shares when the config ties them
    skip: Sequence[str] = ()  # checkpoint tensors that carry nothing
    renames: Mapping[str, str] = field(default_factory=dict)  # checkpoint path piece: port path piece, in order
    transposed: Sequence[str] = ()  # modules whose checkpoint weight is [in, out]
    fused: Mapping[str, str] = field(default_factory=dict)  # module: layout of its one q/k/v tensor, see arrangement
    base_prefix: str = ""  # accepted when a checkpoint lacks it


@dataclass(frozen=True)
class ParameterInfo:
    """A port parameter or persistent buffer, as checkpoints see it."""

    shape: Shape  # on this rank
    parts: Parts
    num_kv_heads: int | None = None  # of all ranks, for fused q/k/v

    def expected_shape(self, shard_id: ShardId) -> Shape:
        """The checkpoint shape of one shard, or of all shards in one tensor (None)."""
        if shard_id in self.parts:
            return self.parts[shard_id].shape
        shapes = [part.shape for part in self.parts.values()]
        experts = {part.index for part in self.parts.values()} - {None}
        if not experts:
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (len(experts), shapes[0][0] * len(shapes) // len(experts), *shapes[0][1:])


@dataclass(frozen=True)
class ParameterIndex:
    """The names a checkpoint tensor can resolve to."""

    parameters: Mapping[str, ParameterInfo]
    modules: frozenset[str]

    @classmethod
    def from_model(cls, model: "nn.Module") -> "ParameterIndex":
        """Parameters and persistent buffers of a port, which may live on the meta device."""
        parameters = {name: _describe(tensor) for name, tensor in named_tensors(model)}
        return cls(parameters, frozenset(name for name, _ in model.named_modules()))


def named_tensors(model: "nn.Module") -> "Iterator[tuple[str, torch.Tensor]]":
    """Every parameter and persistent buffer that a checkpoint fills, shared ones under each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        buffers = {name: buffer for name, buffer in module._buffers.items() if name not in transient}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None and not getattr(tensor, "derived", False):
                yield f"{prefix}.{name}" if prefix else name, tensor


def _describe(tensor: "torch.Tensor") -> ParameterInfo:
    return ParameterInfo(tuple(tensor.shape), get_parts(tensor), getattr(tensor, "num_kv_heads", None))


@dataclass(frozen=True)
class Target:
    """The tensor fills `shard_id` (None: all) of `parameter`, after a transposition and a split where they apply."""

    parameter: str
    shard_id: ShardId = None
    transposed: bool = False
    layout: str | None = None  # "stacked", or see arrangement: how one tensor holds all shards
    renamed: bool = False  # by a rule; it gives way to the tensor whose own name this is


@dataclass(frozen=True)
class Skip:
    """The tensor carries nothing that inference needs."""

    rule: str


@dataclass(frozen=True)
class Misshaped:
    """The tensor's name fits `parameter` but its shape does not."""

    parameter: str
    expected: Shape
    found: Shape


@dataclass(frozen=True)
class Unknown:
    """No rule and no parameter of the port claims the tensor."""


Outcome = Target | Skip | Misshaped | Unknown


class Filled:
    """Which shards of which parameters have a tensor, and whose."""

    def __init__(self, index: ParameterIndex) -> None:
        self._index = index
        self._sources: dict[tuple[str, ShardId], tuple[str, Target]] = {}
        self.gave_way: dict[str, str] = {}  # a tensor under a second name: the one that has the name itself

    def add(self, name: str, target: Target) -> bool:
        """Count checkpoint tensor `name` in: whether it is to be loaded.

        Of two for one place, the one that was renamed gives way. Raises WeightError if neither or both were.
        """
        parts = self._index.parameters[target.parameter].parts
        for shard_id in [target.shard_id] if target.shard_id in parts else list(parts):
            previous, other = self._sources.setdefault((target.parameter, shard_id), (name, target))
            if previous == name:
                continue
            if other.renamed is target.renamed:
                raise WeightError(
                    f"checkpoint tensors {previous!r} and {name!r} both fill {target.parameter!r}",
                    "remove one from the checkpoint",
                )
            self.gave_way.update({name: previous} if target.renamed else {previous: name})
            if not target.renamed:
                self._sources[target.parameter, shard_id] = (name, target)
        return name not in self.gave_way

    def missing(self) -> list[str]:
        """Parameters without a tensor, with the shards they lack where they have others."""
        missing = []
        for name, info in self._index.parameters.items():
            lacking = [shard_id for shard_id in info.parts if (name, shard_id) not in self._sources]
            if len(lacking) == len(info.parts):
                missing.append(name)
            elif lacking:
                missing.append(f"{name}[{', '.join(map(str, lacking))}]")
        return missing


def resolve(name: str, shape: Sequence[int], rules: WeightRules, index: ParameterIndex) -> Outcome:
    """Where checkpoint tensor `name` of `shape` goes."""
    segments = name.split(".")
    skipped = _matching(segments, rules.skip)
    if skipped is not None:
        return Skip(skipped)
    for candidate in _candidates(segments, rules):
        found = _locate(candidate, rules, index)
        if found is not None:
            target = _target(segments, candidate, *found, tuple(shape), rules, index)
            own = _without(rules.base_prefix, candidate) == _without(rules.base_prefix, segments)
            return target if own or isinstance(target, Misshaped) else replace(target, renamed=True)
    skipped = _matching(segments, ALWAYS_SKIPPED)
    return Unknown() if skipped is None else Skip(skipped)


def _find(segments: Sequence[str], piece: Sequence[str]) -> int:
    """Where `piece` lies in `segments` as a run of whole segments; -1 if nowhere."""
    for start in range(len(segments) - len(piece) + 1):
        if list(segments[start : start + len(piece)]) == list(piece):
            return start
    return -1


def _matching(segments: Sequence[str], patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if _find(segments, pattern.split(".")) >= 0), None)


def _rename(segments: list[str], renames: Mapping[str, str]) -> list[str]:
    for old, new in renames.items():
        piece = old.split(".")
        start = _find(segments, piece)
        if start >= 0:
            middle = new.split(".") if new else []
            segments = [*segments[:start], *middle, *segments[start + len(piece) :]]
    return segments


def _candidates(segments: list[str], rules: WeightRules) -> Iterator[list[str]]:
    """Port paths to try: renamed first, then as it stands; each also with and without the base prefix."""
    renamed = _rename(segments, rules.renames)
    prefix = rules.base_prefix.split(".") if rules.base_prefix else []
    for base in [renamed] if renamed == segments else [renamed, segments]:
        yield base
        if prefix and base[: len(prefix)] != prefix:
            yield prefix + base
        elif prefix:
            yield base[len(prefix) :]


def _without(prefix: str, segments: list[str]) -> str:
    return ".".join(segments).removeprefix(f"{prefix}.")


def _locate(segments: list[str], rules: WeightRules, index: ParameterIndex) -> tuple[str, ShardId] | None:
    name = ".".join(segments)
    if name in index.parameters:
        return name, None
    return _locate_packed(segments, rules, index) or _locate_expert(segments, index)


def _locate_packed(segments: list[str], rules: WeightRules, index: ParameterIndex) -> tuple[str, ShardId] | None:
    for packed, shards in rules.packed.items():
        for module, shard_id in shards.items():
            piece = module.split(".")
            start = _find(segments[:-1], piece)
            if start < 0 or ".".join(segments[: start + len(piece)]) in index.modules:
                continue
            name = ".".join([*segments[:start], packed, *segments[start + len(piece) :]])
            if name in index.parameters:
                return name, shard_id
    return None


def _locate_expert(segments: list[str], index: ParameterIndex) -> tuple[str, ShardId] | None:
    """`<experts>.<e>.<leaf>.weight` -> that expert's part of the stack."""
    if len(segments) < 4 or not segments[-3].isdigit() or segments[-2] not in _EXPERT_LEAVES:
        return None
    stack, half = _EXPERT_LEAVES[segments[-2]]
    name = ".".join([*segments[:-3], stack])
    shard_id = (int(segments[-3]), half)
    info = index.parameters.get(name)
    return (name, shard_id) if info is not None and shard_id in info.parts else None


def _target(
    segments: list[str],
    candidate: list[str],
    parameter: str,
    shard_id: ShardId,
    shape: Shape,
    rules: WeightRules,
    index: ParameterIndex,
) -> Target | Misshaped:
    info = index.parameters[parameter]
    if shard_id is not None and shard_id not in info.parts:
        return Misshaped(parameter, info.expected_shape(None), shape)
    names = {module for path in (segments, candidate, parameter.split(".")) for module in path[-2:-1]}
    transposed = segments[-1] == "weight" and bool(names & set(rules.transposed))
    expected = info.expected_shape(shard_id)
    expected = expected[::-1] if transposed else expected
    if shape != expected:
        return Misshaped(parameter, expected, shape)
    return Target(parameter, shard_id, transposed, _layout(info, shard_id, names, rules))


def _layout(info: ParameterInfo, shard_id: ShardId, names: set[str], rules: WeightRules) -> str | None:
    if shard_id in info.parts:
        return None
    if any(part.index is not None for part in info.parts.values()):
        return "stacked"
    return next((layout for module, layout in rules.fused.items() if module in names), "contiguous")


def split(tensor: "torch.Tensor", target: Target, info: ParameterInfo) -> "Iterator[tuple[Part, torch.Tensor]]":
    """The parts that a whole checkpoint tensor fills, each with its whole (unsharded) tensor."""
    if target.transposed:
        tensor = tensor.t()
    if target.layout is None:
        yield info.parts[target.shard_id], tensor
    elif target.layout == "stacked":
        yield from _split_stack(tensor, info)
    elif target.layout == "contiguous":
        rows = [part.shape[0] for part in info.parts.values()]
        yield from zip(info.parts.values(), tensor.split_with_sizes(rows), strict=True)
    else:
        yield from _split_groups(tensor, info, target.layout)


def arrangement(layout: str, num_kv_heads: int) -> tuple[int, str]:
    """How many groups of heads one q/k/v tensor has, and the order of the shards in each group.

    "contiguous" is all q, all k, all v; "grouped" is, for each KV head, its query heads, its key and its value; any
    other layout says both: "4 qvk" is four groups of query heads, values and keys, and "kv kqv" one for each KV head.
    """
    groups, order = {"contiguous": "1 qkv", "grouped": "kv qkv"}.get(layout, layout).split()
    return num_kv_heads if groups == "kv" else int(groups), order


def _split_groups(tensor: "torch.Tensor", info: ParameterInfo, layout: str) -> "Iterator[tuple[Part, torch.Tensor]]":
    assert info.num_kv_heads is not None
    groups, order = arrangement(layout, info.num_kv_heads)
    rows = [info.parts[shard].shape[0] // groups for shard in order]
    pieces = tensor.reshape(groups, sum(rows), *tensor.shape[1:]).split_with_sizes(rows, dim=1)
    for shard, piece in zip(order, pieces, strict=True):
        yield info.parts[shard], piece.flatten(0, 1)


def _split_stack(tensor: "torch.Tensor", info: ParameterInfo) -> "Iterator[tuple[Part, torch.Tensor]]":
    seen: dict[int, int] = {}
    for part in info.parts.values():
        assert part.index is not None
        first = seen.get(part.index, 0)
        seen[part.index] = first + part.shape[0]
        yield part, tensor[part.index, first : first + part.shape[0]]
