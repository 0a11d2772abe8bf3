"""What the symbolic execution computes: every value knows the operation and the values it came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from porter.analyze.poly import BATCH, SEQ, Poly

if TYPE_CHECKING:
    import libcst as cst

    from porter.analyze.program import ClassInfo, FunctionInfo

Shape = tuple[Poly, ...]


class _Missing:
    def __repr__(self) -> str:
        return "<symbolic>"


SYMBOLIC: Any = _Missing()


@dataclass(eq=False)
class Value:
    """Base of all values; `op` and `args` are its provenance, `node` the expression that first made it."""

    op: str = "unknown"
    args: tuple[Value, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    node: cst.CSTNode | None = None

    def walk(self, until: frozenset[str] = frozenset()) -> Iterator[Value]:
        """This value and everything it came from, each once, nearest first; not beyond operations in `until`."""
        seen: set[int] = set()
        todo: deque[Value] = deque([self])
        while todo:
            value = todo.popleft()
            if id(value) not in seen:
                seen.add(id(value))
                yield value
                if value.op not in until:
                    todo.extend(value.args)


@dataclass(eq=False)
class Scalar(Value):
    """A Python scalar: `const` when known, else `text` (source over config fields) and `size` when it is a size."""

    const: Any = SYMBOLIC
    text: str = ""
    size: Poly | None = None

    @property
    def known(self) -> bool:
        return self.const is not SYMBOLIC


@dataclass(eq=False)
class Tensor(Value):
    """A tensor; `shape` None means that its layout could not be inferred (see `attrs["why"]`)."""

    shape: Shape | None = None

    @property
    def sizes_only(self) -> bool:
        """Computed from sizes and constants alone: masks, position ids, ALiBi, tables."""
        return bool(self.attrs.get("sizes_only"))


@dataclass(eq=False)
class Mask(Tensor):
    """An attention mask built by a library helper: `kind` causal | sliding | chunked | bidirectional | padding."""

    kind: str = "causal"
    window: Value | None = None


@dataclass(eq=False)
class Sequence(Value):
    """A tuple or list of known length; `names` for model outputs; `prefix` counts leading items that are a tensor's
    own leading sizes (`x.shape[:-1]`), which stay right whatever the rank."""

    items: tuple[Value, ...] = ()
    names: tuple[str, ...] = ()
    prefix: int = 0
    mutable: bool = False


@dataclass(eq=False)
class Repeated(Value):
    """A list of unknown length with alike elements, such as `nn.ModuleList` over the layers.

    `attrs["count"]` is its length as a size, where that is known.
    """

    item: Value = field(default_factory=Value)


@dataclass(eq=False)
class Mapping(Value):
    items: dict[Any, Value] = field(default_factory=dict)


@dataclass(eq=False)
class Config(Value):
    path: str = "config"


@dataclass(eq=False)
class Instance(Value):
    """An object of a class of the file; `attrs` are its attributes."""

    cls: ClassInfo | None = None
    path: str = ""


@dataclass(eq=False)
class Layer(Value):
    """An object of a known library class: `kind` is linear, conv1d, embedding, layer_norm, dropout, activation ..."""

    kind: str = ""
    params: dict[str, Value] = field(default_factory=dict)
    path: str = ""


@dataclass(eq=False)
class Function(Value):
    info: FunctionInfo | None = None
    bound: Value | None = None
    closure: dict[str, Value] | None = None


@dataclass(eq=False)
class ClassRef(Value):
    info: ClassInfo | None = None


@dataclass(eq=False)
class External(Value):
    """A name from another package, by qualified name."""

    name: str = ""


@dataclass(eq=False)
class Super(Value):
    instance: Instance | None = None
    after: ClassInfo | None = None


def const(value: Any, node: cst.CSTNode | None = None) -> Scalar:
    size = Poly.const(value) if isinstance(value, int) and not isinstance(value, bool) else None
    return Scalar(op="const", const=value, text=repr(value), size=size, node=node)


def symbol(text: str, op: str = "leaf", **attrs: Any) -> Scalar:
    return Scalar(op=op, text=text, size=Poly.symbol(text), attrs=attrs)


def is_none(value: Value) -> bool:
    return isinstance(value, Scalar) and value.known and value.const is None


B = Poly.symbol(BATCH)
S = Poly.symbol(SEQ)
ONE = Poly.const(1)
