"""Which modules of the original a module of the port stands for."""

from collections.abc import Mapping
from dataclasses import dataclass

from porter.runtime.loader import WeightRules

Widths = Mapping[str, int]  # module name -> features of its first output


@dataclass(frozen=True)
class NameMap:
    """port module -> the original's modules, more than one for a packed module; `unmatched` have none."""

    pairs: dict[str, tuple[str, ...]]
    unmatched: tuple[str, ...]


def map_names(port: Widths, original: Widths, rules: WeightRules) -> NameMap:
    """Match from the root down: by name, by the rules' renames and packing, or as the only one left that fits."""
    pairs: dict[str, tuple[str, ...]] = {"": ("",)}
    for parent in sorted({_parent(name) for name in port}, key=lambda name: name.count(".")):
        children = [name for name in port if name and _parent(name) == parent]
        above = _original_prefix(parent, pairs)
        found = {child: _by_name(child, above, original, rules) for child in children}
        pairs.update({child: names for child, names in found.items() if names})
        pairs.update(_leftover([c for c in children if not found[c]], above, port, original, pairs))
    return NameMap(pairs, tuple(name for name in port if name and name not in pairs))


def _by_name(child: str, above: str, original: Widths, rules: WeightRules) -> tuple[str, ...]:
    last = child.rpartition(".")[2]
    old_names = [old for old, new in rules.renames.items() if new == last]
    for name in (last, *old_names):
        if _join(above, name) in original:
            return (_join(above, name),)
    parts = tuple(_join(above, name) for name in rules.packed.get(last, {}))
    return parts if parts and all(part in original for part in parts) else ()


def _leftover(
    children: list[str], above: str, port: Widths, original: Widths, pairs: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    taken = {name for names in pairs.values() for name in names}
    free = [name for name in original if name and _parent(name) == above and name not in taken]
    fits = [(child, name) for child in children for name in free if port[child] == original[name]]
    return {child: (name,) for child, name in fits if _alone(child, name, fits)}


def _alone(child: str, name: str, fits: list[tuple[str, str]]) -> bool:
    return sum(child == other or name == taken for other, taken in fits) == 1


def _original_prefix(parent: str, pairs: Mapping[str, tuple[str, ...]]) -> str:
    """The original's name for `parent`, a container such as `layers` included."""
    if parent in pairs:
        return pairs[parent][0]
    above, _, last = parent.rpartition(".")
    return _join(_original_prefix(above, pairs), last)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
