"""Expressions on a path, evaluated to symbolic values."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import libcst as cst

from porter.analyze import indexing, library, ops, scalars
from porter.analyze.calls import Calls
from porter.analyze.program import FunctionInfo
from porter.analyze.run import Infeasible
from porter.analyze.values import (
    External,
    Function,
    Mapping,
    Repeated,
    Scalar,
    Sequence,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)
from porter.errors import Refusal

_LITERALS = {"None": None, "True": True, "False": False}
_UNARY = {"Minus": "neg", "Not": "logical_not", "BitInvert": "logical_not", "Plus": "positive"}
_BINARY = {
    "Add": "add",
    "Subtract": "sub",
    "Multiply": "mul",
    "Divide": "div",
    "FloorDivide": "floor_divide",
    "Modulo": "remainder",
    "Power": "pow",
    "MatrixMultiply": "matmul",
    "BitAnd": "logical_and",
    "BitOr": "logical_or",
    "BitXor": "logical_xor",
}
_COMPARE = {
    "Equal": "eq",
    "NotEqual": "ne",
    "LessThan": "lt",
    "LessThanEqual": "le",
    "GreaterThan": "gt",
    "GreaterThanEqual": "ge",
    "In": "in",
    "NotIn": "not_in",
}


@cache
def _literal(text: str) -> Any:
    """The value of a number or a string; each is read again on every path."""
    return ast.literal_eval(text)


class Expressions(Calls):
    """The value of an expression, by the kind of its node."""

    def eval(self, node: cst.BaseExpression) -> Value:
        handler: Callable[[Any], Value] | None = getattr(self, f"_ev_{type(node).__name__}", None)
        if handler is None:
            value: Value = Value(op="unknown", node=node)
        else:
            value = handler(node)
        if value.node is None:
            value.node = node
        self.record(node, value)
        return value

    def _ev_Name(self, node: cst.Name) -> Value:
        if node.value in _LITERALS:
            return const(_LITERALS[node.value])
        return self.lookup(node.value)

    def _ev_Integer(self, node: cst.Integer | cst.Float) -> Value:
        return const(_literal(node.value))

    _ev_Float = _ev_Integer

    def _ev_SimpleString(self, node: cst.SimpleString) -> Value:
        return const(_literal(node.value))

    def _ev_ConcatenatedString(self, node: cst.ConcatenatedString) -> Value:
        return Scalar(op="string", text="<string>")

    def _ev_FormattedString(self, node: cst.FormattedString) -> Value:
        """A name made of values is known when they are; else its text tells equal names from different ones."""
        parts = [self._text_part(part) for part in node.parts]
        if all(isinstance(part, str) for part in parts):
            return const("".join(str(part) for part in parts))
        texts = [part if isinstance(part, str) else f"{{{scalars.text(part)}}}" for part in parts]
        return Scalar(op="string", text=f"f{''.join(texts)!r}")

    def _text_part(self, part: cst.BaseFormattedStringContent) -> str | Value:
        if isinstance(part, cst.FormattedStringText):
            return part.value
        assert isinstance(part, cst.FormattedStringExpression)
        try:
            value = self.eval(part.expression)
        except (Refusal, Infeasible):
            return symbol(self.program.tree.code_for_node(part.expression))
        plain = isinstance(value, Scalar) and value.known and part.format_spec is None and part.conversion is None
        return str(value.const) if plain and isinstance(value, Scalar) else value

    def _ev_Ellipsis(self, node: cst.Ellipsis) -> Value:
        return const(Ellipsis)

    def _ev_Tuple(self, node: cst.Tuple | cst.List) -> Value:
        items: list[Value] = []
        prefix = 0
        for element in node.elements:
            value = self.eval(element.value)
            if isinstance(element, cst.StarredElement):
                if not isinstance(value, Sequence):
                    return Value(op="unknown", attrs={"why": "a starred value of unknown length"})
                prefix = value.prefix if not items else prefix
                items += value.items
            else:
                items.append(value)
        return Sequence(
            op="tuple", args=tuple(items), items=tuple(items), prefix=prefix, mutable=isinstance(node, cst.List)
        )

    _ev_List = _ev_Set = _ev_Tuple

    def _ev_Dict(self, node: cst.Dict) -> Value:
        result = Mapping(op="dict")
        for element in node.elements:
            if isinstance(element, cst.StarredDictElement):
                inner = self.eval(element.value)
                result.items.update(inner.items if isinstance(inner, Mapping) else {})
                continue
            assert isinstance(element, cst.DictElement)
            key = self.eval(element.key)
            value = self.eval(element.value)
            result.items[key.const if isinstance(key, Scalar) and key.known else scalars.text(key)] = value
        return result

    def _ev_IfExp(self, node: cst.IfExp) -> Value:
        value = self.quiet(node.test)
        decided = scalars.settled(value, self.taken)
        if scalars.known_truth(value) is None and decided is not None:
            self.world.branches[node.test] |= {True, False}
            return self.eval(node.body if decided else node.orelse)
        if decided is None and self._plain(node.body) and self._plain(node.orelse):
            self.world.branches[node.test] |= {True, False}
            return scalars.choose(value, self.eval(node.body), self.eval(node.orelse))
        return self.eval(node.body if self.test(node.test) else node.orelse)

    def _ev_BooleanOperation(self, node: cst.BooleanOperation) -> Value:
        left = self.eval(node.left)
        known = scalars.known_truth(left)
        is_and = isinstance(node.operator, cst.And)
        self.world.branches[node.left] |= {True, False} if known is None else {known}
        if known is not None:
            return (self.eval(node.right) if known else left) if is_and else (left if known else self.eval(node.right))
        return scalars.combine("and" if is_and else "or", left, self.eval(node.right))

    def _ev_UnaryOperation(self, node: cst.UnaryOperation) -> Value:
        value = self.eval(node.expression)
        return scalars.unary(type(node.operator).__name__, value) or ops.method(
            self, value, _UNARY[type(node.operator).__name__], [], {}, node
        )

    def _ev_BinaryOperation(self, node: cst.BinaryOperation) -> Value:
        return self.binary(type(node.operator).__name__, self.eval(node.left), self.eval(node.right), node)

    def binary(self, operator: str, left: Value, right: Value, node: cst.CSTNode) -> Value:
        if "unbound" in (left.op, right.op):
            raise Infeasible(node)  # as Python does
        name = _BINARY.get(operator, operator.lower())
        if isinstance(left, Sequence) and isinstance(right, Sequence) and name == "add":
            return Sequence(
                op="concat",
                args=(left, right),
                items=left.items + right.items,
                prefix=left.prefix,
                mutable=left.mutable,
            )
        if isinstance(right, Sequence) and name == "mul" and isinstance(left, Scalar):
            left, right = right, left
        if isinstance(left, Sequence | Repeated) and name == "mul" and isinstance(right, Scalar):
            if isinstance(left, Sequence) and right.known and isinstance(right.const, int):
                return Sequence(op="repeat", items=left.items * right.const, mutable=left.mutable)
            first = left.items[0] if isinstance(left, Sequence) and left.items else Value()
            return Repeated(op="repeat", item=first, args=(right,))
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            return ops.apply(self, name, [left, right], {}, node)
        return scalars.binary(name, left, right)

    def _ev_Comparison(self, node: cst.Comparison) -> Value:
        left = self.eval(node.left)
        results = []
        for target in node.comparisons:
            right = self.eval(target.comparator)
            results.append(self._compare(target.operator, left, right, node))
            left = right
        total = results[0]
        for more in results[1:]:
            total = scalars.combine("and", total, more)
        return total

    def _compare(self, operator: cst.BaseCompOp, left: Value, right: Value, node: cst.CSTNode) -> Value:
        name = type(operator).__name__
        on_tensors = isinstance(left, Tensor) or isinstance(right, Tensor)
        if on_tensors and name not in ("Is", "IsNot", "In", "NotIn") and not is_none(left) and not is_none(right):
            return ops.apply(self, _COMPARE[name], [left, right], {}, node)
        return scalars.compare(name, left, right)

    def _ev_Lambda(self, node: cst.Lambda) -> Value:
        body = cst.IndentedBlock([cst.SimpleStatementLine([cst.Return(node.body)])])
        definition = cst.FunctionDef(cst.Name("_"), node.params, body)
        return Function(op="function", info=FunctionInfo("lambda", definition), closure=self.env)

    def _ev_NamedExpr(self, node: cst.NamedExpr) -> Value:
        value = self.eval(node.value)
        self.assign(node.target, value)
        return value

    def _comprehension(
        self, node: cst.ListComp | cst.GeneratorExp | cst.SetComp | cst.DictComp
    ) -> tuple[list[tuple[Value, ...]], bool]:
        loop = node.for_in
        items, repeat = self.iterate(self.eval(loop.iter), node)
        found: list[tuple[Value, ...]] = []
        self.frames.append(dict(self.env))
        try:
            for item in items:
                self.assign(loop.target, item)
                if all(repeat or self.test(condition.test) for condition in loop.ifs):
                    parts = (node.key, node.value) if isinstance(node, cst.DictComp) else (node.elt,)
                    found.append(tuple(self.eval(part) for part in parts))
        finally:
            self.frames.pop()
        return found, repeat

    def _ev_ListComp(self, node: cst.ListComp) -> Value:
        found, repeat = self._comprehension(node)
        if repeat:
            counted = self.world.values[node.for_in.iter][-1]
            item, count = found[0][0], counted.attrs.get("count")
            args = counted.args if counted.op == "range" else (item,) if isinstance(item, Tensor) else ()
            return Repeated(op="repeat", item=item, args=args, attrs={"count": count} if count is not None else {})
        items = tuple(f[0] for f in found)
        return Sequence(op="tuple", args=items, items=items, mutable=True)

    _ev_GeneratorExp = _ev_SetComp = _ev_ListComp

    def _ev_DictComp(self, node: cst.DictComp) -> Value:
        found, _ = self._comprehension(node)
        return Mapping(
            op="dict", items={k.const if isinstance(k, Scalar) and k.known else scalars.text(k): v for k, v in found}
        )

    def _ev_Attribute(self, node: cst.Attribute) -> Value:
        base = self.eval(node.value)
        name = node.attr.value
        value = self.attribute(base, name, node)
        self.world.attribute_nodes[node] = base
        return value

    def _ev_Subscript(self, node: cst.Subscript) -> Value:
        base = self.eval(node.value)
        if isinstance(base, External):
            return library.external_item(self, base, self.index(node))
        index = self.index(node)
        return indexing.item(self, base, index, node)

    def index(self, node: cst.Subscript) -> Value:
        parts = [self._index_part(e.slice) for e in node.slice]
        has_comma = len(parts) > 1 or isinstance(node.slice[0].comma, cst.Comma)
        return Sequence(op="index", args=tuple(parts), items=tuple(parts)) if has_comma else parts[0]

    def _index_part(self, part: cst.BaseSlice) -> Value:
        if isinstance(part, cst.Index):
            return self.eval(part.value)
        assert isinstance(part, cst.Slice)
        ends = [self.eval(e) if e is not None else const(None) for e in (part.lower, part.upper, part.step)]
        return Sequence(op="slice", args=tuple(ends), items=tuple(ends))

    def _ev_Call(self, node: cst.Call) -> Value:
        function = self.eval(node.func)
        args: list[Value] = []
        kwargs: dict[str, Value] = {}
        for arg in node.args:
            value = self.eval(arg.value)
            if arg.star == "*":
                args += self.iterate(value, node)[0]
            elif arg.star == "**":
                kwargs.update({str(k): v for k, v in value.items.items()} if isinstance(value, Mapping) else {})
            elif arg.keyword is not None:
                kwargs[arg.keyword.value] = value
            else:
                args.append(value)
        return self.call(function, args, kwargs, node)
