"""Python's builtin functions on symbolic values."""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.analyze import ops, scalars
from porter.analyze.poly import Poly
from porter.analyze.run import Infeasible, Run
from porter.analyze.serving import SERVING
from porter.analyze.values import (
    ClassRef,
    Config,
    External,
    Instance,
    Layer,
    Mapping,
    Mask,
    Repeated,
    Scalar,
    Sequence,
    Super,
    Tensor,
    Value,
    const,
    symbol,
)


def builtin(run: Run, name: str, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    handler = _BUILTINS.get(name)
    if handler is not None:
        found: Value = handler(run, args, kwargs, node)
        return found
    if name in ("min", "max") and not any(isinstance(a, Tensor) for a in args):
        return scalars.extreme(name, args)
    if name in scalars.BUILTIN:
        if args and isinstance(args[0], Tensor):
            return ops.method(run, args[0], "item", [], {}, node)
        return scalars.call(name, scalars.BUILTIN[name], args)
    return const(None) if name == "print" else Value(op="unknown", args=tuple(args), attrs={"why": name})


def _isinstance(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value, kinds = args[0], args[1]
    names = [scalars.text(k).rsplit(".", 1)[-1] for k in (kinds.items if isinstance(kinds, Sequence) else [kinds])]
    if isinstance(kinds, ClassRef) and kinds.info is not None:
        names = [kinds.info.name]
    if isinstance(value, Scalar) and value.known:
        return const(type(value.const).__name__ in names)
    if isinstance(value, Scalar):
        return symbol(f"isinstance({value.text}, {scalars.text(kinds)})")
    if isinstance(value, Instance) and value.cls is not None:
        return const(any(c.name in names for c in run.program.mro(value.cls)))
    kind = {
        Tensor: "Tensor",
        Sequence: "list" if getattr(value, "mutable", False) else "tuple",
        Mapping: "dict",
        Mask: "Tensor",
    }.get(type(value), "")
    return const(kind in names or (kind == "Tensor" and any(n.endswith("Tensor") for n in names)))


def _getattr(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    base, name = args[0], args[1]
    if not isinstance(name, Scalar) or not name.known:
        return _open_attribute(run, base, name, node)
    if isinstance(base, Config) and name.const not in SERVING:
        if len(args) > 2 and name.const not in run.world.config_reads:  # a field read before is there
            run.world.config_reads.setdefault(f"{name.const}?", node or cst.Name("_"))
            source = f"getattr({base.path}, {name.const!r}, {scalars.text(args[2])})"
            return Scalar(op="getattr", args=(args[2],), text=source, size=Poly.symbol(source))
        return run.attribute(base, name.const, node)
    absent = isinstance(base, Instance) and name.const not in base.attrs and base.cls is not None
    if absent and len(args) > 2 and run.program.method(base.cls, name.const) is None:  # type: ignore[attr-defined]
        return args[2]
    return run.attribute(base, name.const, node)


def _open_attribute(run: Run, base: Value, name: Value, node: cst.CSTNode | None) -> Value:
    """An attribute under a name that the config decides, as setattr() left it."""
    if isinstance(base, Instance) and base.cls is not None:
        run.world.attribute_reads.add((base.cls.name, scalars.text(name)))
    if isinstance(base, Instance) and scalars.text(name) in base.attrs:
        found: Value = base.attrs[scalars.text(name)]
        return found
    if isinstance(base, Instance) and isinstance(name, Scalar) and name.op == "string":
        raise Infeasible(node)
    return Value(op="unknown", attrs={"why": "getattr with an open name"})


def _setattr(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    base, name, value = args
    if isinstance(base, Instance) and isinstance(name, Scalar):
        base.attrs[name.const if name.known else name.text] = value
    return const(None)


def _hasattr(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    base, name = args[0], args[1]
    if isinstance(base, Instance) and isinstance(name, Scalar) and base.cls is not None:
        known = name.const in base.attrs or run.program.method(base.cls, name.const) is not None
        return const(known)
    if isinstance(base, Sequence) and isinstance(name, Scalar):
        return const(name.const in base.names)
    return symbol(f"hasattr({scalars.text(base)}, {scalars.text(name)})")


def _len(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = args[0]
    if isinstance(value, Sequence | Mapping):
        return const(len(value.items))
    if isinstance(value, Tensor) and value.shape:
        return Scalar(op="len", args=(value,), text="len", size=value.shape[0])
    return symbol(f"len({scalars.text(value)})")


def _range(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    numbers = [scalars.number(a) for a in args]
    if all(n is not None for n in numbers):
        span = range(*[n for n in numbers if n is not None])
        if len(span) <= 8:
            return Sequence(op="tuple", items=tuple(const(i) for i in span))
    return Repeated(op="range", args=tuple(args), item=symbol("layer_idx", op="index"))


def _enumerate(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    return _zip(run, [Repeated(op="range", item=symbol("layer_idx", op="index")), *args[:1]], kwargs, node)


def _zip(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    fixed = [a for a in args if isinstance(a, Sequence)]
    if fixed and all(isinstance(a, Sequence) for a in args):
        return Sequence(
            op="tuple",
            items=tuple(
                Sequence(op="tuple", items=pair, args=pair) for pair in zip(*[a.items for a in fixed], strict=False)
            ),
        )
    if fixed and len(args) == 2 and isinstance(args[0], Repeated) and args[0].op == "range":
        return Sequence(
            op="tuple",
            items=tuple(Sequence(op="tuple", items=(const(i), v), args=(v,)) for i, v in enumerate(fixed[0].items)),
        )
    lists = [a.params["items"] if isinstance(a, Layer) and "items" in a.params else a for a in args]
    items = tuple(run.iterate(a, node or cst.Name("_"))[0][0] for a in lists)
    counts = [a.attrs["count"] for a in lists if a.attrs.get("count") is not None]
    pair = Sequence(op="tuple", items=items, args=items)
    return Repeated(op="zip", item=pair, attrs={"count": counts[0]} if counts else {})


def _super(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    receiver = run.self_stack[-1]
    owner = run.env["<owner>"].attrs["owner"] if "<owner>" in run.env else None
    return Super(op="super", instance=receiver if isinstance(receiver, Instance) else None, after=owner)


def _tuple(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = args[0] if args else Sequence(op="tuple")
    if isinstance(value, Sequence):
        return Sequence(op="tuple", args=value.args, items=value.items, prefix=value.prefix)
    return value


def _set(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    """The distinct values of a list of the config: what a loop does for each, it does for that of any one layer."""
    value = _tuple(run, args, kwargs, node)
    if isinstance(value, Scalar) and not value.known:
        return Scalar(op="distinct", args=(value,), text=value.text, size=value.size)
    return value


def _from_keys(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    """`dict.fromkeys(names)`: an ordered set."""
    if len(args) == 1:
        return _set(run, args, kwargs, node)
    return Value(op="unknown", attrs={"why": "dict.fromkeys with a value"})


def _list(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = _tuple(run, args, kwargs, node)
    if isinstance(value, Sequence):
        value.mutable = True
    return value


def _quantifier(every: bool) -> Any:
    def run_it(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
        if isinstance(args[0], Sequence):
            truths = [scalars.known_truth(v) for v in args[0].items]
            if None not in truths:
                return const(all(truths) if every else any(truths))
        return symbol(f"{'all' if every else 'any'}({scalars.text(args[0])})")

    return run_it


def _dict(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    return Mapping(op="dict", items=dict(kwargs))


def _slice(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    ends = ([const(None), *args] if len(args) == 1 else args) + [const(None)] * (3 - max(len(args), 2))
    return Sequence(op="slice", args=tuple(ends), items=tuple(ends))


def _type(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    value = args[0]
    if isinstance(value, Scalar) and value.known:
        return External(op="external", name=f"builtins.{type(value.const).__name__}")
    return symbol(f"type({scalars.text(value)})")


def _sum(run: Run, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
    if isinstance(args[0], Sequence) and args[0].items:
        total = args[0].items[0]
        for item in args[0].items[1:]:
            total = run.binary("Add", total, item, node or cst.Name("_"))
        return total
    return symbol(f"sum({scalars.text(args[0])})")


_BUILTINS: dict[str, Any] = {
    "isinstance": _isinstance,
    "getattr": _getattr,
    "setattr": _setattr,
    "hasattr": _hasattr,
    "len": _len,
    "range": _range,
    "enumerate": _enumerate,
    "zip": _zip,
    "super": _super,
    "tuple": _tuple,
    "list": _list,
    "set": _set,
    "fromkeys": _from_keys,
    "dict": _dict,
    "slice": _slice,
    "type": _type,
    "sum": _sum,
    "all": _quantifier(True),
    "any": _quantifier(False),
    "reversed": _tuple,
    "sorted": _tuple,
}
