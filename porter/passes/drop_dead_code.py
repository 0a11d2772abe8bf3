"""Drop assignments that nothing reads, attributes that no reached method uses, and calls made only for their effect on
training, logging or the cache."""

from __future__ import annotations

import libcst as cst

from porter.analyze import scalars
from porter.analyze.facts import Facts
from porter.analyze.values import Scalar, Value
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage, Unchanged

# Attributes that the engine, not the file, reads from a port.
ENGINE_ATTRIBUTES = frozenset({"sampler", "config", "weight_rules", "lm_head", "model"})


_BEFORE = """\
import logging

from torch import nn

logger = logging.getLogger(__name__)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_labels = config.num_labels
        self._embed(config)

    def _embed(self, config):
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        return self.embed

    def forward(self, input_ids):
        length = input_ids.shape[-1]
        logger.info("called")
        return self.embed(input_ids)
"""
_AFTER = (
    _BEFORE.replace(
        "        self.num_labels = config.num_labels\n",
        "",
    )
    .replace(
        """\
        length = input_ids.shape[-1]
        logger.info("called")
""",
        """\
""",
    )
    .replace("        return self.embed\n", "")
)
_UNCHANGED = """\
from torch import nn


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        hidden_states.mul_(2.0)
        return hidden_states
"""


class DropDeadCode(Pass):
    """What only caching, masking, training or outputs needed is gone without a trace."""

    stage = Stage.STRIP
    reason = "nothing reads the result at inference"
    EXAMPLES = (Example(_BEFORE, _AFTER),)
    UNCHANGED = (Unchanged(_UNCHANGED, "an operation in place changes a value that is read later"),)

    def apply(self, facts: Facts) -> cst.Module:
        edits: dict[cst.CSTNode, edit.Edit] = {}
        reads = _attribute_reads(facts)
        for function in facts.called:
            owner = next((c.function.owner for w in facts.worlds for c in w.calls if c.function.node is function), None)
            edits.update(_Liveness(facts, function, reads[owner.name] if owner is not None else set()).edits)
        return edit.rewrite(facts.program.tree, edits)


def _attribute_reads(facts: Facts) -> dict[str, set[str]]:
    """For every class, the attributes that anything reads of its instances or of those of a subclass."""
    found: dict[str, set[str]] = {name: set() for name in facts.program.classes}
    for world in facts.worlds:
        for name, attribute in world.attribute_reads:
            for info in facts.program.mro(facts.program.classes[name]):
                found[info.name].add(attribute)
    return found


def live_at_entry(facts: Facts, function: cst.FunctionDef) -> set[str]:
    """Names that a function reads before it binds them."""
    return _Liveness(facts, function, None).live


