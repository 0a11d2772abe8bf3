"""Write the signatures, docstrings and attributes of a port: plain types, no text about arguments that are gone."""

from __future__ import annotations

import libcst as cst

from porter.analyze.facts import Facts
from porter.analyze.library_layers import ACTIVATION_NAMES
from porter.analyze.program import Program
from porter.analyze.values import Scalar, Tensor
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

TYPES = {
    "kv_caches": "list[torch.Tensor]",
    "attn_metadata": "AttentionMetadata",
    "config": "PretrainedConfig",
    "linear_method": "LinearMethod | None",
    "positions": "torch.Tensor",
    "kv_cache": "torch.Tensor",
    "input_ids": "torch.Tensor",
}
IMPORTS = {
    "AttentionMetadata": "porter.runtime.metadata",
    "PretrainedConfig": "transformers",
    "LinearMethod": "porter.runtime.layers.linear",
}
PLAIN = frozenset({"int", "float", "bool", "str"})


_BEFORE = '''\
import torch
from torch import nn
from transformers.activations import ACT2FN


class OakForCausalLM(nn.Module):
    """Oak with a head.

    Args:
        config: the config.
    """

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, input_ids, positions):
        """Embeds."""
        return self.act(self.embed(input_ids)) * self.config.scale
'''
_AFTER = '''\
import torch
from torch import nn
from transformers.activations import ACT2FN
from porter.runtime.layers.activation import get_act_fn
from transformers import PretrainedConfig


class OakForCausalLM(nn.Module):
    """Oak with a head."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.act = get_act_fn(config.hidden_act)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.act(self.embed(input_ids)) * self.config.scale
'''


class WriteSignatures(Pass):
    """A port's types are tensors, the config and the runtime's own; docstrings say what still holds."""

    stage = Stage.FUSE
    flat = True
    reason = "signatures and docstrings say what the port takes"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        imports: dict[str, set[str]] = {}
        for function in facts.called:
            if function.name.value != "<lambda>" and not _is_nested(facts, function):
                edits[function] = _signature(facts, function, imports)
        for info in facts.program.classes.values():
            edits[info.node] = _class_docstring
        tree = edit.rewrite(facts.program.tree, edits)
        tree = _config_attributes(facts, tree)
        tree = _activations(tree, imports)
        return edit.add_imports(tree, imports)


def _is_nested(facts: Facts, function: cst.FunctionDef) -> bool:
    return not any(
        function in (m.node for m in c.methods.values()) for c in facts.program.classes.values()
    ) and function not in (f.node for f in facts.program.functions.values())


def _signature(facts: Facts, function: cst.FunctionDef, imports: dict[str, set[str]]) -> edit.Edit:
    records = facts.calls_of(function)
    returns = "torch.Tensor" if records and all(isinstance(r.result, Tensor) for r in records) else ""
    types = {
        p.name.value: _type(function, p, [r.bound.get(p.name.value) for r in records], imports)
        for p in edit.params_of(function)
        if p.name.value not in ("self", "cls", "ctx")
    }

    def change(updated: cst.FunctionDef) -> cst.FunctionDef:
        params = [_typed(p, types.get(p.name.value, ""), updated.name.value) for p in updated.params.params]
        if params:
            params[-1] = params[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        annotation = cst.Annotation(edit.parse(returns)) if returns else None
        body = updated.body if isinstance(updated.body, cst.SimpleStatementSuite) else _without_docstring(updated.body)
        return updated.with_changes(
            params=updated.params.with_changes(params=params),
            returns=annotation,
            body=body,
            whitespace_before_params=cst.SimpleWhitespace(""),
        )

    return change


def _type(function: cst.FunctionDef, param: cst.Param, bound: list[object], imports: dict[str, set[str]]) -> str:
    name = param.name.value
    if name in TYPES:
        for imported, module in IMPORTS.items():
            if imported in TYPES[name]:
                imports.setdefault(module, set()).add(imported)
        return TYPES[name]
    if bound and all(isinstance(v, Tensor) for v in bound):
        return "torch.Tensor"
    if bound and all(isinstance(v, Scalar) and v.op == "index" for v in bound):
        return "int"
    written = edit.code(param.annotation.annotation) if param.annotation is not None else ""
    return written if written in PLAIN else ""


def _typed(param: cst.Param, kind: str, function: str) -> cst.Param:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    changes: dict[str, object] = {
        "annotation": cst.Annotation(edit.parse(kind)) if kind else None,
        "comma": comma,
        "whitespace_after_param": cst.SimpleWhitespace(""),
    }
    if function == "forward" and param.name.value != "self":
        changes |= {"default": None, "equal": cst.MaybeSentinel.DEFAULT}
    if param.default is not None and function != "forward":
        changes["equal"] = cst.AssignEqual()
    return param.with_changes(**changes)


def _without_docstring(body: cst.BaseSuite) -> cst.BaseSuite:
    statements = list(body.body)
    if len(statements) > 1 and _docstring(statements[0]) is not None:
        statements.pop(0)
    first = statements[0]
    if isinstance(first, cst.SimpleStatementLine | cst.BaseCompoundStatement):
        comments = [x for x in first.leading_lines if x.comment is not None]
        statements[0] = first.with_changes(leading_lines=comments)
    return body.with_changes(body=statements)


def _docstring(statement: cst.CSTNode) -> str | None:
    if isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Expr):
        value = statement.body[0].value
        if isinstance(value, cst.SimpleString):
            return str(value.evaluated_value)
    return None


