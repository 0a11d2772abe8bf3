"""Sizes and scalars of an attention as source."""

from __future__ import annotations

import libcst as cst

from porter.analyze import scalars
from porter.analyze.facts import Facts, line_of
from porter.analyze.poly import Poly
from porter.analyze.values import Scalar, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.attend_place import Found, Group


def _over_self(node: cst.BaseExpression, found: Found) -> bool:
    """Whether an expression reads only attributes that __init__ sets, and math."""
    names = edit.names_read(node)
    attributes = {
        n.attr.value for n in edit.walk(node) if isinstance(n, cst.Attribute) and edit.code(n.value) == "self"
    }
    return names <= {"self", "math"} and attributes <= set(found.owner.attrs) and isinstance(node, cst.BaseExpression)


class TraitSource:
    """Sizes and scalars of an attention as source, valid in its class's __init__."""

    init: cst.FunctionDef

    def __init__(self, facts: Facts, group: Group, imports: dict[str, set[str]]) -> None:
        self.facts, self.group, self.imports = facts, group, imports
        self.tree = facts.program.tree
        self.edits: dict[cst.CSTNode, edit.Edit] = {}

    @property
    def first(self) -> Found:
        """The one to go by: if the file itself takes q, k and v apart on some path, its names hold on all."""
        return min(self.group.found, key=lambda found: bool(found.core.fused))

    def _vary(self, found: list[Found], text: object) -> str:
        assert callable(text)
        cases = [(dict(f.world.decisions), str(text(f))) for f in found]
        try:
            return edit.choose(cases)
        except ValueError:
            raise Refusal(
                "",
                line_of(self.tree, self.group.function),
                "attention",
                f"its traits differ in a way that no config field tells: {sorted({t for _, t in cases})}",
                "port the layer kinds as two classes",
                "P202",
            ) from None

    def _size(self, found: Found, size: Poly | None, known: set[str] | None = None) -> str:
        """A size as an attribute of the attention (one of `known`) if one holds it, else over config fields."""
        assert size is not None
        if size.number is not None:
            return str(size.number)
        for name, value in found.owner.attrs.items():
            if known is not None and name not in known:
                continue
            if isinstance(value, Scalar) and value.size == size and not value.known:
                return f"self.{name}"
        return self._expression(size.text(), found)

    def _expression(self, text: str, found: Found) -> str:
        """Source over `config`, valid in the attention's __init__."""
        params = {p.name.value for p in edit.params_of(self.init)}
        if "config" in text and "config" not in params:
            raise Refusal(
                "",
                line_of(self.tree, self.init),
                "attention",
                f"its __init__ has no config for {text}",
                "pass the config to the class",
                "P202",
            )
        if "layer_idx" in text and "layer_idx" not in params:
            index = next((n for n, v in found.owner.attrs.items() if isinstance(v, Scalar) and v.op == "index"), None)
            bound = next((c.bound for c in found.world.calls if c.function.node is self.init), {})
            name = next((n for n, v in bound.items() if isinstance(v, Scalar) and v.op == "index"), None)
            if index is not None or name is not None:
                text = text.replace("layer_idx", name or f"self.{index}")
        return text

    def _value(self, found: Found, value: Value) -> str:
        """A scalar as an attribute, as its own source over self, or over config fields."""
        for name, held in found.owner.attrs.items():
            if held is value:
                return f"self.{name}"
        if isinstance(value, Scalar) and value.known:
            return repr(value.const)
        if value.node is not None and isinstance(value.node, cst.BaseExpression) and _over_self(value.node, found):
            return edit.code(value.node)
        return self._expression(scalars.text(value), found)
