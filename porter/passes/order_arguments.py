"""Pass arguments by position where they come in the order of the parameters."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.values import Instance
from porter.passes import edit
from porter.passes.base import Pass, Stage


class OrderArguments(Pass):
    """Ports pass tensors by position, as the rest of the runtime does."""

    stage = Stage.FUSE
    flat = True
    reason = "tensors are passed by position"

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        for world in facts.worlds:
            for record in world.calls:
                site = record.site
                if not isinstance(site, cst.Call) or not isinstance(record.receiver, Instance) or site in edits:
                    continue
                if record.function.name != "forward":
                    continue
                params = [p.name.value for p in edit.params_of(record.function.node)][1:]
                named = [a.keyword.value for a in site.args if a.keyword is not None]
                bare = len(site.args) - len(named)
                if named and named == params[bare : bare + len(named)] and not any(a.star for a in site.args):
                    edits[site] = _by_position
        return edit.rewrite(facts.program.tree, edits)


def _by_position(updated: cst.Call) -> cst.Call:
    return updated.with_changes(args=[cst.Arg(a.value) for a in updated.args])
