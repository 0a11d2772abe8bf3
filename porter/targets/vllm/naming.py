"""The name that vLLM wants each layer to be told: the path of attributes and indices that leads to it."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.errors import Refusal
from porter.passes import edit

INDEX = "i"


def layer_name(stack: Sequence[cst.CSTNode], call: cst.Call) -> str:
    """The part of a layer's name below the `prefix` of the class that makes it, as the text of an f-string.

    `stack` are the nodes around `call`, outermost first. "" for a call of super().__init__.

    Raises:
        Refusal: the layer is not kept under a plain attribute.
    """
    if edit.code(call.func) == "super().__init__":
        return ""
    parts: list[str] = []
    below: cst.CSTNode = call
    for node in reversed(stack):
        if isinstance(node, cst.ListComp | cst.GeneratorExp):
            parts.append(f"{{{index_of(node)}}}")
        elif isinstance(node, cst.List | cst.Tuple):
            parts.append(str([e.value for e in node.elements].index(below)))  # type: ignore[arg-type]
        elif isinstance(node, cst.Call) and edit.code(node.func) == "nn.Sequential":
            parts.append(str(next(i for i, a in enumerate(node.args) if a.value is below)))
        elif isinstance(node, cst.DictElement):
            key = edit.code(node.key)
            parts.append(key.strip("'\"") if key[:1] in "'\"" else f"{{{key}}}")
        elif isinstance(node, cst.Assign):
            return ".".join([_attribute(node), *reversed(parts)])
        elif isinstance(node, cst.BaseStatement):
            break
        if not isinstance(node, cst.Arg | cst.Element | cst.Expr):
            below = node
    raise Refusal("", 0, edit.code(call.func), "it is no attribute, so vLLM can't name it", "keep it as self.<name>")


def index_of(node: cst.ListComp | cst.GeneratorExp) -> str:
    """The variable that counts a comprehension's elements from 0, as `with_index` leaves it."""
    target = node.for_in.target
    if isinstance(target, cst.Tuple) and edit.code(node.for_in.iter).startswith("enumerate("):
        return edit.code(target.elements[0].value)
    return edit.code(target) if _counts(node) and edit.code(target) != "_" else INDEX


def _counts(node: cst.ListComp | cst.GeneratorExp) -> bool:
    loop = node.for_in.iter
    return isinstance(loop, cst.Call) and edit.code(loop.func) == "range" and len(loop.args) == 1


def with_index(node: cst.ListComp | cst.GeneratorExp) -> cst.ListComp | cst.GeneratorExp:
    """A comprehension whose first variable counts its elements from 0."""
    loop = node.for_in
    if _counts(node):
        return node.with_changes(for_in=loop.with_changes(target=cst.Name(index_of(node))))
    if edit.code(loop.iter).startswith("enumerate("):
        return node
    pair = cst.Tuple([cst.Element(cst.Name(INDEX)), cst.Element(loop.target)], lpar=[], rpar=[])
    iterable = edit.parse(f"enumerate({edit.code(loop.iter)})")
    return node.with_changes(for_in=loop.with_changes(target=pair, iter=iterable))


def _attribute(node: cst.Assign) -> str:
    target = node.targets[0].target
    if isinstance(target, cst.Attribute) and edit.code(target.value) == "self" and len(node.targets) == 1:
        return target.attr.value
    raise Refusal("", 0, edit.code(target), "a layer is kept in a variable, so vLLM can't name it", "assign it to self")
