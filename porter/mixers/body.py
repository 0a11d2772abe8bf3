"""The class of a layer with states as a port keeps it: its own arithmetic, over the runtime's states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import libcst as cst

from porter.analyze.facts import line_of
from porter.analyze.program import ClassInfo, Program
from porter.errors import Refusal
from porter.mixers.fold import fold
from porter.passes import edit
from porter.passes.drop_unreached import KEPT_DECORATORS

UPDATES = frozenset({"update_conv_state", "update_recurrent_state"})
READS = frozenset({"conv_states", "recurrent_states"})
_OF_MODULES = frozenset({"training", "register_buffer", "register_parameter", "register_module", "add_module"})


@dataclass(frozen=True)
class Body:
    """A layer with states: its class in the port, the parameters of forward that it lost there, and what it was."""

    definition: cst.ClassDef
    dropped: tuple[str, ...]
    original: cst.ClassDef
    line: int


def kept_class(program: Program, info: ClassInfo) -> Body:
    """The class as a StateMixer: forward becomes `mix`, the cache becomes `states`, what serving fixes is folded.

    Raises:
        Refusal: its forward uses the cache in a way that the runtime's states don't have.
    """
    forward = info.methods["forward"].node
    cache = _cache_name(program, info, forward)
    params = [p.name.value for p in edit.params_of(forward)]
    hidden, dropped = params[1], tuple(p for p in params[2:] if p != cache)
    known = {"self.training": "False", **dict.fromkeys(dropped, "None"), **_unavailable(program)}
    _check_unassigned(program, forward, [*dropped, cache])
    mixed = forward.visit(_OnStates(cache, _star(forward)))
    assert isinstance(mixed, cst.FunctionDef)
    mixed = _mix_signature(fold(mixed, known, frozenset({"states"})), hidden)
    methods = {name: method.node for name, method in info.methods.items() if name != "forward"}
    methods = {name: fold(node, known) for name, node in methods.items() if not _sets_weights(program, node)}
    methods["forward"] = mixed
    definition = _class(program, info, _called(methods), {*info.methods} - set(methods), _resumes(mixed))
    _check_states(program, info, definition)
    _check_attributes(program, info, definition)
    return Body(definition, dropped, info.node, line_of(program.tree, info.node))


def _cache_name(program: Program, info: ClassInfo, forward: cst.FunctionDef) -> str:
    """The parameter whose states the forward updates."""
    names = {
        node.value.value
        for node in edit.walk(forward.body)
        if isinstance(node, cst.Attribute) and node.attr.value in UPDATES and isinstance(node.value, cst.Name)
    }
    params = [p.name.value for p in edit.params_of(forward)]
    plain = [b for b in info.bases if b.rsplit(".", 1)[-1] != "Module"]
    if len(names) != 1 or not names <= set(params[2:]) or plain:
        raise _refusal(program, info.node, info.name, "its state is not updated by its own forward, in the cache given")
    return names.pop()


def _check_unassigned(program: Program, forward: cst.FunctionDef, names: list[str]) -> None:
    for node in edit.walk(forward.body):
        for target in edit.targets(node) if isinstance(node, cst.Assign | cst.AugAssign) else []:
            if isinstance(target, cst.Name) and target.value in names:
                raise _refusal(program, node, target.value, "a layer with a state assigns an input that serving fixes")


def _check_states(program: Program, info: ClassInfo, definition: cst.ClassDef) -> None:
    """Refuse a body that uses more of the cache than the runtime's states have."""
    allowed = UPDATES | READS | {"has_previous_state"}
    used = {
        node.attr.value
        for node in edit.walk(definition)
        if isinstance(node, cst.Attribute) and edit.code(node.value) == "states"
    }
    if used - allowed:
        what = f"cache.{sorted(used - allowed)[0]}"
        raise _refusal(program, info.methods["forward"].node, what, "the runtime's states have no such thing")


def _check_attributes(program: Program, info: ClassInfo, definition: cst.ClassDef) -> None:
    """Refuse a body that reads what its own class never sets: another class may set it, and that is not kept."""
    methods = {s.name.value for s in definition.body.body if isinstance(s, cst.FunctionDef)}
    known = {*info.constants, *methods, *_OF_MODULES, *_attributes_set(definition)}
    for node in edit.walk(definition):
        if isinstance(node, cst.Attribute) and edit.code(node.value) == "self" and node.attr.value not in known:
            what = f"self.{node.attr.value}"
            told = "a layer with a state reads it, and no method of its class that the port keeps sets it"
            raise Refusal("", _line_reading(program, info, what), what, told, "set it in __init__ of the layer", "P203")


