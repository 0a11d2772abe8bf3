"""Statements on a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import libcst as cst

from porter.analyze import indexing, scalars, transfer
from porter.analyze.expressions import Expressions
from porter.analyze.poly import HITS
from porter.analyze.program import FunctionInfo, import_names
from porter.analyze.run import Infeasible, Returned
from porter.analyze.serving import SERVING
from porter.analyze.values import (
    Config,
    External,
    Function,
    Instance,
    Layer,
    Mapping,
    Repeated,
    Scalar,
    Sequence,
    Tensor,
    Value,
    const,
    symbol,
)
from porter.errors import Refusal


class _LoopExit(Exception):
    pass


def always_raises(body: cst.BaseSuite) -> bool:
    last = body.body[-1] if body.body else None
    return isinstance(last, cst.SimpleStatementLine) and any(isinstance(s, cst.Raise) for s in last.body)


def _depends_on_data(value: Value) -> bool:
    """Whether a test is of a tensor, or of how many hits there were in one."""
    return isinstance(value, Tensor) or any(
        isinstance(v, Scalar) and v.size is not None and HITS in v.size.symbols for v in value.walk()
    )


class Statements(Expressions):
    """What a statement does, by the kind of its node."""

    def block(self, body: cst.BaseSuite) -> None:
        for statement in body.body:
            if isinstance(statement, cst.SimpleStatementLine):
                for small in statement.body:
                    self.statement(small)
            else:
                self.statement(statement)

    def statement(self, node: cst.CSTNode) -> None:
        handler: Callable[[Any], None] | None = getattr(self, f"_do_{type(node).__name__}", None)
        if handler is None:
            raise self.refuse(node, type(node).__name__, "this statement is not understood", "rewrite it")
        handler(node)

    def _do_Expr(self, node: cst.Expr) -> None:
        value = self.eval(node.value)
        call = node.value
        if isinstance(call, cst.Call) and isinstance(call.func, cst.Attribute):
            name, receiver = call.func.attr.value, call.func.value
            if name.endswith("_") and not name.startswith("_") and isinstance(value, Tensor):
                self.rebind(receiver, value)

    def rebind(self, target: cst.BaseExpression, value: Value) -> None:
        if isinstance(target, cst.Name | cst.Attribute):
            self.assign(target, value)
        elif isinstance(target, cst.Subscript):
            self._set_item(target, value)

    def _do_Assign(self, node: cst.Assign) -> None:
        value = self.eval(node.value)
        for target in node.targets:
            self.assign(target.target, value)

    def _do_AnnAssign(self, node: cst.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.eval(node.value))

    def _do_AugAssign(self, node: cst.AugAssign) -> None:
        operator = type(node.operator).__name__.removesuffix("Assign")
        value = self.binary(operator, self.eval(node.target), self.eval(node.value), node)
        self.record(node, value)
        self.assign(node.target, value)

    def _do_Return(self, node: cst.Return) -> None:
        raise Returned(self.eval(node.value) if node.value is not None else const(None))

    def _do_Raise(self, node: cst.Raise) -> None:
        raise Infeasible(node)

    def _do_Pass(self, node: cst.CSTNode) -> None:
        pass

    _do_Assert = _do_Global = _do_Nonlocal = _do_Del = _do_Pass

    def _do_Break(self, node: cst.CSTNode) -> None:
        raise _LoopExit

    _do_Continue = _do_Break

    def _do_Import(self, node: cst.Import | cst.ImportFrom) -> None:
        for name, target in import_names(node).items():
            self.env[name] = External(op="external", name=target)

    _do_ImportFrom = _do_Import

    def _do_FunctionDef(self, node: cst.FunctionDef) -> None:
        info = FunctionInfo(node.name.value, node)
        self.env[node.name.value] = Function(op="function", info=info, closure=self.env)

    def _do_ClassDef(self, node: cst.ClassDef) -> None:
        raise self.refuse(node, "a class inside a function", "it is not understood", "move it to the module")

    def _do_With(self, node: cst.With) -> None:
        self.block(node.body)

    def _do_Try(self, node: cst.Try) -> None:
        self.block(node.body)

    def _do_If(self, node: cst.If) -> None:
        if always_raises(node.body) and node.orelse is None:
            self._guard(node)
            return
        if self._skips(node):
            return
        if self.test(node.test):
            self.block(node.body)
        elif isinstance(node.orelse, cst.If):
            self._do_If(node.orelse)
        elif node.orelse is not None:
            self.block(node.orelse.body)

    def _skips(self, node: cst.If) -> bool:
        """`if <data>: continue` in a loop over experts or tokens: the body without the skip is what is analysed."""
        only = node.body.body[0] if len(node.body.body) == 1 else None
        skip = isinstance(only, cst.SimpleStatementLine) and isinstance(only.body[0], cst.Continue)
        return skip and node.orelse is None and _depends_on_data(self.quiet(node.test))

    def _guard(self, node: cst.If) -> None:
        """`if bad: raise`: only a condition known to hold stops the path; an open one is the file's own check."""
        trail, taken = list(self.trail), dict(self.taken)
        try:
            stops = scalars.known_truth(self.eval(node.test)) is True
        except Refusal:
            stops = False
        self.trail, self.taken = trail, taken
        self.world.branches[node.test] |= {True, False}
        if stops:
            raise Infeasible(node)

    def _do_For(self, node: cst.For) -> None:
        items, repeat = self.iterate(self.eval(node.iter), node)
        self.world.branches[node].add(bool(items))
        for _ in range(2 if repeat else 1):
            for item in items:
                self.assign(node.target, item)
                try:
                    self.block(node.body)
                except _LoopExit:
                    continue

    def _do_While(self, node: cst.While) -> None:
        raise self.refuse(
            node, "while", "the number of turns depends on data", "rewrite it as a for loop over layers", "P101"
        )

    def iterate(self, value: Value, node: cst.CSTNode) -> tuple[list[Value], bool]:
        """The items to run a loop body with, and whether they stand for an unknown number of turns."""
        if isinstance(value, Layer) and "items" in value.params:
            value = value.params["items"]
        if isinstance(value, Sequence):
            return list(value.items), False
        if isinstance(value, Repeated):
            return [value.item], True
        if isinstance(value, Mapping):
            return [const(k) for k in value.items], False
        if isinstance(value, Tensor):
            return [indexing.row(value, node)], True
        if isinstance(value, Scalar) and value.op == "distinct":
            return [symbol(f"{value.text}[layer_idx]")], True
        if isinstance(value, Scalar) and not value.known:
            return [symbol(f"item of {value.text}")], True
        raise self._unknown(value, node, "for", "it loops over something not understood")

    def assign(self, target: cst.BaseExpression, value: Value) -> None:
        if isinstance(target, cst.Name):
            self.env[target.value] = value
            self.record(target, value)
        elif isinstance(target, cst.Tuple | cst.List):
            self._unpack(target, value)
        elif isinstance(target, cst.Attribute):
            self.set_attribute(self.eval(target.value), target.attr.value, value)
            self.record(target, value)
        elif isinstance(target, cst.Subscript):
            self._set_item(target, value)
        elif isinstance(target, cst.StarredElement):
            self.assign(target.value, value)

    def _unpack(self, target: cst.Tuple | cst.List, value: Value) -> None:
        names = target.elements
        items = indexing.unpack(value, len(names), target)
        if items is None or len(items) != len(names):
            if items is None:
                raise self._unknown(value, target, f"unpack into {len(names)}", "the value is not understood")
            raise self.refuse(target, f"unpack into {len(names)}", f"it has {len(items)} items", "check the rank")
        self.record(target, value)
        for element, item in zip(names, items, strict=True):
            self.assign(element.value, item)

    def _set_item(self, target: cst.Subscript, value: Value) -> None:
        base = self.eval(target.value)
        index = self.index(target)
        if isinstance(base, Mapping) and isinstance(index, Scalar):
            base.items[index.const if index.known else index.text] = value
        elif isinstance(base, Tensor):
            result = transfer.build("setitem", (base, index, value), base.shape, target)
            self.rebind(target.value, result)

    def set_attribute(self, base: Value, name: str, value: Value) -> None:
        if isinstance(base, Instance | Layer):
            base.attrs[name] = value
        elif isinstance(base, Config) and name not in SERVING:
            base.attrs[self.program.config_aliases.get(name, name)] = value
