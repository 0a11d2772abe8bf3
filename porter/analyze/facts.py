"""What symbolic execution saw at each node of a file, over every path that the config can choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import libcst as cst

from porter.analyze.program import ClassInfo, FunctionInfo, Program
from porter.analyze.values import Instance, Layer, Value


@dataclass(eq=False)
class CallRecord:
    """One call of a function of the file: where, with what, and what came back."""

    function: FunctionInfo
    site: cst.CSTNode | None
    bound: dict[str, Value]
    receiver: Value | None
    result: Value | None = None


@dataclass(eq=False)
class World:
    """One path through the file: the config conditions taken, in order, and the values seen."""

    decisions: tuple[tuple[str, bool], ...] = ()
    values: dict[cst.CSTNode, list[Value]] = field(default_factory=lambda: defaultdict(list))
    branches: dict[cst.CSTNode, set[bool]] = field(default_factory=lambda: defaultdict(set))
    # (condition, its other truth, the outcome that this would give) of each test that the config decides
    open_tests: dict[cst.CSTNode, set[tuple[str, bool, bool]]] = field(default_factory=lambda: defaultdict(set))
    calls: list[CallRecord] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    attribute_reads: set[tuple[str, str]] = field(default_factory=set)
    config_reads: dict[str, cst.CSTNode] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    attribute_nodes: dict[cst.CSTNode, Value] = field(default_factory=dict)
    entry: Instance | None = None
    root: Value | None = None
    result: Value | None = None
    created: list[Layer] = field(default_factory=list)


@dataclass(eq=False)
class Facts:
    """The joined worlds of one program."""

    program: Program
    entry: ClassInfo
    worlds: list[World]
    raised: tuple[frozenset[tuple[str, bool]], ...] = ()  # the decisions of paths on which the file raises
    notes: dict[str, Any] = field(default_factory=dict)  # what passes tell later ones: fused layouts, transposes

    def values(self, node: cst.CSTNode) -> list[Value]:
        return [v for world in self.worlds for v in world.values.get(node, ())]

    def all_values(self) -> Iterator[list[Value]]:
        return (values for world in self.worlds for values in world.values.values())

    def branches(self, node: cst.CSTNode) -> set[bool]:
        return {b for world in self.worlds for b in world.branches.get(node, ())}

    def calls_of(self, function: cst.FunctionDef) -> list[CallRecord]:
        return [c for world in self.worlds for c in world.calls if c.function.node is function]

    def calls_at(self, site: cst.CSTNode) -> list[CallRecord]:
        return [c for world in self.worlds for c in world.calls if c.site is site]

    @property
    def called(self) -> dict[cst.FunctionDef, None]:
        """Functions of the file that ran on some path (properties of the config class are not of the file)."""
        config = self.program.config_class
        return {
            c.function.node: None
            for world in self.worlds
            for c in world.calls
            if config is None or c.function.owner is not config
        }

    def line(self, node: cst.CSTNode) -> int:
        return line_of(self.program.tree, node)


_POSITIONS: dict[int, tuple[cst.Module, Any]] = {}


def line_of(tree: cst.Module, node: cst.CSTNode) -> int:
    """1-based line of a node, 0 if it is not in the tree."""
    from libcst.metadata import MetadataWrapper, PositionProvider

    if id(tree) not in _POSITIONS:
        wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)
        _POSITIONS.clear()
        _POSITIONS[id(tree)] = (tree, wrapper.resolve(PositionProvider))
    found = _POSITIONS[id(tree)][1].get(node)
    return found.start.line if found else 0
