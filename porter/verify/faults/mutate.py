"""Puts one fault into the text of a port: an edit of the syntax tree at one place, everything else kept."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider


@dataclass(frozen=True)
class Place:
    """Where an expression stands: its class, method, the attribute that is assigned there, and the class's layers."""

    owner: str
    method: str
    attribute: str
    layers: Mapping[str, str]  # attribute -> what builds it


@dataclass(frozen=True)
class Site:
    """The text of a port with a fault in it, and the module that is broken.

    That is `attribute` of class `owner` where a layer is `built` wrongly, else what `owner` computes. Without an owner
    it is every module whose name has one of the words of `attribute`, split at |.
    """

    text: str
    owner: str
    attribute: str
    built: bool = False

    @property
    def broken(self) -> str:
        """For the table."""
        return ".".join(part for part in (self.owner, self.attribute) if part)


Edit = Callable[[cst.BaseExpression, Place], str | None]  # the expression's new source; None: no place for the fault
Builders = Callable[[str], bool]  # whether the name of a class or function is one of those that are meant


def one_of(*names: str) -> Builders:
    """The builders of these names."""
    return lambda name: name in names


def sites(text: str, edit: Edit, helper: str = "") -> Iterator[Site]:
    """Every place in which `edit` changes the port; `helper` is source that the changed port needs."""
    port, source = _read(text), text.encode()
    for node, place, (start, end) in port.expressions:
        changed = edit(node, place)
        if changed is not None and not _same(changed, source[start:end].decode()):
            before, between = source[: port.first_class].decode(), source[port.first_class : start].decode()
            inserted = f"{helper}\n\n" if helper else ""
            faulty = f"{before}{inserted}{between}({changed}){source[end:].decode()}"
            built = place.method == "__init__" and place.attribute.isidentifier()
            yield Site(faulty, place.owner, place.attribute if built else layer_of(node, place)[0], built)


def _same(left: str, right: str) -> bool:
    """Whether two expressions are one but for layout."""
    return ast.dump(ast.parse(f"({left})")) == ast.dump(ast.parse(f"({right})"))


@dataclass(frozen=True)
class _Port:
    """A port's expressions in classes, each with its place and where it lies; the first class's offset; in bytes."""

    expressions: tuple[tuple[cst.BaseExpression, Place, tuple[int, int]], ...]
    first_class: int


@lru_cache(maxsize=32)
def _read(text: str) -> _Port:
    wrapper = cst.MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    spans = wrapper.resolve(ByteSpanPositionProvider)
    classes = [statement for statement in wrapper.module.body if isinstance(statement, cst.ClassDef)]
    found = tuple(
        (node, place, (spans[node].start, spans[node].start + spans[node].length))
        for owner in classes
        for node, place in _expressions(owner)
        if node in spans
    )
    return _Port(found, spans[classes[0]].start)


def code(node: cst.CSTNode) -> str:
    """The source of a node."""
    return cst.Module([]).code_for_node(node)


def called(node: cst.CSTNode) -> str:
    """The name of what a call calls (`self.x` included), '' for other nodes."""
    return code(node.func) if isinstance(node, cst.Call) else ""


def layer_of(node: cst.CSTNode, place: Place) -> tuple[str, str]:
    """Attribute and builder of the layer that `self.attribute(...)` calls; two empty strings for other nodes."""
    name = called(node).removeprefix("self.")
    return (name, place.layers.get(name, "")) if called(node).startswith("self.") else ("", "")


# -- what edits are made of ------------------------------------------------------------------------


def keyword(builders: Builders, name: str, template: str | None, absent: str | None = None) -> Edit:
    """Change argument `name` where a layer is built ({} is its source; None drops it); `absent` is given if lacking."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        if not isinstance(node, cst.Call) or not builders(called(node)):
            return None
        for index, arg in enumerate(node.args):
            if arg.keyword is not None and arg.keyword.value == name:
                return _with_argument(node, index, None if template is None else template.format(code(arg.value)))
        return None if absent is None else f"{code(node).rstrip()[:-1].rstrip().rstrip(',')}, {name}={absent})"

    return edit


def positional(builders: Builders, index: int, template: str) -> Edit:
    """Change the argument at `index` where a layer is built."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        if not isinstance(node, cst.Call) or not builders(called(node)) or len(node.args) <= index:
            return None
        given = node.args[index]
        return None if given.keyword else _with_argument(node, index, template.format(code(given.value)))

    return edit


def passed(builders: Builders, index: int, template: str) -> Edit:
    """Change the argument at `index` (from the end if negative) where a layer is called; {self} is the layer."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        name, builder = layer_of(node, place)
        if not isinstance(node, cst.Call) or not builders(builder) or not -len(node.args) <= index < len(node.args):
            return None
        value = code(node.args[index].value)
        return _with_argument(node, index % len(node.args), template.format(value, self=f"self.{name}"))

    return edit


def result(builders: Builders, template: str) -> Edit:
    """Change what the call of a layer gives: {} is the call, {arg} its first argument, {self} the layer."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        name, builder = layer_of(node, place)
        if not isinstance(node, cst.Call) or not builders(builder) or not node.args:
            return None
        return template.format(code(node), arg=code(node.args[0].value), self=f"self.{name}")

    return edit


def text_of(matches: Callable[[cst.BaseExpression, Place], bool], change: Callable[[str], str | None]) -> Edit:
    """Change the source of the expressions that match."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        return change(code(node)) if matches(node, place) else None

    return edit


# -- walking ---------------------------------------------------------------------------------------


def _expressions(owner: cst.ClassDef) -> Iterator[tuple[cst.BaseExpression, Place]]:
    layers = dict(_layers(owner))
    for statement in owner.body.body:
        method = statement.name.value if isinstance(statement, cst.FunctionDef) else ""
        for node, attribute in _walk(statement, ""):
            yield node, Place(owner.name.value, method, attribute, layers)


def _walk(node: cst.CSTNode, attribute: str) -> Iterator[tuple[cst.BaseExpression, str]]:
    if isinstance(node, cst.Assign) and len(node.targets) == 1:
        attribute = code(node.targets[0].target).removeprefix("self.")
    if isinstance(node, cst.BaseExpression):
        yield node, attribute
    for child in node.children:
        yield from _walk(child, attribute)


def _layers(owner: cst.ClassDef) -> Iterator[tuple[str, str]]:
    for node in _all(owner):
        if isinstance(node, cst.Assign) and code(node.targets[0].target).startswith("self."):
            builders = [called(each) for each in _all(node.value) if called(each)]
            if builders:
                yield code(node.targets[0].target).removeprefix("self."), builders[0]


def _all(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _all(child)


def _with_argument(call: cst.Call, index: int, source: str | None) -> str:
    args = list(call.args)
    if source is None:
        del args[index]
    else:
        args[index] = args[index].with_changes(value=cst.parse_expression(source))
    return code(call.with_changes(args=args))
