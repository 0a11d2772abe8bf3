"""New parameters of a function, and where they go."""

from __future__ import annotations

import libcst as cst

from porter.passes import edit

EQUAL = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))


def with_params(names: list[str]) -> edit.Edit:
    def change(updated: cst.FunctionDef) -> cst.FunctionDef:
        params = list(updated.params.params)
        first = positions_place([p.name.value for p in params])
        comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        params = [p.with_changes(comma=comma, default=None, equal=cst.MaybeSentinel.DEFAULT) for p in params]
        for name in names:
            place = first if name == "positions" else len(params)
            params.insert(place, cst.Param(cst.Name(name), comma=comma))
        params[-1] = params[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(params=updated.params.with_changes(params=params))

    return change


def positions_place(params: list[str]) -> int:
    """Where `positions` goes: after the token ids if there are any, else first."""
    if "input_ids" in params:
        return params.index("input_ids") + 1
    return 1 if params[:1] == ["self"] else 0
