"""Symbolic execution of a modeling file: one run follows one path, over symbolic tensors, sizes and config fields."""

from __future__ import annotations

import ast
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import libcst as cst

from porter.analyze import indexing, library, library_layers, methods, ops, ops_layers, scalars, transfer
from porter.analyze.facts import CallRecord, Facts, World
from porter.analyze.program import ClassInfo, FunctionInfo, Program, import_names
from porter.analyze.values import (
    SYMBOLIC,
    B,
    ClassRef,
    Config,
    External,
    Function,
    Instance,
    Layer,
    Mapping,
    Repeated,
    S,
    Scalar,
    Sequence,
    Super,
    Tensor,
    Value,
    const,
    is_none,
    symbol,
)
from porter.errors import Refusal

PATH_LIMIT = 192
DEPTH_LIMIT = 60
BUILTINS = frozenset(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)

# What a forward argument is bound to when the engine calls it: full sequences, no cache, no training outputs.
OFF = frozenset({"use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "use_legacy_cache"})
ON = frozenset({"return_dict"})


class Infeasible(Exception):
    """This path raises: the file itself rejects such a config."""


class _Return(Exception):
    def __init__(self, value: Value) -> None:
        self.value = value


class _LoopExit(Exception):
    pass


def explore(program: Program, entry: ClassInfo | None = None, flat: bool = False, number_paths: bool = True) -> Facts:
    """Run the entry class once for every path that its config can choose.

    Without `number_paths`, conditions that only pick a formula by arithmetic (a power of two?) take their usual side.

    Raises:
        Refusal: no path runs to the end; the first failure is shown.
    """
    entry = entry or program.entry()
    if entry is None:
        raise Refusal(
            "",
            0,
            "no causal language model class",
            "no *ForCausalLM or *LMHeadModel class with a forward",
            "name a decoder's modeling file",
        )
    worlds: list[World] = []
    todo: list[tuple[tuple[str, bool], ...]] = [()]
    failure: Refusal | None = None
    runs = 0
    while todo and runs < PATH_LIMIT:
        prefix = todo.pop()
        runs += 1
        run = Interp(program, prefix, flat, number_paths)
        try:
            worlds.append(run.run(entry))
        except Infeasible:
            pass
        except Refusal as refusal:
            failure = failure or refusal
        trail = run.trail
        todo += [(*trail[:i], (trail[i][0], not trail[i][1])) for i in range(len(prefix), len(trail))]
    if failure is not None:
        raise failure
    if not worlds:
        raise Refusal("", 0, entry.name, "every path through its forward raises", "check the file")
    return Facts(program, entry, worlds, complete=not todo)


class Interp:
    """One path. `prefix` fixes the first config conditions; later ones are taken to hold."""

    def __init__(
        self, program: Program, prefix: tuple[tuple[str, bool], ...], flat: bool, number_paths: bool = True
    ) -> None:
        self.program = program
        self.forced = dict(prefix)
        self.trail: list[tuple[str, bool]] = []
        self.taken: dict[str, bool] = {}
        self.world = World()
        self.flat = flat
        self.number_paths = number_paths
        self.depth = 0
        self.globals: dict[str, Value] = {}
        self.frames: list[dict[str, Value]] = []
        self.self_stack: list[Value | None] = []

    # -- the entry ---------------------------------------------------------------------------------------------------

    def run(self, entry: ClassInfo) -> World:
        config = Config(op="config")
        model = self.instantiate(entry, [config], self._quantization(entry), None)
        self.world.entry = model if isinstance(model, Instance) else None
        forward = self.program.method(entry, "forward")
        if forward is None:
            raise Refusal("", 0, entry.name, "it has no forward", "name a decoder's modeling file")
        bound = self._entry_arguments(forward)
        assert isinstance(model, Instance)
        name_modules(model)
        self.world.result = self.call(Function(info=forward, bound=model), [], bound, None)
        for extra in ("compute_logits",):
            method = self.program.method(entry, extra)
            if method is not None:
                self.world.result = self.call(Function(info=method, bound=model), [self.world.result], {}, None)
        self.world.decisions = tuple(self.trail)
        return self.world

    def _quantization(self, entry: ClassInfo) -> dict[str, Value]:
        """A port's entry also takes the engine's linear_method."""
        init = self.program.method(entry, "__init__")
        names = {p.name.value for p in init.node.params.params} if init is not None else set()
        return {"linear_method": Value(op="linear_method")} if "linear_method" in names else {}

    def _entry_arguments(self, forward: FunctionInfo) -> dict[str, Value]:
        bound: dict[str, Value] = {}
        params = forward.node.params
        for param in (*params.params, *params.kwonly_params):
            name = param.name.value
            if name == "input_ids":
                bound[name] = Tensor(op="input_ids", shape=self.tokens())
            elif name in ("position_ids", "positions"):
                bound[name] = Tensor(op="positions", shape=self.tokens(), attrs={"sizes_only": True})
            elif name == "kv_caches":
                bound[name] = Repeated(op="kv_caches", item=Value(op="kv_cache"))
            elif name == "attn_metadata":
                bound[name] = Value(op="attn_metadata")
            elif name in OFF:
                bound[name] = const(False)
            elif name in ON:
                bound[name] = const(True)
        return bound

    def tokens(self) -> tuple[Any, ...]:
        return (B * S,) if self.flat else (B, S)

    # -- conditions --------------------------------------------------------------------------------------------------

    def truth(self, value: Value, node: cst.CSTNode | None) -> bool:
        """Whether a value is true on this path; an open config condition is decided and remembered."""
        known = scalars.known_truth(value)
        if known is not None:
            return known
        if isinstance(value, Scalar):
            key, wanted = scalars.condition(value)
            implied = scalars.implied(key, self.taken)
            if implied is None and "math." in key and not self.number_paths:
                implied = True
            if implied is None:
                implied = self.forced.get(key, True)
                self.trail.append((key, implied))
                self.taken[key] = implied
            return implied is wanted
        raise self.refuse(node, "a condition on a tensor", "its truth depends on data", "rewrite it without the branch")

    def test(self, node: cst.BaseExpression) -> bool:
        """The truth of a test, short-circuited like Python, deciding one condition at a time."""
        if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
            result = not self.test(node.expression)
        elif isinstance(node, cst.BooleanOperation):
            left = self.test(node.left)
            stop = not left if isinstance(node.operator, cst.And) else left
            result = left if stop else self.test(node.right)
        else:
            value = self.eval(node)
            result = self.truth(value, node)
            if scalars.known_truth(value) is None:
                self.world.branches[node].add(not result)
        self.world.branches[node].add(result)
        return result

    # -- statements --------------------------------------------------------------------------------------------------

    def block(self, body: cst.BaseSuite) -> None:
        for statement in body.body:
            if isinstance(statement, cst.SimpleStatementLine):
                self.world.statements[statement].append(dict(self.env))
                for small in statement.body:
                    self.statement(small)
            elif isinstance(statement, cst.BaseCompoundStatement):
                self.world.statements[statement].append(dict(self.env))
                self.statement(statement)
            else:
                self.statement(statement)

    @property
    def env(self) -> dict[str, Value]:
        return self.frames[-1]

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
        raise _Return(self.eval(node.value) if node.value is not None else const(None))

    def _do_Raise(self, node: cst.Raise) -> None:
        raise Infeasible

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
            self.world.statements[node.orelse].append(dict(self.env))
            self._do_If(node.orelse)
        elif node.orelse is not None:
            self.block(node.orelse.body)

    def _skips(self, node: cst.If) -> bool:
        """`if <data>: continue` in a loop over experts or tokens: the body without the skip is what is analysed."""
        only = node.body.body[0] if len(node.body.body) == 1 else None
        skip = isinstance(only, cst.SimpleStatementLine) and isinstance(only.body[0], cst.Continue)
        return skip and node.orelse is None and isinstance(self.quiet(node.test), Tensor)

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
            raise Infeasible

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
        raise self.refuse(node, "while", "the number of turns depends on data", "rewrite it as a for loop over layers")

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
        if isinstance(base, Mapping) and isinstance(index, Scalar) and index.known:
            base.items[index.const] = value
        elif isinstance(base, Tensor):
            result = transfer.build("setitem", (base, index, value), base.shape, target)
            self.rebind(target.value, result)

    def set_attribute(self, base: Value, name: str, value: Value) -> None:
        if isinstance(base, Instance | Layer):
            base.attrs[name] = value

    # -- expressions -------------------------------------------------------------------------------------------------

    def record(self, node: cst.CSTNode, value: Value) -> None:
        self.world.values[node].append(value)

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

    def lookup(self, name: str) -> Value:
        for frame in (self.env, self.env.get("<closure>")):
            env = frame.attrs["env"] if isinstance(frame, Value) else frame
            if env and name in env:
                found: Value = env[name]
                return found
        self.world.names.add(name)
        if name not in self.globals:
            self.globals[name] = self._global(name)
        return self.globals[name]

    def _global(self, name: str) -> Value:
        program = self.program
        if name in program.classes:
            return ClassRef(op="class", info=program.classes[name])
        if name in program.functions:
            return Function(op="function", info=program.functions[name])
        if name in program.imports:
            return External(op="external", name=program.imports[name])
        if name in program.constants:
            self.frames.append({})
            try:
                return self.eval(program.constants[name])
            finally:
                self.frames.pop()
        if name in BUILTINS:
            return External(op="external", name=f"builtins.{name}")
        return Value(op="unknown", attrs={"why": f"{name} is not defined"})

    def _ev_Integer(self, node: cst.Integer | cst.Float) -> Value:
        return const(node.evaluated_value)

    _ev_Float = _ev_Integer

    def _ev_SimpleString(self, node: cst.SimpleString) -> Value:
        return const(ast.literal_eval(node.value))

    def _ev_ConcatenatedString(self, node: cst.ConcatenatedString) -> Value:
        return Scalar(op="string", text="<string>")

    def _ev_FormattedString(self, node: cst.FormattedString) -> Value:
        return Scalar(op="string", text=self.program.tree.code_for_node(node))

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

    def quiet(self, node: cst.BaseExpression) -> Value:
        """Evaluate a test without deciding any open condition."""
        trail, taken = list(self.trail), dict(self.taken)
        value = self.eval(node)
        if (self.trail, self.taken) != (trail, taken):
            self.trail, self.taken = trail, taken
        return value

    def _plain(self, node: cst.BaseExpression) -> bool:
        """Whether a branch of a conditional expression is an open scalar, which needs no path of its own."""
        trail, taken = list(self.trail), dict(self.taken)
        try:
            value = self.eval(node)
        except (Refusal, Infeasible):
            return False
        decided = self.trail != trail
        self.trail, self.taken = trail, taken
        return isinstance(value, Scalar) and not decided

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
        name = _BINARY.get(operator, operator.lower())
        if isinstance(left, Sequence) and isinstance(right, Sequence) and name == "add":
            return Sequence(
                op="concat",
                args=(left, right),
                items=left.items + right.items,
                prefix=left.prefix,
                mutable=left.mutable,
            )
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
        definition = cst.FunctionDef(cst.Name("<lambda>"), node.params, body)
        return Function(op="function", info=FunctionInfo("<lambda>", definition), closure=self.env)

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
            return Repeated(op="repeat", item=found[0][0], args=counted.args if counted.op == "range" else ())
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

    def attribute(self, base: Value, name: str, node: cst.CSTNode | None) -> Value:
        if isinstance(base, Instance):
            return self._instance_attribute(base, name, node)
        if isinstance(base, Super):
            return self._super_attribute(base, name)
        if isinstance(base, Config):
            return library.config_field(self, base, name, node)
        if isinstance(base, External):
            return library.external_attribute(base, name)
        if isinstance(base, ClassRef) and base.info is not None:
            return self._class_attribute(base.info, name)
        if isinstance(base, Sequence):
            return library.sequence_attribute(base, name)
        if isinstance(base, Tensor):
            return ops.attribute(base, name, node)
        if isinstance(base, Layer):
            return library_layers.layer_attribute(base, name, node)
        if isinstance(base, Scalar) and not base.known:
            return symbol(f"{base.text}.{name}")
        return Value(op="attribute", args=(base,), attrs={"name": name})

    def _instance_attribute(self, base: Instance, name: str, node: cst.CSTNode | None) -> Value:
        assert base.cls is not None
        self.world.attribute_reads.add((base.cls.name, name))
        if name in base.attrs:
            found: Value = base.attrs[name]
            return found
        if name == "training":
            return const(False)
        if name in ("is_gradient_checkpointing", "gradient_checkpointing"):
            return const(False)
        method = self.program.method(base.cls, name)
        if method is not None:
            value = Function(op="method", info=method, bound=base)
            if any(d.endswith("property") for d in method.decorators):
                return self.call(value, [], {}, node)
            if "staticmethod" in method.decorators:
                return Function(op="function", info=method)
            return value
        for cls in self.program.mro(base.cls):
            if name in cls.constants:
                self.frames.append({})
                try:
                    return self.eval(cls.constants[name])
                finally:
                    self.frames.pop()
        return library.inherited_attribute(self, base, name)

    def _super_attribute(self, base: Super, name: str) -> Value:
        assert base.instance is not None and base.instance.cls is not None
        method = self.program.method(base.instance.cls, name, after=base.after)
        if method is not None:
            return Function(op="method", info=method, bound=base.instance)
        return External(op="super", name=f"super.{name}", args=(base.instance,))

    def _class_attribute(self, info: ClassInfo, name: str) -> Value:
        method = self.program.method(info, name)
        if method is not None:
            return Function(op="function", info=method)
        for cls in self.program.mro(info):
            if name in cls.constants:
                return self.eval(cls.constants[name])
        if name == "apply" and "forward" in info.methods:
            return External(op="external", name="autograd.apply", args=(ClassRef(op="class", info=info),))
        return symbol(f"{info.name}.{name}")

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

    # -- calls -------------------------------------------------------------------------------------------------------

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

    def call(self, function: Value, args: Seq[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value:
        args = list(args)
        if isinstance(function, Function):
            return self._call_function(function, args, kwargs, node)
        if isinstance(function, ClassRef) and function.info is not None:
            return self.instantiate(function.info, args, kwargs, node)
        if isinstance(function, Instance) and function.cls is not None:
            return self._call_instance(function, args, kwargs, node)
        if isinstance(function, Layer):
            return library.call_layer(self, function, args, kwargs, node)
        if isinstance(function, External):
            return library.call_external(self, function, args, kwargs, node)
        if function.op == "tensor_method":
            return ops.method(self, function.args[0], function.attrs["name"], args, kwargs, node)
        if isinstance(function, Scalar) and not function.known:
            inside = ", ".join([scalars.text(a) for a in args] + [f"{k}={scalars.text(v)}" for k, v in kwargs.items()])
            return symbol(f"{function.text}({inside})")
        if function.op == "attribute":
            return methods.call_method(self, function.args[0], function.attrs["name"], args, kwargs, node)
        tensors = tuple(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
        why = {"why": f"the called object is not understood ({function.attrs.get('why', function.op)})"}
        return Tensor(op="unknown", args=tensors, attrs=why) if tensors else Value(op="unknown", attrs=why)

    def _call_instance(
        self, target: Instance, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
    ) -> Value:
        assert target.cls is not None
        forward = self.program.method(target.cls, "forward")
        if forward is None:
            return library.call_subclass(self, target, args, kwargs, node)
        result = self._call_function(Function(info=forward, bound=target), args, kwargs, node)
        shell = target.attrs.get("<layer>")
        if isinstance(shell, Layer) and shell.kind == "linear" and args:
            shell.path = target.path
            return ops_layers.as_linear(result, args[0], shell)
        return result

    def _call_function(
        self, function: Function, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
    ) -> Value:
        info = function.info
        assert info is not None
        if self.depth > DEPTH_LIMIT:
            raise self.refuse(info.node, info.name, "calls are nested too deep", "check for recursion")
        receiver = function.bound
        if receiver is not None:
            args = [receiver, *args]
        frame = self._bind(info, args, kwargs, node)
        if function.closure is not None:
            frame["<closure>"] = Value(attrs={"env": function.closure})
        record = CallRecord(info, node, dict(frame), receiver)
        self.world.calls.append(record)
        self.frames.append(frame)
        self.self_stack.append(receiver)
        self.depth += 1
        owner = info.owner
        frame["<owner>"] = Value(attrs={"owner": owner})
        try:
            self.block(info.node.body)
            result: Value = const(None)
        except _Return as returned:
            result = returned.value
        finally:
            self.depth -= 1
            self.frames.pop()
            self.self_stack.pop()
        record.result = result
        return result

    def _bind(
        self, info: FunctionInfo, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
    ) -> dict[str, Value]:
        frame: dict[str, Value] = {}
        params = info.node.params
        kwargs = dict(kwargs)
        positional = [*params.posonly_params, *params.params]
        for param in positional:
            name = param.name.value
            if args:
                frame[name] = args.pop(0)
            elif name in kwargs:
                frame[name] = kwargs.pop(name)
        for param in params.kwonly_params:
            if param.name.value in kwargs:
                frame[param.name.value] = kwargs.pop(param.name.value)
        self._defaults(info, frame, node)
        if isinstance(params.star_arg, cst.Param):
            frame[params.star_arg.name.value] = Sequence(op="tuple", args=tuple(args), items=tuple(args))
        if params.star_kwarg is not None:
            frame[params.star_kwarg.name.value] = Mapping(op="dict", items=dict(kwargs))
        return frame

    def _defaults(self, info: FunctionInfo, frame: dict[str, Value], node: cst.CSTNode | None) -> None:
        params = info.node.params
        for param in (*params.posonly_params, *params.params, *params.kwonly_params):
            name = param.name.value
            if name in frame:
                continue
            if param.default is None:
                what = f"{info.name}() misses the argument {name}"
                raise self.refuse(
                    node or info.node,
                    what,
                    "no value reaches it when the engine calls the model",
                    "give the parameter a default",
                )
            self.frames.append({})
            try:
                frame[name] = self.eval(param.default)
            finally:
                self.frames.pop()

    def instantiate(
        self, info: ClassInfo, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
    ) -> Value:
        self.world.classes.add(info.name)
        built = library.build_record(self, info, args, kwargs)
        if built is not None:
            return built
        instance = Instance(op="instance", cls=info, args=())
        instance.node = node
        init = self.program.method(info, "__init__")
        if init is not None:
            self._call_function(Function(info=init, bound=instance), args, kwargs, node)
        else:
            library_layers.init_base(self, instance, args, kwargs)
        return instance

    def _unknown(self, value: Value, node: cst.CSTNode, what: str, why: str) -> Refusal:
        """A refusal that names the first operation not understood, where there is one behind a value."""
        culprits = [v for v in value.walk() if "why" in v.attrs and v.node is not None]
        if not culprits:
            return self.refuse(node, what, f"{why} ({value.op})", "rewrite it in plain torch")
        cause = culprits[-1]
        assert cause.node is not None
        code = " ".join(self.program.tree.code_for_node(cause.node).split())
        return self.refuse(cause.node, code[:90], f"not understood: {cause.attrs['why']}", "rewrite it in plain torch")

    # -- refusing ----------------------------------------------------------------------------------------------------

    def refuse(self, node: cst.CSTNode | None, what: str, why: str, remedy: str) -> Refusal:
        from porter.analyze.facts import line_of

        line = line_of(self.program.tree, node) if node is not None else 0
        return Refusal("", line, what, why, remedy)


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


def always_raises(body: cst.BaseSuite) -> bool:
    last = body.body[-1] if body.body else None
    return isinstance(last, cst.SimpleStatementLine) and any(isinstance(s, cst.Raise) for s in last.body)


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


__all__ = ["SYMBOLIC", "Infeasible", "Interp", "explore"]
