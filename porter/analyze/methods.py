"""Methods of mappings, lists, layers and objects whose class the file does not define."""

from __future__ import annotations

import libcst as cst

from porter.analyze import ops_layers
from porter.analyze.poly import Poly
from porter.analyze.run import Run
from porter.analyze.values import Config, Instance, Layer, Mapping, Repeated, Scalar, Sequence, Value, const, symbol


def call_method(
    run: Run, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
) -> Value:
    """A method of a mapping, a list, a layer, a library object, or one that the file does not define."""
    if isinstance(base, Mapping):
        return _mapping_method(base, name, args)
    if isinstance(base, Sequence | Repeated):
        return _list_method(base, name, args)
    plain = all(isinstance(a, Scalar) and a.known for a in args)
    if plain and isinstance(base, Scalar) and isinstance(base.const, str) and hasattr(base.const, name):
        return const(getattr(base.const, name)(*[a.const for a in args if isinstance(a, Scalar)]))
    if isinstance(base, Config):
        return Config(op="config", path=base.path) if name == "get_text_config" else symbol(f"{base.path}.{name}()")
    if isinstance(base, Layer):
        return ops_layers.layer_method(run, base, name, args, kwargs, node)
    if isinstance(base, Instance):
        if name in ("register_buffer", "register_parameter", "register_module", "add_module"):
            _register(base, [*args, *kwargs.values()])
            return const(None)
        if name == "get_head_mask":
            return Repeated(op="repeat", item=const(None))
    return const(None)


def _register(base: Instance, args: list[Value]) -> None:
    """`register_buffer(name, tensor)` and its like set an attribute."""
    if len(args) > 1 and isinstance(args[0], Scalar) and args[0].known:
        base.attrs[args[0].const] = args[1]


def _mapping_method(base: Mapping, name: str, args: list[Value]) -> Value:
    key = args[0].const if args and isinstance(args[0], Scalar) and args[0].known else None
    default = args[1] if len(args) > 1 else const(None)
    if name == "get":
        return base.items.get(key, default)
    if name == "pop":
        return base.items.pop(key, default)
    if name == "items":
        pairs = [Sequence(op="tuple", items=(const(k), v), args=(v,)) for k, v in base.items.items()]
        return Sequence(op="tuple", items=tuple(pairs))
    if name == "keys":
        return Sequence(op="tuple", items=tuple(const(k) for k in base.items))
    if name == "values":
        return Sequence(op="tuple", items=tuple(base.items.values()))
    if name == "update" and args and isinstance(args[0], Mapping):
        base.items.update(args[0].items)
    return const(None)


def _list_method(base: Sequence | Repeated, name: str, args: list[Value]) -> Value:
    if name == "append" and isinstance(base, Sequence):
        base.items = (*base.items, args[0])
    elif name == "numel" and isinstance(base, Sequence):
        return Scalar(op="numel", text="numel", size=Poly.const(1))
    return const(None)
