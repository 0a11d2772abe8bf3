"""One seeded fault, and the few ways in which faults are written down."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst

from porter.verify.faults.mutate import Edit, Place, Site, code, one_of, sites

Mutation = Callable[[str], Iterator[Site]]  # the text of a port -> each place where the fault fits

ATTENTION = one_of("PagedAttention", "PagedAttentionWithRoPE", "PagedAttentionWithALiBi")
ROPE = one_of("PagedAttentionWithRoPE")
ROW = one_of("RowParallelLinear")


def LINEARS(name: str) -> bool:
    """The runtime's linear layers."""
    return name.endswith("Linear") and not name.startswith("nn.")


def NORMS(name: str) -> bool:
    """Norms, the port's own included."""
    return name.endswith("Norm")


@dataclass(frozen=True)
class Fault:
    """`family` is its class in the table; `causes` are words of which the suggested cause must have one."""

    name: str
    family: str
    mutate: Mutation
    causes: tuple[str, ...]
    dtype: str = "float32"  # where the fault shows; half precision only for faults of rounding


def edited(edit: Edit, helper: str = "") -> Mutation:
    """A fault that changes one expression."""
    return lambda text: sites(text, edit, helper)


def replaced(matches: Callable[[cst.BaseExpression, Place], bool], change: Callable[[str], str | None]) -> Mutation:
    """A fault that changes the source of expressions that match."""
    return edited(lambda node, place: change(code(node)) if matches(node, place) else None)


def dropped_operand(wanted: Callable[[cst.BaseExpression, Place], bool], *operators: type) -> Mutation:
    """A fault that loses one operand (`wanted`) of a sum or product."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        if not isinstance(node, cst.BinaryOperation) or not isinstance(node.operator, operators):
            return None
        if place.method == "__init__":
            return None
        if wanted(node.right, place):
            return code(node.left)
        commutes = isinstance(node.operator, cst.Add | cst.Multiply)
        return code(node.right) if commutes and wanted(node.left, place) else None

    return edited(edit)


def rules(name: str, change: Callable[[str], str | None]) -> Mutation:
    """A fault in entry `name` of a port's weight rules; a changed entry of None is left out."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        given = _rules(node)
        changed = change(given[name]) if name in given else None
        if changed is None or changed == given[name]:
            return None
        entries = {**given, name: changed}
        return f"WeightRules({', '.join(f'{key}={value}' for key, value in entries.items() if value)})"

    def mutate(text: str) -> Iterator[Site]:
        for site in sites(text, edit):
            before, after = (_entry(each, name) for each in (text, site.text))
            yield Site(site.text, "", "|".join(_changed_names(before, after)))

    return mutate


def _rules(node: cst.CSTNode) -> dict[str, str]:
    """The entries of a port's weight rules, as source; none for other expressions."""
    if not isinstance(node, cst.Call) or code(node.func) != "WeightRules":
        return {}
    return {arg.keyword.value: code(arg.value) for arg in node.args if arg.keyword}


def _entry(text: str, name: str) -> Any:
    call = next(
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "WeightRules"
    )
    return next((ast.literal_eval(each.value) for each in call.keywords if each.arg == name), {})


def _changed_names(before: Any, after: Any) -> list[str]:
    if isinstance(before, dict):
        return [name for name in before if before[name] != dict(after).get(name)]
    return [name for name in before if name not in after]


def loaded(helper: str, module: str, needs: str = "") -> Mutation:
    """A fault in loading: `helper` defines `faulty(weights)`, which gives other tensors; `module` is what they fill.

    Only for ports whose text has `needs`.
    """

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        if not isinstance(node, cst.Call) or code(node.func) != "load_weights" or len(node.args) < 2:
            return None
        args = [code(arg.value) for arg in node.args]
        return f"load_weights({args[0]}, faulty({args[1]}), {', '.join(args[2:])})"

    def mutate(text: str) -> Iterator[Site]:
        for site in sites(text, edit, helper) if needs in text else ():
            yield Site(site.text, "", module)

    return mutate