def _line_reading(program: Program, info: ClassInfo, what: str) -> int:
    found = [n for n in edit.walk(info.node) if isinstance(n, cst.Attribute) and edit.code(n) == what]
    return line_of(program.tree, found[0] if found else info.node)


def _attributes_set(definition: cst.ClassDef) -> set[str]:
    """Attributes that methods assign to `self` or register there."""
    found: set[str] = set()
    for node in edit.walk(definition):
        if isinstance(node, cst.Assign | cst.AnnAssign | cst.AugAssign):
            leaves = [x for target in edit.targets(node) for x in edit.leaves(target)]
            own = [x for x in leaves if isinstance(x, cst.Attribute) and edit.code(x.value) == "self"]
            found |= {x.attr.value for x in own}
        elif isinstance(node, cst.Call) and edit.code(node.func) in {f"self.{name}" for name in _OF_MODULES}:
            first = node.args[0].value if node.args else None
            found |= {str(first.evaluated_value)} if isinstance(first, cst.SimpleString) else set()
    return found


def _refusal(program: Program, node: cst.CSTNode, what: str, why: str) -> Refusal:
    line = line_of(program.tree, node)
    return Refusal("", line, what, why, "keep the state by the calls that `porter explain P203` names", "P203")


def _unavailable(program: Program) -> dict[str, str]:
    """Checks for optional packages and for tracing: a port has torch alone and runs eagerly."""
    starts = ("is_mambapy", "is_torchdynamo", "is_causal_conv", "is_mamba", "is_flash", "is_kernels", "is_fla")
    return {f"{name}()": "False" for name in program.imports if name.startswith(starts)}


def _star(forward: cst.FunctionDef) -> str:
    return forward.params.star_kwarg.name.value if forward.params.star_kwarg is not None else ""


class _OnStates(cst.CSTTransformer):
    """Cache calls of a layer become those of its states; further keywords of the forward are none."""

    def __init__(self, cache: str, star: str) -> None:
        super().__init__()
        self.cache, self.star = cache, star

    def leave_Subscript(self, original_node: cst.Subscript, updated_node: cst.Subscript) -> Any:
        return cst.Name(self.cache) if edit.code(original_node.value) == f"{self.cache}.layers" else updated_node

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> Any:
        return cst.Name("False") if updated_node.attr.value == "record_past" else updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> Any:
        func = updated_node.func
        if self.star and any(a.star == "**" and edit.code(a.value) == self.star for a in updated_node.args):
            kept = [a for a in updated_node.args if not (a.star == "**" and edit.code(a.value) == self.star)]
            updated_node = updated_node.with_changes(args=_spaced(kept))
        if not isinstance(func, cst.Attribute) or not isinstance(func.value, cst.Name):
            return updated_node
        if func.value.value == self.star and func.attr.value in ("get", "pop"):
            return updated_node.args[1].value if len(updated_node.args) > 1 else cst.Name("None")
        if func.value.value != self.cache:
            return updated_node
        if func.attr.value == "has_previous_state":
            return func
        if func.attr.value in UPDATES:
            places = [a for a in updated_node.args if a.keyword is None]
            layer = places[1:2] or [a for a in updated_node.args if a.keyword and a.keyword.value == "layer_idx"]
            return updated_node.with_changes(args=_spaced([a for a in updated_node.args if a not in layer]))
        return updated_node

    def leave_FunctionDef(self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef) -> cst.FunctionDef:
        after = updated_node.visit(_Renamed(self.cache, "states"))
        assert isinstance(after, cst.FunctionDef)
        return after


def _spaced(args: list[cst.Arg]) -> list[cst.Arg]:
    clean = cst.SimpleWhitespace("")
    return [a.with_changes(comma=cst.MaybeSentinel.DEFAULT, whitespace_after_arg=clean) for a in args]


class _Renamed(cst.CSTTransformer):
    def __init__(self, old: str, new: str) -> None:
        super().__init__()
        self.old, self.new = old, new

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        return updated_node.with_changes(value=self.new) if updated_node.value == self.old else updated_node


def _mix_signature(forward: cst.FunctionDef, hidden: str) -> cst.FunctionDef:
    header = cst.parse_statement(f"def mix(self, {hidden}: torch.Tensor, states: States) -> torch.Tensor:\n    pass\n")
    assert isinstance(header, cst.FunctionDef)
    return header.with_changes(body=forward.body, leading_lines=forward.leading_lines)


