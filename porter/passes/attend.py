"""Put a paged attention layer in place of the attention that the file spells out or calls."""

from __future__ import annotations

import libcst as cst

from porter.analyze.core import layout_chain
from porter.analyze.facts import Facts, line_of
from porter.analyze.rotation import turns
from porter.analyze.values import Scalar, Sequence, Tensor, Value, is_none
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.attend_layer import LayerSource
from porter.passes.attend_place import Found, Group, find_groups
from porter.passes.base import Example, Pass, Stage

_BEFORE = """\
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask


class OakAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, mask):
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5 + mask
        weights = torch.softmax(scores, dim=-1)
        return (weights @ value).transpose(1, 2).reshape(hidden_states.shape)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = OakAttention(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        mask = create_causal_mask(self.config, hidden_states, None, None)
        return self.attention(hidden_states, mask)
"""
_AFTER = """\
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from porter.runtime.attention.paged import PagedAttention


class OakAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attn = PagedAttention(self.num_heads, self.head_dim, self.head_dim**-0.5)

    def forward(self, hidden_states, mask):
        query = self.q_proj(hidden_states)
        key = self.k_proj(hidden_states)
        value = self.v_proj(hidden_states)
        return self.attn(query, key, value, kv_cache, attn_metadata)


class OakForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = OakAttention(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        mask = create_causal_mask(self.config, hidden_states, None, None)
        return self.attention(hidden_states, mask)
"""


class Attend(Pass):
    """Scores, masks, softmax, rotation and cache become one layer that reads and writes pages.

    The projections stay; everything between them and the merged heads is the layer's work.
    """

    stage = Stage.ATTEND
    reason = "paged attention computes the same from the paged cache"
    EXAMPLES = (Example(_BEFORE, _AFTER),)

    def apply(self, facts: Facts) -> cst.Module:
        groups = find_groups(facts)
        tree = facts.program.tree
        if not groups:
            _require_attention(facts)
            return tree
        edits: dict[cst.CSTNode, edit.Edit] = {}
        imports: dict[str, set[str]] = {}
        for group in groups:
            edits.update(_Rewrite(facts, group, imports).edits)
        return edit.add_imports(edit.rewrite(tree, edits), imports)


def _require_attention(facts: Facts) -> None:
    for world in facts.worlds:
        for values in world.values.values():
            if any(v.op in ("paged_attention", "state_mixer") for v in values):
                return
    raise Refusal(
        "",
        line_of(facts.program.tree, facts.entry.node),
        facts.entry.name,
        "no attention was found on the way from the tokens to the logits",
        "porter ports attention decoders; another kind of mixer needs its own cache",
        "P201",
    )


