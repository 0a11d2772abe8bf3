"""Calls on a path: arguments bound, bodies run, classes instantiated."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import libcst as cst

from porter.analyze import indexing, library, library_layers, methods, ops, ops_layers, scalars
from porter.analyze.facts import CallRecord
from porter.analyze.lookups import Lookups
from porter.analyze.program import ClassInfo, FunctionInfo
from porter.analyze.run import Infeasible, Returned
from porter.analyze.values import (
    ClassRef,
    External,
    Function,
    Instance,
    Layer,
    Mapping,
    Scalar,
    Sequence,
    Tensor,
    Value,
    const,
    symbol,
)

DEPTH_LIMIT = 60


class Calls(Lookups):
    """Calls of functions, classes, modules and layers."""

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
            if any(isinstance(a, Tensor) for a in [*args, *kwargs.values()]):
                raise Infeasible(node)  # a config is data: no field of it works on tensors
            inside = ", ".join([scalars.text(a) for a in args] + [f"{k}={scalars.text(v)}" for k, v in kwargs.items()])
            return symbol(f"{function.text}({inside})")
        if function.op == "select" and all(isinstance(f, Function | Layer | External) for f in function.args[1:]):
            return self._call_selected(function, args, kwargs, node)
        if function.op == "select" and all(isinstance(f, ClassRef) for f in function.args[1:]):
            return self.call(self._chosen(function, node), args, kwargs, node)
        if function.op == "attribute":
            return methods.call_method(self, function.args[0], function.attrs["name"], args, kwargs, node)
        tensors = tuple(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
        why = {"why": f"the called object is not understood ({function.attrs.get('why', function.op)})"}
        return Tensor(op="unknown", args=tensors, attrs=why) if tensors else Value(op="unknown", attrs=why)

    def _chosen(self, table: Value, node: cst.CSTNode | None) -> Value:
        """The class of a table that this path's key names; each key is a condition of its own."""
        for key, each in zip(table.attrs["keys"], table.args[1:], strict=True):
            if self.truth(scalars.compare("Equal", table.args[0], const(key)), node):
                return each
        raise Infeasible

    def _call_selected(
        self, function: Value, args: list[Value], kwargs: dict[str, Value], node: cst.CSTNode | None
    ) -> Value:
        """`functions[key](...)` with an open key: what each of them returns, selected by the same key."""
        results = [self.call(f, args, kwargs, node) for f in function.args[1:]]
        if all(r.op == "activation" and r.args[0] is results[0].args[0] for r in results):
            return ops_layers.layer(self, Layer(op="layer", kind="activation"), args, kwargs, node)
        table = Mapping(op="dict", items=dict(zip(function.attrs["keys"], results, strict=True)))
        return indexing.item(self, table, function.args[0], node or cst.Name("_"))

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
        frame["<function>"] = function
        try:
            self.block(info.node.body)
            result: Value = const(None)
        except Returned as returned:
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
