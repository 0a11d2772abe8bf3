"""Set layers with states apart: a stand-in takes each one's place while the rest of the file is converted."""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from porter.analyze.facts import Facts, line_of
from porter.analyze.program import ClassInfo, Program
from porter.analyze.values import Mask, Scalar, is_none
from porter.errors import Refusal
from porter.mixers.body import UPDATES, Body, kept_class
from porter.mixers.helpers import kept_helpers
from porter.passes import edit

STATE = "porter.runtime.layers.state"


@dataclass(frozen=True)
class Apart:
    """The layers with states of a file as the port will have them, each after what it needs, and their imports."""

    bodies: dict[str, Body]
    helpers: tuple[cst.BaseStatement, ...]
    imports: dict[str, str]  # local name -> qualified name

    @property
    def definitions(self) -> list[cst.BaseStatement]:
        return [*self.helpers, *(body.definition for body in self.bodies.values())]


def set_apart(tree: cst.Module) -> tuple[cst.Module, Apart]:
    """The file with stand-ins for its layers with states, and these layers.

    A layer is one of them if its own methods update a convolution's or a recurrent state of the cache that its forward
    is given.

    Raises:
        Refusal: such a layer keeps its state in a way that the runtime's states don't have.
    """
    program = Program.read(tree)
    mixers = [info for info in program.classes.values() if _updates_states(info)]
    bodies = {info.name: kept_class(program, info) for info in mixers}
    helpers = kept_helpers(program, bodies)
    if not mixers:
        return tree, Apart({}, (), {})
    edits: dict[cst.CSTNode, edit.Edit] = {info.node: _stand_in(info) for info in mixers}
    marked = edit.add_imports(edit.rewrite(tree, edits), {STATE: ["StateMixer"]})
    return marked, Apart(bodies, helpers, program.imports)


def put_back(tree: cst.Module, apart: Apart) -> cst.Module:
    """The converted file with its layers with states in place of their stand-ins."""
    if not apart.bodies:
        return tree
    present = {s.name.value for s in tree.body if isinstance(s, cst.ClassDef | cst.FunctionDef)}
    first = next(s for s in tree.body if isinstance(s, cst.ClassDef) and s.name.value in apart.bodies)
    helpers = [s for s in apart.helpers if not _clashes(s, present, tree)]
    edits: dict[cst.CSTNode, edit.Edit] = {
        s: _with(apart.bodies[s.name.value].definition, helpers if s is first else [])
        for s in tree.body
        if isinstance(s, cst.ClassDef) and s.name.value in apart.bodies
    }
    after = edit.rewrite(tree, edits)
    return edit.add_imports(_with_imports(after, apart), {STATE: ["StateMixer", "States"]})


def check_calls(facts: Facts, apart: Apart) -> None:
    """Refuse a layer that is given more than hidden states, a cache and masks: what it makes of that is not kept."""
    for world in facts.worlds:
        for record in world.calls:
            body = apart.bodies.get(record.function.owner.name) if record.function.owner is not None else None
            if body is None or record.function.name != "forward":
                continue
            for name in body.dropped:
                value = record.bound.get(name)
                fine = value is None or is_none(value) or isinstance(value, Mask) or _is_off(value)
                if not fine:
                    raise Refusal(
                        "",
                        line_of(facts.program.tree, record.site) if record.site is not None else 0,
                        name,
                        "a layer with a state is given it, and the runtime hands such a layer hidden states only",
                        "compute it inside the layer",
                        "P203",
                    )


def _is_off(value: object) -> bool:
    return isinstance(value, Scalar) and value.known and value.const is False


def _updates_states(info: ClassInfo) -> bool:
    return "forward" in info.methods and any(
        isinstance(node, cst.Attribute) and node.attr.value in UPDATES
        for method in info.methods.values()
        for node in edit.walk(method.node.body)
    )


def _stand_in(info: ClassInfo) -> edit.Edit:
    """A class with the same signatures, whose forward is the runtime's."""
    init, forward = info.methods.get("__init__"), info.methods["forward"]
    first = edit.params_of(forward.node)[1].name.value
    given = ", ".join(p.name.value for p in edit.params_of(init.node)[1:]) if init is not None else ""
    made = [edit.statement(f"super().__init__({given})")]
    result = [edit.statement(f"return super().forward({first}, attn_metadata)")]

    def change(updated: cst.CSTNode) -> cst.CSTNode:
        assert isinstance(updated, cst.ClassDef)
        methods = [_with_body(m.node, body) for m, body in ((init, made), (forward, result)) if m is not None]
        return updated.with_changes(
            bases=[cst.Arg(cst.Name("StateMixer"))], decorators=[], body=cst.IndentedBlock(methods)
        )

    return change


def _with_body(node: cst.FunctionDef, body: list[cst.SimpleStatementLine]) -> cst.FunctionDef:
    """The function with another body; what annotates further keywords would keep its import."""
    star = node.params.star_kwarg
    params = node.params.with_changes(star_kwarg=star.with_changes(annotation=None) if star is not None else None)
    return node.with_changes(params=params, body=cst.IndentedBlock(body), decorators=[])


def _with(definition: cst.ClassDef, helpers: list[cst.BaseStatement]) -> edit.Edit:
    return lambda updated: cst.FlattenSentinel([*helpers, definition])


def _clashes(statement: cst.BaseStatement, present: set[str], tree: cst.Module) -> bool:
    """Whether the converted file has the same definition already.

    Raises:
        Refusal: it has another one of that name.
    """
    name = getattr(getattr(statement, "name", None), "value", None)
    if name not in present:
        return False
    there = next(s for s in tree.body if isinstance(s, cst.ClassDef | cst.FunctionDef) and s.name.value == name)
    if _plain(there) == _plain(statement):
        return True
    raise Refusal(
        "",
        0,
        str(name),
        "layers with states and the rest of the file both use it, and the conversion changed it for the rest",
        "give the layers with states a copy of their own",
        "P203",
    )


def _plain(statement: cst.CSTNode) -> str:
    return edit.code(statement.with_changes(leading_lines=[]))


def _with_imports(tree: cst.Module, apart: Apart) -> cst.Module:
    """Import what the layers read and the file does not define."""
    read: set[str] = set().union(*(_all_names(s) for s in apart.definitions))
    wanted: dict[str, list[str]] = {}
    plain: list[str] = []
    known = set(Program.read(tree).imports)
    for local, full in apart.imports.items():
        full = full.replace("..", ".")
        if local not in read or local in known:
            continue
        module, _, name = full.rpartition(".")
        if module and name == local:
            wanted.setdefault(module, []).append(name)
        else:
            plain.append(f"import {full}" if full == local else f"import {full} as {local}")
    tree = tree.with_changes(body=[*(edit.statement(line) for line in plain), *tree.body])
    runtime = {"porter.runtime.layers.activation": ["get_act_fn"]} if "get_act_fn" in read else {}
    return edit.add_imports(tree, wanted | runtime)


def _all_names(node: cst.CSTNode) -> set[str]:
    return {n.value for n in edit.walk(node) if isinstance(n, cst.Name)}
