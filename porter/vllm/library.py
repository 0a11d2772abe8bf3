"""What names a vLLM has, with their parameters and attributes, read from its source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from porter.vllm.wheels import VllmSource

_DEPTH = 12  # re-exports and bases to follow; vLLM has no longer chains


@dataclass(frozen=True)
class Symbol:
    """A class, function or value: what it can be called with, and what its objects have."""

    kind: str  # "class", "function" or "value"
    parameters: tuple[str, ...] = ()  # in order, without self; keyword-only ones too
    positional: int = 0  # how many of them may be given without a name
    keywords: bool = False  # whether it takes any other keyword
    attributes: tuple[str, ...] = ()


@dataclass
class Library:
    """Looks names up in one vLLM. Modules are parsed once."""

    source: VllmSource
    _modules: dict[str, _Module | None] = field(default_factory=dict)

    def symbol(self, module: str, name: str) -> Symbol | None:
        """The symbol that `from module import name` gives; None if the import would fail."""
        found = self._find(module, name)
        if found is None:
            inner = self.module(f"{module}.{name}")
            return Symbol("value") if inner is not None else None
        owner, node = found
        if isinstance(node, ast.ClassDef):
            return self._class(owner, node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _function(node, skip=0)
        return Symbol("value")

    def module(self, name: str) -> _Module | None:
        """A parsed module; None if there is none."""
        if name not in self._modules:
            text = self.source.module(name)
            is_package = text is not None and self.source.read(f"{name.replace('.', '/')}.py") is None
            self._modules[name] = None if text is None else _Module(name, ast.parse(text), is_package)
        return self._modules[name]

    def _find(self, module: str, name: str, depth: int = 0) -> tuple[_Module, ast.AST] | None:
        """The definition of a name, through re-exports."""
        found = self.module(module)
        if found is None or depth > _DEPTH:
            return None
        if name in found.defined:
            return found, found.defined[name]
        if name in found.imported:
            there, original = found.imported[name]
            return self._find(there, original, depth + 1) if there.startswith("vllm") else (found, ast.Pass())
        for star in found.stars:
            inner = self._find(star, name, depth + 1)
            if inner is not None:
                return inner
        return (found, ast.Pass()) if name in found.lazy else None

    def _class(self, owner: _Module, node: ast.ClassDef) -> Symbol:
        lineage = list(self._lineage(owner, node))
        attributes = sorted({name for cls in lineage for name in _attributes(cls)})
        for cls in lineage:
            for name in ("__init__", "__new__"):
                init = next((f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == name), None)
                if init is not None:
                    called = _function(init, skip=1)
                    return Symbol("class", called.parameters, called.positional, called.keywords, tuple(attributes))
        fields = tuple(
            s.target.id
            for cls in reversed(lineage)
            for s in cls.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        )
        return Symbol("class", fields, len(fields), not fields, tuple(attributes))

    def _lineage(self, owner: _Module, node: ast.ClassDef, depth: int = 0) -> Iterator[ast.ClassDef]:
        yield node
        for base in node.bases if depth < _DEPTH else ():
            name = base.value.id if isinstance(base, ast.Subscript) and isinstance(base.value, ast.Name) else None
            name = base.id if isinstance(base, ast.Name) else name
            found = self._find(owner.name, name) if name is not None else None
            if found is not None and isinstance(found[1], ast.ClassDef) and found[1] is not node:
                yield from self._lineage(found[0], found[1], depth + 1)


@dataclass
class _Module:
    """One parsed module, by the names that it binds at its top level."""

    name: str
    tree: ast.Module
    is_package: bool

    @cached_property
    def defined(self) -> dict[str, ast.AST]:
        found: dict[str, ast.AST] = {}
        for node in _top(self.tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
        return found

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        return {
            alias.asname or alias.name: (self._absolute(node), alias.name)
            for node in _top(self.tree.body)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    @cached_property
    def stars(self) -> list[str]:
        nodes = [n for n in _top(self.tree.body) if isinstance(n, ast.ImportFrom)]
        return [self._absolute(n) for n in nodes if any(a.name == "*" for a in n.names)]

    @cached_property
    def lazy(self) -> frozenset[str]:
        """Names that a module's __getattr__ finds in a table of strings."""
        tables = [n.value for n in self.defined.values() if isinstance(n, ast.Assign | ast.AnnAssign)]
        keys = [k for t in tables if isinstance(t, ast.Dict) for k in t.keys]
        names = frozenset(k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str))
        return names if "__getattr__" in self.defined else frozenset()

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*base, *([node.module] if node.module else [])])


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, those under conditions too."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _top(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _top(handler.body)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, skip: int) -> Symbol:
    plain = [a.arg for a in (*node.args.posonlyargs, *node.args.args)][skip:]
    positional = 99 if node.args.vararg else len(plain)
    names = (*plain, *(a.arg for a in node.args.kwonlyargs))
    return Symbol("function", names, positional, node.args.kwarg is not None)


def _is_protocol(node: ast.ClassDef) -> bool:
    return any("Protocol" in ast.dump(base) for base in node.bases)


def _abstract(node: ast.ClassDef) -> Iterator[str]:
    """What a protocol asks for: its methods without a body of their own."""
    for function in (s for s in node.body if isinstance(s, ast.FunctionDef)):
        last = function.body[-1]
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant):
            yield function.name


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """What an object of a class has: methods, class attributes, and what its methods assign or register."""
    if _is_protocol(node):
        yield from _abstract(node)
        return
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            yield from (t.id for t in statement.targets if isinstance(t, ast.Name))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                yield inner.attr
        elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.args:
            registers = inner.func.attr in ("register_parameter", "register_buffer")
            if registers and isinstance(inner.args[0], ast.Constant):
                yield str(inner.args[0].value)