class _Rewrite(LayerSource):
    """The edits that put one layer in place of a function's attention."""

    def __init__(self, facts: Facts, group: Group, imports: dict[str, set[str]]) -> None:
        super().__init__(facts, group, imports)
        self.names: list[str] = []
        self.init = self._init()
        self._projections()
        self._bypassed()
        for node in {f.merged for f in group.found}:
            self._call(node)
        self._construct()

    # the three inputs

    def _projections(self) -> None:
        if self.first.core.fused:
            self.names = [self._bound_name(i, ("query", "key", "value")[i]) for i in range(3)]
        else:
            self.names = [self._target(i, self._statement(self.first.sources[i])) for i in range(3)]
        made: dict[cst.SimpleStatementLine, dict[str, None]] = {}
        alike = [f for f in self.group.found if bool(f.core.fused) == bool(self.first.core.fused)]
        for found in alike:
            for statement, line in self._split(found) if found.core.fused else self._assigned(found):
                made.setdefault(statement, {})[line] = None
        for statement, lines in made.items():
            self._replace(statement, list(lines))

    def _statement(self, node: cst.CSTNode) -> cst.SimpleStatementLine:
        found: cst.SimpleStatementLine = edit.enclosing(self.tree, node, cst.SimpleStatementLine)
        return found

    def _split(self, found: Found) -> list[tuple[cst.SimpleStatementLine, str]]:
        node = self._fused_call(found)
        return [
            (
                self._statement(found.sources[0]),
                f"{', '.join(self.names)} = {edit.code(node.func)}.split({edit.code(node)})",
            )
        ]

    def _assigned(self, found: Found) -> list[tuple[cst.SimpleStatementLine, str]]:
        return [
            (self._statement(source), f"{name} = {edit.code(source)}")
            for name, source in zip(self.names, found.sources, strict=True)
            if not isinstance(source, cst.Name) and not self._goes_on(source)
        ]

    def _goes_on(self, source: cst.BaseExpression) -> bool:
        """Whether some path does more with it before attention, a norm over heads: what it is given stays as it is."""
        return any(
            found.world.values.get(source) and not any(source is each for each in found.sources)
            for found in self.group.found
        )

    def _fused_call(self, found: Found) -> cst.Call:
        """The call of the one projection of q, k and v."""
        node = found.sources[0]
        if not isinstance(node, cst.Call) or not isinstance(node.func, cst.Attribute):
            raise Refusal(
                "",
                line_of(self.tree, node),
                edit.code(node),
                "q, k and v come from one projection that is not called where they are split",
                "call it in the method that computes attention",
                "P202",
            )
        return node

    def _replace(self, statement: cst.SimpleStatementLine, codes: list[str]) -> None:
        new = [edit.statement(c) for c in codes if c.split(" = ")[0] != c.split(" = ", 1)[1]]
        if new:
            new[0] = new[0].with_changes(leading_lines=statement.leading_lines)
        self.edits[statement] = lambda _: cst.FlattenSentinel(new)

    def _target(self, index: int, statement: cst.SimpleStatementLine) -> str:
        """The variable for q, k or v: the one its projection is assigned to, else the one that holds it later."""
        source = self.first.sources[index]
        if isinstance(source, cst.Name):
            return source.value
        small = statement.body[0]
        if isinstance(small, cst.Assign) and len(small.targets) == 1 and isinstance(small.targets[0].target, cst.Name):
            others = [s for i, s in enumerate(self.first.sources) if i != index]
            if not any(o in set(edit.walk(statement)) for o in others):
                return small.targets[0].target.value
        return self._bound_name(index, ("query", "key", "value")[index])

    def _bound_name(self, index: int, default: str) -> str:
        """A variable of the function that holds q, k or v in some layout."""
        world, core = self.first.world, self.first.core
        goal = (core.query, core.key, core.value)[index]
        for node in edit.walk(self.group.function.body):
            if isinstance(node, cst.Assign):
                for target in edit.targets(node):
                    if isinstance(target, cst.Name) and any(v is goal for v in world.values.get(target, ())):
                        return target.value
        return default

    # what the layer now does

    def _bypassed(self) -> None:
        sets = {id(f): _between(f) for f in self.group.found}
        for statement in edit.lines(self.group.function):
            if statement in self.edits:
                continue
            for small in statement.body:
                if self._is_bypassed(small, sets):
                    self.edits[small] = edit.remove

    def _is_bypassed(self, small: cst.CSTNode, sets: dict[int, set[int]]) -> bool:
        found = edit.targets(small)
        if not found or any(f.merged in set(edit.walk(small)) for f in self.group.found):
            return False
        if isinstance(small, cst.AugAssign):
            found = [small]  # type: ignore[list-item]
        inside = set().union(*sets.values())
        values = [v for t in found for f in self.group.found for v in f.world.values.get(t, ())]
        return any(id(v) in inside for v in values) and all(id(v) in inside or is_none(v) for v in values)

    # the call

    def _require_everywhere(self, node: cst.BaseExpression) -> None:
        """Refuse to replace on every path what was understood on some."""
        understood = {id(f.world) for f in self.group.found}
        for world in self.facts.worlds:
            if world.values.get(node) and id(world) not in understood:
                when = " and ".join(k if v else f"not {k}" for k, v in world.decisions)
                why = f"no attention was recognised when {when}, but on other paths it was"
                remedy = "see porter explain attend for what is understood"
                raise Refusal("", line_of(self.tree, node), "attention", why, remedy, "P200")

    def _call(self, node: cst.BaseExpression) -> None:
        found = [f for f in self.group.found if f.merged is node]
        self._require_everywhere(node)
        turned = [f for f in found if f.core.rotation is not None]
        others = [f for f in found if f.core.rotation is None and (f.core.alibi is not None or turns(f.core.query))]
        if turned and others:
            raise Refusal(
                "",
                line_of(self.tree, node),
                "attention",
                "the config chooses between RoPE and another kind of position",
                "call the attention once for each kind",
                "P202",
            )
        first = ["positions"] if turned else []
        arguments = ", ".join([*first, *self.names, "kv_cache", "attn_metadata"])
        apart = f".unflatten(-1, (-1, {self._size(found[0], found[0].core.v_head_dim)}))"
        tail = "" if found[0].merges_heads else apart
        call = f"self.attn({arguments}){tail}"
        self.edits[node] = edit.replace(call)


def _between(found: Found) -> set[int]:
    """Values made on the way from the projections to the merged heads."""
    core = found.core
    sources = found.made
    before = {id(v) for s in sources for v in s.walk()}
    inside = {id(v) for v in core.output.walk() if id(v) not in before or v in sources}
    for values in found.world.values.values():
        for value in values:
            if (
                (value.op in ("shape", "part", "size") and value.args and _measures(value, inside))
                or (isinstance(value, Tensor) and core.output in layout_chain(value))
                or (isinstance(value, Tensor) and any(s in layout_chain(value) for s in sources))
                or (
                    isinstance(value, Sequence)
                    and value.items
                    and all(id(i) in inside or (isinstance(i, Scalar) and i.const is None) for i in value.items)
                )
            ):
                inside.add(id(value))
    return inside - {id(v) for node, v in zip(found.sources, sources, strict=True) if isinstance(node, cst.Name)}


def _measures(value: Value, inside: set[int]) -> bool:
    """Whether a size is one of a tensor on the way: it has another shape now."""
    source = value.args[0]
    return id(source) in inside or (source.op in ("shape", "part") and _measures(source, inside))