def _sets_weights(program: Program, method: cst.FunctionDef) -> bool:
    """Whether a method only gives parameters their first values, which a checkpoint replaces."""
    if method.name.value in ("__init__", "forward"):
        return False
    modules = {n for n, full in program.imports.items() if full.endswith((".initialization", "torch.nn.init"))}
    return bool(edit.names_read(method.body) & modules) or ".init." in edit.code(method)


def _called(methods: dict[str, cst.FunctionDef]) -> dict[str, cst.FunctionDef]:
    """Methods that `__init__` and `forward` reach."""
    reached: dict[str, cst.FunctionDef] = {}
    todo = ["__init__", "forward"]
    while todo:
        name = todo.pop()
        if name in methods and name not in reached:
            reached[name] = methods[name]
            todo += [n.attr.value for n in edit.walk(methods[name]) if isinstance(n, cst.Attribute)]
    return {name: node for name, node in methods.items() if name in reached}


def _resumes(mix: cst.FunctionDef) -> bool:
    """Whether a forward of several tokens starts from the given state: what it updates in that branch, it also reads.

    A convolution's update gives the inputs with those before them.
    """
    several = fold(mix, {f"{name} == 1": "False" for name in _length_names(mix)})
    attributes = [n for n in edit.walk(several) if isinstance(n, cst.Attribute) and edit.code(n.value) == "states"]
    names = {n.attr.value for n in attributes}
    returned = "update_conv_state" not in names or any(
        isinstance(n, cst.Assign) and edit.code(n.value).startswith("states.update_conv_state")
        for n in edit.walk(several)
    )
    return returned and ("update_recurrent_state" not in names or "recurrent_states" in names)


def _length_names(mix: cst.FunctionDef) -> set[str]:
    return {n.value for n in edit.walk(mix.body) if isinstance(n, cst.Name) and "len" in n.value}


def _class(
    program: Program, info: ClassInfo, methods: dict[str, cst.FunctionDef], gone: set[str], resumes: bool
) -> cst.ClassDef:
    body: list[cst.BaseStatement] = []
    for statement in info.node.body.body:
        if isinstance(statement, cst.FunctionDef) and statement.name.value in methods:
            body.append(_plain(methods[statement.name.value], gone))
        elif isinstance(statement, cst.SimpleStatementLine):
            body.append(statement)
    if resumes:
        place = 1 if body and isinstance(body[0], cst.SimpleStatementLine) and '"""' in edit.code(body[0]) else 0
        body.insert(place, edit.statement("resumes = True"))
    bases = [cst.Arg(cst.Name("StateMixer"))]
    return info.node.with_changes(bases=bases, decorators=[], body=cst.IndentedBlock(body))


def _plain(method: cst.FunctionDef, gone: set[str]) -> cst.FunctionDef:
    """A method without decorators of the library, activations by the runtime's names, and without calls of `gone`."""
    kept = [d for d in method.decorators if edit.code(d.decorator) in KEPT_DECORATORS]
    after = method.with_changes(decorators=kept).visit(_Plain(gone))
    assert isinstance(after, cst.FunctionDef)
    return fold(after, {})


class _Plain(cst.CSTTransformer):
    def __init__(self, gone: set[str]) -> None:
        super().__init__()
        self.gone = gone

    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        """Configs by the name that ports use; no annotation that needs the library."""
        read = edit.names_read(updated_node.annotation.annotation) if updated_node.annotation is not None else set()
        if any(name.endswith("Config") for name in read):
            return updated_node.with_changes(annotation=cst.Annotation(cst.Name("PretrainedConfig")))
        plain = read <= {"torch", "nn", "int", "float", "bool", "str", "tuple", "list", "dict", "None", "States"}
        return updated_node if plain else updated_node.with_changes(annotation=None)

    def leave_Subscript(self, original_node: cst.Subscript, updated_node: cst.Subscript) -> Any:
        if edit.code(updated_node.value) != "ACT2FN":
            return updated_node
        index = updated_node.slice[0].slice
        assert isinstance(index, cst.Index)
        return cst.Call(cst.Name("get_act_fn"), [cst.Arg(index.value)])

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> Any:
        small = updated_node.body[0]
        call = small.value if isinstance(small, cst.Expr) else None
        if isinstance(call, cst.Call) and edit.code(call.func) in {f"self.{name}" for name in self.gone}:
            return updated_node.with_changes(body=[cst.Pass()])
        return updated_node
