"""The functions, classes and constants of a file that its layers with states read."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.analyze.program import Program
from porter.mixers.body import Body, _Plain, _unavailable
from porter.mixers.fold import fold
from porter.passes import edit
from porter.passes.drop_unreached import KEPT_DECORATORS


def kept_helpers(program: Program, bodies: Mapping[str, Body]) -> tuple[cst.BaseStatement, ...]:
    """What the layers read of the file, and what that reads in turn, in the file's order."""
    defined = _definitions(program)
    wanted: dict[str, cst.BaseStatement] = {}
    todo = [n for body in bodies.values() for n in _names(body.definition)]
    while todo:
        name = todo.pop()
        if name in defined and name not in wanted and name not in bodies:
            wanted[name] = _kept(program, defined[name])
            todo += _names(wanted[name])
    return tuple(wanted[name] for name in defined if name in wanted)


def _definitions(program: Program) -> dict[str, cst.BaseStatement]:
    """Functions, classes and constants by name; a constant's statement is written anew."""
    found: dict[str, cst.BaseStatement] = {}
    found |= {n: edit.statement(f"{n} = {edit.code(v)}") for n, v in program.constants.items()}
    found |= {n: f.node for n, f in program.functions.items()} | {n: c.node for n, c in program.classes.items()}
    return found


def _kept(program: Program, statement: cst.BaseStatement) -> cst.BaseStatement:
    if isinstance(statement, cst.SimpleStatementLine):
        return statement
    plain = statement.visit(_Undecorated(_unavailable(program)))
    assert isinstance(plain, cst.FunctionDef | cst.ClassDef)
    return plain


class _Undecorated(_Plain):
    def __init__(self, known: dict[str, str]) -> None:
        super().__init__(set())
        self.known = known | {"self.training": "False"}

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        kept = [d for d in updated_node.decorators if edit.code(d.decorator) in KEPT_DECORATORS]
        return fold(updated_node.with_changes(decorators=kept), self.known)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        return updated_node.with_changes(decorators=[])


def _names(node: cst.CSTNode) -> list[str]:
    return list(edit.names_read(node))
