"""The classes, functions, imports and constants of one modeling file, by name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst
from libcst.helpers import get_full_name_for_node

# Packages whose names stand for what they compute; other imports in a `try` are taken to fail.
PRESENT = frozenset({"torch", "transformers", "numpy", "einops", "porter"})
MODULE_BASES = ("Module", "PreTrainedModel", "GradientCheckpointingLayer", "GenerationMixin")


@dataclass(eq=False)
class FunctionInfo:
    name: str
    node: cst.FunctionDef
    owner: ClassInfo | None = None

    @property
    def decorators(self) -> tuple[str, ...]:
        return tuple(name for d in self.node.decorators if (name := full_name(_undecorated(d.decorator))))

    @cached_property
    def local_names(self) -> frozenset[str]:
        """The names that its statements assign."""
        return frozenset(_assigned_names(self.node.body))


@dataclass(eq=False)
class ClassInfo:
    name: str
    node: cst.ClassDef
    bases: tuple[str, ...] = ()
    methods: dict[str, FunctionInfo] = field(default_factory=dict)
    constants: dict[str, cst.BaseExpression] = field(default_factory=dict)


@dataclass(eq=False)
class Program:
    """A parsed file. Conditional top-level blocks (`if is_x_available():`, `try:`) count as present."""

    tree: cst.Module
    classes: dict[str, ClassInfo] = field(default_factory=dict)
    functions: dict[str, FunctionInfo] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    constants: dict[str, cst.BaseExpression] = field(default_factory=dict)
    config_class: ClassInfo | None = None
    config_aliases: dict[str, str] = field(default_factory=dict)
    counts_positions: bool = False  # whether the file is to count positions itself, given none

    @staticmethod
    def read(tree: cst.Module, config: cst.Module | None = None) -> Program:
        """Index a modeling file; `config` is its configuration file, for aliases and properties of the config."""
        program = Program(tree)
        for statement in _flat(tree.body):
            program._add(statement)
        if config is not None:
            program._read_config(config)
        return program

    def _read_config(self, tree: cst.Module) -> None:
        classes = [c for c in Program.read(tree).classes.values() if c.name.endswith("Config")]
        classes = [c for c in classes if "model_type" in c.constants] or classes  # others say how to export it
        if len(classes) == 1:
            self.config_class = classes[0]
            aliases = classes[0].constants.get("attribute_map")
            if isinstance(aliases, cst.Dict):
                self.config_aliases = _text_pairs(aliases)

    def _add(self, statement: cst.BaseStatement | cst.BaseSmallStatement) -> None:
        if isinstance(statement, cst.ClassDef):
            self.classes[statement.name.value] = _read_class(statement)
        elif isinstance(statement, cst.FunctionDef):
            self.functions[statement.name.value] = FunctionInfo(statement.name.value, statement)
        elif isinstance(statement, cst.Import | cst.ImportFrom):
            self.imports.update(import_names(statement))
        else:
            self.constants.update(_assigned(statement))

    def mro(self, info: ClassInfo) -> list[ClassInfo]:
        """The class and its bases in this file, depth first (enough for modeling files)."""
        order = [info]
        for base in info.bases:
            if base in self.classes and self.classes[base] is not info:
                order += [c for c in self.mro(self.classes[base]) if c not in order]
        return order

    def external_bases(self, info: ClassInfo) -> list[str]:
        return [
            self.imports.get(b.split(".")[0], b.split(".")[0]) + b[len(b.split(".")[0]) :]
            for c in self.mro(info)
            for b in c.bases
            if b not in self.classes
        ]

    def method(self, info: ClassInfo, name: str, after: ClassInfo | None = None) -> FunctionInfo | None:
        order = self.mro(info)
        for cls in order[order.index(after) + 1 :] if after in order else order:
            if name in cls.methods:
                return cls.methods[name]
        return None

    def entry(self, own: Collection[str] = ()) -> ClassInfo | None:
        """The causal-LM class of the file: `*ForCausalLM`, else `*LMHeadModel`; one of `own` before borrowed ones,
        and a class before its bases."""
        inherited = {b for c in self.classes.values() for b in c.bases}
        for names in ([n for n in self.classes if n in own], list(self.classes)):
            for ending in ("ForCausalLM", "LMHeadModel", "DecoderLMHead", "ForConditionalGeneration"):
                found = [n for n in names if n.endswith(ending) and self.method(self.classes[n], "forward")]
                if found:
                    return self.classes[next((n for n in found if n not in inherited), found[0])]
        return None


def _flat(body: Sequence[cst.BaseStatement]) -> Iterator[cst.BaseStatement | cst.BaseSmallStatement]:
    for statement in body:
        if isinstance(statement, cst.SimpleStatementLine):
            yield from statement.body
        elif isinstance(statement, cst.Try) and _needs_absent_package(statement):
            for handler in statement.handlers:
                if isinstance(handler.body, cst.IndentedBlock):
                    yield from _flat(handler.body.body)
        elif isinstance(statement, cst.If | cst.Try | cst.With) and isinstance(statement.body, cst.IndentedBlock):
            yield from _flat(statement.body.body)
        else:
            yield statement


def _needs_absent_package(node: cst.Try) -> bool:
    """Whether a guarded block imports a package that a port never has, so that its `except` is what runs."""
    small = [s for line in node.body.body if isinstance(line, cst.SimpleStatementLine) for s in line.body]
    imported = [s for s in small if isinstance(s, cst.Import | cst.ImportFrom)]
    roots = {
        name.split(".")[0]
        for s in imported
        if not (isinstance(s, cst.ImportFrom) and s.relative)
        for name in ([full_name(s.module)] if isinstance(s, cst.ImportFrom) else [full_name(a.name) for a in s.names])
    }
    return bool(roots - PRESENT - sys.stdlib_module_names)


def _read_class(node: cst.ClassDef) -> ClassInfo:
    bases = tuple(name for b in node.bases if (name := full_name(b.value)))
    info = ClassInfo(node.name.value, node, bases)
    if isinstance(node.body, cst.IndentedBlock):
        for statement in _flat(node.body.body):
            if isinstance(statement, cst.FunctionDef):
                info.methods[statement.name.value] = FunctionInfo(statement.name.value, statement, info)
            else:
                info.constants.update(_assigned(statement))
    return info


def _assigned_names(node: cst.CSTNode) -> Iterator[str]:
    target = getattr(node, "target", None)
    if isinstance(target, cst.BaseExpression):
        yield from _plain_names(target)
    for child in node.children:
        yield from _assigned_names(child)


def _plain_names(target: cst.BaseExpression) -> Iterator[str]:
    if isinstance(target, cst.Name):
        yield target.value
    elif isinstance(target, cst.Tuple | cst.List):
        for element in target.elements:
            yield from _plain_names(element.value)


def _assigned(statement: cst.CSTNode) -> dict[str, cst.BaseExpression]:
    if isinstance(statement, cst.Assign):
        return {t.target.value: statement.value for t in statement.targets if isinstance(t.target, cst.Name)}
    if isinstance(statement, cst.AnnAssign) and statement.value and isinstance(statement.target, cst.Name):
        return {statement.target.value: statement.value}
    return {}


def import_names(node: cst.Import | cst.ImportFrom) -> dict[str, str]:
    """Local name -> qualified name; relative imports are taken to be inside transformers."""
    if isinstance(node.names, cst.ImportStar):
        return {}
    module = ""
    if isinstance(node, cst.ImportFrom):
        module = full_name(node.module) if node.module else ""
        prefix = "transformers." if len(node.relative) > 1 else "." if node.relative else ""
        module = prefix + module + "."
    found = {}
    for alias in node.names:
        name = full_name(alias.name)
        if alias.asname and isinstance(alias.asname.name, cst.Name):
            found[alias.asname.name.value] = module + name
        else:
            local = name if isinstance(node, cst.ImportFrom) else name.split(".")[0]
            found[local] = module + local
    return found


def _text_pairs(node: cst.Dict) -> dict[str, str]:
    return {
        e.key.raw_value: e.value.raw_value
        for e in node.elements
        if isinstance(e, cst.DictElement)
        and isinstance(e.key, cst.SimpleString)
        and isinstance(e.value, cst.SimpleString)
    }


def full_name(node: cst.CSTNode | None) -> str:
    return (get_full_name_for_node(node) or "") if node is not None else ""


def _undecorated(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.func if isinstance(node, cst.Call) else node
