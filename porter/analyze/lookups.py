"""What names and attributes hold on a path."""

from __future__ import annotations

import libcst as cst

from porter.analyze import library, library_layers, ops
from porter.analyze.conditions import Conditions
from porter.analyze.program import ClassInfo
from porter.analyze.values import (
    ClassRef,
    Config,
    External,
    Function,
    Instance,
    Layer,
    Scalar,
    Sequence,
    Super,
    Tensor,
    Value,
    const,
    symbol,
)

BUILTINS = frozenset(dir(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)


class Lookups(Conditions):
    """What names and attributes hold."""

    def lookup(self, name: str) -> Value:
        for frame in (self.env, self.env.get("<closure>")):
            env = frame.attrs["env"] if isinstance(frame, Value) else frame
            if env and name in env:
                found: Value = env[name]
                return found
        self.world.names.add(name)
        if name not in self.globals:
            self.globals[name] = self._global(name)
        if self.globals[name].op == "unknown" and name in self._local_names():
            return Value(op="unbound", attrs={"why": f"{name} is not set on this path"})
        return self.globals[name]

    def _local_names(self) -> frozenset[str]:
        function = self.env.get("<function>")
        return function.info.local_names if isinstance(function, Function) and function.info else frozenset()

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
        if name == "positions":  # as passes write it before every function is given them
            return Tensor(op="positions", shape=self.tokens(), attrs={"sizes_only": True})
        return Value(op="unknown", attrs={"why": f"{name} is not defined"})

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
            return library_layers.layer_attribute(self, base, name, node)
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
