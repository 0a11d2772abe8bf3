"""Dotted paths of modules, as in the state dict."""

from __future__ import annotations

from collections.abc import Iterator

from porter.analyze.values import Instance, Layer, Repeated, Sequence, Tensor, Value


def name_modules(root: Instance, path: str = "") -> None:
    """Give every module its dotted path, as in the state dict; `{i}` stands for a layer's number."""
    root.path = path
    for name, value in root.attrs.items():
        _name_module(value, f"{path}.{name}" if path else name)


def _name_module(value: Value, path: str) -> None:
    if isinstance(value, Instance):
        name_modules(value, path)
    elif isinstance(value, Layer):
        value.path = path
        if value.kind == "module_list":
            _name_items(value.params.get("items"), path)
        for name, inner in value.attrs.items():
            if isinstance(inner, Layer | Instance):
                _name_module(inner, f"{path}.{name}")
    elif isinstance(value, Tensor) and value.op == "parameter":
        value.attrs["path"] = path


def _name_items(items: Value | None, path: str) -> None:
    if isinstance(items, Repeated):
        _name_module(items.item, f"{path}.{{i}}")
    elif isinstance(items, Sequence):
        for i, item in enumerate(items.items):
            _name_module(item, f"{path}.{i}")


def paths_below(root: Instance | Layer, path: str = "") -> Iterator[str]:
    """The dotted path of every attribute of a module and of the modules in it; `{i}` stands for a layer's number."""
    held: dict[str, Value] = {k: v for k, v in root.attrs.items() if isinstance(v, Value)}
    if isinstance(root, Layer):
        held.update(_items(root))
    for name, value in held.items():
        if name == "<layer>" and isinstance(value, Layer):  # what a subclass of a library layer inherits
            yield from paths_below(value, path)
            continue
        below = f"{path}.{name}" if path else name
        yield below
        if isinstance(value, Instance | Layer):
            yield from paths_below(value, below)


def _items(layer: Layer) -> dict[str, Value]:
    """What a layer holds under names that it does not show as attributes."""
    items = layer.params.get("items")
    if isinstance(items, Repeated):
        return {"{i}": items.item}
    if isinstance(items, Sequence):
        return {str(i): item for i, item in enumerate(items.items)}
    names = ("gate_up_proj", "down_proj") if layer.kind == "fused_moe" else ("weight", "bias")
    return {name: Value() for name in names}