def _class_docstring(updated: cst.ClassDef) -> cst.ClassDef:
    """Keep the first paragraph of a class docstring; the rest describes arguments and outputs that are gone."""
    first = updated.body.body[0]
    text = _docstring(first)
    if text is None:
        return updated
    lead = " ".join(text.strip().split("\n\n")[0].split()).replace("[`", "`").replace("`]", "`")
    if "Args:" in lead or not lead:
        return updated.with_changes(
            body=updated.body.with_changes(body=updated.body.body[1:] or [cst.SimpleStatementLine([cst.Pass()])])
        )
    kept = edit.statement(f'"""{lead}"""')
    return updated.with_changes(body=updated.body.with_changes(body=[kept, *updated.body.body[1:]]))


class _Config(cst.CSTTransformer):
    """Set `self.config` where a class reads it outside of __init__."""

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.ClassDef:
        text = edit.code(updated_node)
        if "self.config" not in text or "self.config = " in text:
            return updated_node
        body = [
            self._init(s) if isinstance(s, cst.FunctionDef) and s.name.value == "__init__" else s
            for s in updated_node.body.body
        ]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))

    def _init(self, node: cst.FunctionDef) -> cst.FunctionDef:
        lines = list(node.body.body)
        place = next((i + 1 for i, s in enumerate(lines) if "super().__init__" in edit.code(s)), 0)
        lines.insert(place, edit.statement("self.config = config"))
        return node.with_changes(body=node.body.with_changes(body=lines))


def _config_attributes(facts: Facts, tree: cst.Module) -> cst.Module:
    result = tree.visit(_Config())
    assert isinstance(result, cst.Module)
    return result


class _Activations(cst.CSTTransformer):
    """`ACT2FN[name]`, `ACT2CLS[name]()`, `get_activation(name)` and a function of the library are `get_act_fn(name)`.

    `imported` are the file's names for what it has of transformers.activations.
    """

    def __init__(self, imported: dict[str, str]) -> None:
        super().__init__()
        self.imported = imported
        self.found = False

    def _made(self, name: str) -> cst.BaseExpression:
        self.found = True
        return edit.parse(f"get_act_fn({name})")

    def leave_Subscript(self, original_node: cst.Subscript, updated_node: cst.Subscript) -> cst.BaseExpression:
        if self.imported.get(edit.code(updated_node.value)) not in ("ACT2FN", "ACT2CLS"):
            return updated_node
        return self._made(edit.code(updated_node.slice[0].slice))

    def _function(self, node: cst.BaseExpression) -> cst.BaseExpression:
        """An activation that is not called here but kept: in a table, or one of two."""
        name = self.imported.get(node.value, "") if isinstance(node, cst.Name) else ""
        return self._made(f'"{ACTIVATION_NAMES.get(name, name)}"') if name.islower() else node

    def leave_DictElement(self, original_node: cst.DictElement, updated_node: cst.DictElement) -> cst.DictElement:
        return updated_node.with_changes(value=self._function(updated_node.value))

    def leave_IfExp(self, original_node: cst.IfExp, updated_node: cst.IfExp) -> cst.IfExp:
        body, orelse = self._function(updated_node.body), self._function(updated_node.orelse)
        return updated_node.with_changes(body=body, orelse=orelse)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        function = original_node.func
        if isinstance(function, cst.Subscript) and self.imported.get(edit.code(function.value)) == "ACT2CLS":
            return updated_node.func
        name = self.imported.get(edit.code(function), "")
        if name == "get_activation":
            return self._made(edit.code(updated_node.args[0].value))
        if name.islower():
            self.found = True
            return updated_node.with_changes(func=edit.parse(f'get_act_fn("{ACTIVATION_NAMES.get(name, name)}")'))
        return updated_node


def _activations(tree: cst.Module, imports: dict[str, set[str]]) -> cst.Module:
    home = "transformers.activations."
    change = _Activations(
        {k: v.removeprefix(home) for k, v in Program.read(tree).imports.items() if v.startswith(home)}
    )
    result = tree.visit(change)
    assert isinstance(result, cst.Module)
    if change.found:
        imports.setdefault("porter.runtime.layers.activation", set()).add("get_act_fn")
    return result
