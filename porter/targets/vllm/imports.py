"""Which runtime name becomes which name of vLLM where nothing else about its use changes, as data."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.analyze.program import full_name
from porter.passes import edit

LAYERS = "vllm.model_executor.layers"
LINEAR = f"{LAYERS}.linear"
EMBEDDING = f"{LAYERS}.vocab_parallel_embedding"


def drop_imports(tree: cst.Module, names: Mapping[str, str]) -> cst.Module:
    """The tree without the imports of `names` (local name -> module)."""
    edits: dict[cst.CSTNode, edit.Edit] = {}
    for node in edit.walk(tree):
        if isinstance(node, cst.ImportFrom) and not isinstance(node.names, cst.ImportStar):
            module = full_name(node.module)
            kept = [a for a in node.names if names.get(full_name(a.name)) != module]
            if not kept:
                edits[node] = edit.remove
            elif len(kept) < len(node.names):
                kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
                edits[node] = _naming(kept)
    return edit.rewrite(tree, edits)


def _naming(kept: list[cst.ImportAlias]) -> edit.Edit:
    return lambda updated: updated.with_changes(names=kept)


def used(tree: cst.Module, module: str) -> set[str]:
    """The names that a tree imports from `module`."""
    return {
        full_name(alias.name)
        for node in edit.walk(tree)
        if isinstance(node, cst.ImportFrom) and not isinstance(node.names, cst.ImportStar)
        if full_name(node.module) == module
        for alias in node.names
    }