class _Liveness:
    """Backward liveness over one function; loops are taken twice, branches joined."""

    def __init__(self, facts: Facts, function: cst.FunctionDef, reads: set[str] | None) -> None:
        self.facts = facts
        self.reads = reads
        self.edits: dict[cst.CSTNode, edit.Edit] = {}
        self.keep: set[cst.CSTNode] = set()
        self.is_init = function.name.value == "__init__"
        self.result_is_read = _result_is_read(facts, function)
        self.last = edit.lines(function)[-1].body[-1] if function.body.body[-1] in edit.lines(function) else None
        self.live = self._block(function.body, set(), is_function=True)
        self.edits = {n: e for n, e in self.edits.items() if n not in self.keep}

    def _is_read(self, attribute: str) -> bool:
        return self.reads is None or attribute in self.reads

    def _block(self, body: cst.BaseSuite, live: set[str], is_function: bool = False) -> set[str]:
        statements = list(body.body)
        for position in range(len(statements) - 1, -1, -1):
            node = statements[position]
            first = is_function and position == 0
            if isinstance(node, cst.SimpleStatementLine):
                for small in reversed(node.body):
                    live = self._small(small, live, first)
            else:
                live = self._compound(node, live)
        return live

    def _compound(self, node: cst.CSTNode, live: set[str]) -> set[str]:
        if isinstance(node, cst.If):
            return self._if(node, live)
        if isinstance(node, cst.For):
            inside = self._block(node.body, set(live))
            inside = self._block(node.body, live | inside)
            bound = {t.value for t in edit.leaves(node.target) if isinstance(t, cst.Name)}
            return live | (inside - bound) | edit.names_read(node.iter)
        if isinstance(node, cst.With):
            live = self._block(node.body, live)
            return live.union(*[edit.names_read(i) for i in node.items])
        if isinstance(node, cst.Try):
            return live | self._block(node.body, live)
        return live | edit.names_read(node)

    def _if(self, node: cst.If, live: set[str]) -> set[str]:
        after = set(live)
        result = self._block(node.body, set(after))
        if isinstance(node.orelse, cst.If):
            result |= self._if(node.orelse, set(after))
        elif node.orelse is not None:
            result |= self._block(node.orelse.body, set(after))
        else:
            result |= after
        return result | edit.names_read(node.test)

    def _small(self, small: cst.CSTNode, live: set[str], first: bool) -> set[str]:
        if isinstance(small, cst.Assign | cst.AnnAssign):
            return self._assign(small, live)
        if isinstance(small, cst.AugAssign):
            return self._augmented(small, live)
        if isinstance(small, cst.Expr):
            return self._expression(small, live, first)
        if isinstance(small, cst.Return) and small.value is not None and not self.result_is_read:
            self.edits[small] = edit.remove if small is self.last else _bare_return
            return set()
        if isinstance(small, cst.Return | cst.Raise):
            live = set()
        return live | edit.names_read(small)

    def _assign(self, small: cst.Assign | cst.AnnAssign, live: set[str]) -> set[str]:
        found = edit.targets(small)
        if isinstance(small, cst.AnnAssign) and small.value is None:
            self.edits[small] = edit.remove
            return live
        wanted = [t for t in found if self._wanted(t, live)]
        if not wanted:
            self.edits[small] = edit.remove
            return live
        self.keep.add(small)
        bound = {t.value for t in found if isinstance(t, cst.Name)}
        return (live - bound) | edit.names_read(small)

    def _wanted(self, target: cst.BaseExpression, live: set[str]) -> bool:
        if isinstance(target, cst.Name):
            return target.value in live
        if isinstance(target, cst.Attribute) and edit.code(target.value) == "self":
            return self._is_read(target.attr.value) or self._in_parameters(target)
        if isinstance(target, cst.Subscript):
            return bool(edit.names_read(target.value) & (live | {"self"}))
        return True

    def _in_parameters(self, target: cst.Attribute) -> bool:
        """A parameter-holding attribute of a container that is called as a whole stays."""
        return target.attr.value in ("weight_rules", "sampler") and self.is_init

    def _augmented(self, small: cst.AugAssign, live: set[str]) -> set[str]:
        target = small.target
        if isinstance(target, cst.Name) and target.value not in live:
            self.edits[small] = edit.remove
            return live
        if isinstance(target, cst.Attribute) and not self._wanted(target, live):
            self.edits[small] = edit.remove
            return live
        self.keep.add(small)
        return live | edit.names_read(small.target) | edit.names_read(small.value)

    def _expression(self, small: cst.Expr, live: set[str], first: bool) -> set[str]:
        value = small.value
        if isinstance(value, cst.SimpleString | cst.ConcatenatedString):
            if not first:
                self.edits[small] = edit.remove
            return live
        if not self._matters(value, live):
            self.edits[small] = edit.remove
            return live
        self.keep.add(small)
        return live | edit.names_read(small)

    def _matters(self, value: cst.BaseExpression, live: set[str]) -> bool:
        """Whether an expression statement does something that inference sees."""
        if not isinstance(value, cst.Call):
            return False
        text = edit.code(value.func)
        if text.endswith(".__init__"):
            return True
        if text == "setattr" and len(value.args) == 3:
            return any(self._is_read(_attribute_name(name)) for name in self.facts.values(value.args[1].value))
        if isinstance(value.func, cst.Attribute):
            name, receiver = value.func.attr.value, edit.names_read(value.func.value)
            if name in ("register_buffer", "register_parameter") and value.args:
                return self._is_read(edit.code(value.args[0].value).strip("\"'"))
            if name.endswith("_") and not name.startswith("_"):
                return bool(receiver & live) or ("self" in receiver and self._attribute_live(value.func.value))
            if name in ("append", "extend", "insert", "update"):
                return bool(receiver & live) or ("self" in receiver and self._attribute_live(value.func.value))
        return self._sets_attributes(value)

    def _attribute_live(self, node: cst.BaseExpression) -> bool:
        return isinstance(node, cst.Attribute) and self._is_read(node.attr.value)

    def _sets_attributes(self, call: cst.Call) -> bool:
        """A call of a method of the file that assigns attributes, such as a table builder."""
        for record in self.facts.calls_at(call):
            for node in edit.walk(record.function.node.body):
                if isinstance(node, cst.Assign):
                    for target in edit.targets(node):
                        if isinstance(target, cst.Attribute) and self._is_read(target.attr.value):
                            return True
                if isinstance(node, cst.Call) and self._is_read(_buffer(node)):
                    return True
        return False


def _result_is_read(facts: Facts, function: cst.FunctionDef) -> bool:
    """Whether any call of a function does something with what it returns."""
    sites = {c.site for c in facts.calls_of(function)}
    return not sites or any(
        site is None or not isinstance(edit.parent(facts.program.tree, site), cst.Expr) for site in sites
    )


def _bare_return(updated: cst.Return) -> cst.Return:
    return updated.with_changes(value=None, whitespace_after_return=cst.SimpleWhitespace(""))


def _attribute_name(name: Value) -> str:
    """The name that setattr() gives; one that the config decides is its own text."""
    return str(name.const) if isinstance(name, Scalar) and name.known else scalars.text(name)


def _buffer(node: cst.Call) -> str:
    """The name that a register_buffer call gives, else nothing."""
    if edit.code(node.func) != "self.register_buffer" or not node.args:
        return ""
    return edit.code(node.args[0].value).strip("\"'")
