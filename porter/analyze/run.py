"""One path of a symbolic execution: the state that its parts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq

import libcst as cst

from porter.analyze.facts import World, line_of
from porter.analyze.program import Program
from porter.analyze.values import B, S, Shape, Value
from porter.errors import Refusal


class Infeasible(Exception):
    """This path raises: the file itself rejects such a config. `node` is the statement that does, where known."""

    def __init__(self, node: cst.CSTNode | None = None) -> None:
        self.node = node


class Returned(Exception):
    def __init__(self, value: Value) -> None:
        self.value = value


class Run(ABC):
    """One path being run. `prefix` fixes the first config conditions; later ones are taken to hold."""

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

    @property
    def env(self) -> dict[str, Value]:
        return self.frames[-1]

    def tokens(self) -> Shape:
        """The layout of ids: flat tokens, or batch and sequence."""
        return (B * S,) if self.flat else (B, S)

    def record(self, node: cst.CSTNode, value: Value) -> None:
        self.world.values[node].append(value)

    def _unknown(self, value: Value, node: cst.CSTNode, what: str, why: str) -> Refusal:
        """A refusal that names the first operation not understood, where there is one behind a value."""
        culprits = [v for v in value.walk() if "why" in v.attrs and v.node is not None]
        if not culprits:
            return self.refuse(node, what, f"{why} ({value.op})", "rewrite it in plain torch")
        cause = culprits[-1]
        assert cause.node is not None
        code = " ".join(self.program.tree.code_for_node(cause.node).split())
        return self.refuse(cause.node, code[:90], f"not understood: {cause.attrs['why']}", "rewrite it in plain torch")

    def refuse(self, node: cst.CSTNode | None, what: str, why: str, remedy: str, code: str = "P100") -> Refusal:
        line = line_of(self.program.tree, node) if node is not None else 0
        return Refusal("", line, what, why, remedy, code)

    @abstractmethod
    def eval(self, node: cst.BaseExpression) -> Value: ...

    @abstractmethod
    def call(self, function: Value, args: Seq[Value], kwargs: dict[str, Value], node: cst.CSTNode | None) -> Value: ...

    @abstractmethod
    def attribute(self, base: Value, name: str, node: cst.CSTNode | None) -> Value: ...

    @abstractmethod
    def binary(self, operator: str, left: Value, right: Value, node: cst.CSTNode) -> Value: ...

    @abstractmethod
    def block(self, body: cst.BaseSuite) -> None: ...

    @abstractmethod
    def assign(self, target: cst.BaseExpression, value: Value) -> None: ...

    @abstractmethod
    def iterate(self, value: Value, node: cst.CSTNode) -> tuple[list[Value], bool]:
        """The items to run a loop body with, and whether they stand for an unknown number of turns."""
