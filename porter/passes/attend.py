"""Put a paged attention layer in place of the attention that the file spells out or calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import libcst as cst

from porter.analyze import scalars
from porter.analyze.attention import Core, NotUnderstood, _strip, _turns, find_cores
from porter.analyze.facts import Facts, World, line_of
from porter.analyze.poly import Poly
from porter.analyze.values import Instance, Layer, Mask, Scalar, Sequence, Tensor, Value, is_none
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.base import Example, Pass, Stage

PAGED = "porter.runtime.attention.paged"
LINEAR = "porter.runtime.layers.linear"


@dataclass(eq=False)
class Found:
    """One attention on one path, placed in the file."""

    world: World
    core: Core
    function: cst.FunctionDef
    owner: Instance
    merged: cst.BaseExpression
    sources: list[cst.BaseExpression]
    made: list[Tensor]  # the values of the sources
    merges_heads: bool


@dataclass(eq=False)
class Group:
    """The attention of one function, over all paths."""

    function: cst.FunctionDef
    found: list[Found] = field(default_factory=list)


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
        groups = _groups(facts)
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
            if any(v.op == "paged_attention" for v in values):
                return
    raise Refusal(
        "",
        line_of(facts.program.tree, facts.entry.node),
        facts.entry.name,
        "no attention was found on the way from the tokens to the logits",
        "porter ports attention decoders; another kind of mixer needs its own cache",
    )


def read_attention(facts: Facts) -> dict[int, list[Core]]:
    """The attention of every path, by the number of the path.

    Raises:
        Refusal: an attention is there but is not understood.
    """
    found: dict[int, list[Core]] = {}
    for i, world in enumerate(facts.worlds):
        try:
            found[i] = find_cores(world)
        except NotUnderstood as error:
            raise Refusal(
                "",
                _core_line(facts, world),
                "attention",
                str(error),
                "see porter explain attend for what is understood",
            ) from error
    return found


def _groups(facts: Facts) -> list[Group]:
    groups: dict[cst.FunctionDef, Group] = {}
    for i, cores in read_attention(facts).items():
        world = facts.worlds[i]
        for core in cores:
            found = _place(facts, world, core)
            group = groups.setdefault(found.function, Group(found.function))
            group.found.append(found)
    return list(groups.values())


def _core_line(facts: Facts, world: World) -> int:
    for node, values in world.values.items():
        if any(v.op in ("attention", "softmax") for v in values):
            return line_of(facts.program.tree, node)
    return 0


# -- placing ---------------------------------------------------------------------------------------


def _place(facts: Facts, world: World, core: Core) -> Found:
    """Find, in one function, the expressions that project q, k, v and the one that merges the heads."""
    chains = [_strip(v) for v in (core.query, core.key, core.value)]
    merged = _merged_nodes(world, core)
    functions: dict[cst.FunctionDef, tuple[cst.BaseExpression, bool]] = {}
    for node, merges in merged:
        function = edit.enclosing(facts.program.tree, node, cst.FunctionDef)
        if function is not None:
            functions.setdefault(function, (node, merges))
    for function, (node, merges) in functions.items():
        inside = {n: i for i, n in enumerate(edit.walk(function.body))}
        picked = [_source_node(world, c, inside) for c in chains]
        owner = next(
            (c.receiver for c in world.calls if c.function.node is function and isinstance(c.receiver, Instance)), None
        )
        if all(p is not None for p in picked) and owner is not None:
            known = [p for p in picked if p is not None]
            return Found(world, core, function, owner, node, [n for n, _ in known], [v for _, v in known], merges)
    raise Refusal(
        "",
        _core_line(facts, world),
        "attention",
        "its projections and its merged heads are not in one method",
        "bring them into one forward",
    )


def _merged_nodes(world: World, core: Core) -> list[tuple[cst.BaseExpression, bool]]:
    """Expressions whose value is the attention's output with its heads merged; else with heads apart."""
    whole: list[tuple[cst.BaseExpression, bool]] = []
    apart: list[tuple[cst.BaseExpression, bool]] = []
    assert core.heads is not None and core.head_dim is not None
    width = core.heads * core.head_dim
    for node, values in world.values.items():
        if isinstance(node, cst.Name | cst.Tuple) or not isinstance(node, cst.BaseExpression):
            continue
        for value in values:
            if not isinstance(value, Tensor) or value.shape is None or core.output not in _strip(value):
                continue
            if value.shape[-1] == width and all(s.has_tokens for s in value.shape[:-1]):
                whole.append((node, True))
            elif value.shape[-2:] == (core.heads, core.head_dim):
                apart.append((node, False))
    return whole or apart


def _source_node(
    world: World, chain: list[Tensor], inside: dict[cst.CSTNode, int]
) -> tuple[cst.BaseExpression, Tensor] | None:
    """The expression of a function that makes the earliest of a chain of layouts; a name only if nothing else does."""
    for value in reversed(chain):
        best: cst.BaseExpression | None = None
        for node in inside:
            if isinstance(node, cst.BaseExpression) and any(v is value for v in world.values.get(node, ())):
                if not isinstance(node, cst.Name):
                    return node, value
                best = best or node
        if best is not None:
            return best, value
    return None


# -- rewriting -------------------------------------------------------------------------------------


class _Rewrite:
    def __init__(self, facts: Facts, group: Group, imports: dict[str, set[str]]) -> None:
        self.facts, self.group, self.imports = facts, group, imports
        self.tree = facts.program.tree
        self.edits: dict[cst.CSTNode, edit.Edit] = {}
        self.names: list[str] = []
        self._projections()
        self._bypassed()
        for node in {f.merged for f in group.found}:
            self._call(node)
        self._construct()

    @property
    def first(self) -> Found:
        return self.group.found[0]

    # the three inputs

    def _projections(self) -> None:
        found = self.first
        statements = [edit.enclosing(self.tree, n, cst.SimpleStatementLine) for n in found.sources]
        if found.core.fused:
            self.names = [self._bound_name(i, ("query", "key", "value")[i]) for i in range(3)]
            node = found.sources[0]
            assert isinstance(node, cst.Call)
            split = f"{', '.join(self.names)} = {edit.code(node.func)}.split({edit.code(node)})"
            self._replace(statements[0], [split])
            return
        self.names = [self._target(i, statements[i]) for i in range(3)]
        for statement in dict.fromkeys(statements):
            made = [
                f"{self.names[i]} = {edit.code(found.sources[i])}"
                for i in range(3)
                if statements[i] is statement and not isinstance(found.sources[i], cst.Name)
            ]
            if made:
                self._replace(statement, made)

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

    def _call(self, node: cst.BaseExpression) -> None:
        found = [f for f in self.group.found if f.merged is node]
        rotated = {f.core.rotation is not None for f in found}
        if len(rotated) > 1:
            raise Refusal(
                "",
                line_of(self.tree, node),
                "attention",
                "it is rotated on some paths only",
                "a config condition inside one attention call is not supported",
            )
        first = ["positions"] if rotated == {True} else []
        arguments = ", ".join([*first, *self.names, "kv_cache", "attn_metadata"])
        tail = "" if found[0].merges_heads else f".unflatten(-1, (-1, {self._size(found[0], found[0].core.head_dim)}))"
        call = f"self.attn({arguments}){tail}"
        self.edits[node] = edit.replace(call)

    # the layer

    def _construct(self) -> None:
        init = self.facts.program.method(self.first.owner.cls, "__init__") if self.first.owner.cls else None
        if init is None or init.owner is None:
            raise Refusal(
                "", line_of(self.tree, self.group.function), "attention", "its class has no __init__", "give it one"
            )
        self.init = init.node
        lines = self._layer_lines()
        self.edits[init.node.body] = lambda updated: updated.with_changes(body=[*updated.body, *edit.block(lines)])
        if self.first.core.fused:
            self._fuse_projection(init.node)

    def _layer_lines(self) -> str:
        """`self.attn = ...`, under a condition when the config chooses between kinds of attention."""
        kinds: dict[str, list[Found]] = {}
        for found in self.group.found:
            kinds.setdefault(_kind(found.core), []).append(found)
        made = {kind: self._constructor(kind, found) for kind, found in kinds.items()}
        if len(made) == 1:
            return f"self.attn = {next(iter(made.values()))}\n"
        cases = [(dict(f.world.decisions), kind) for kind, found in kinds.items() for f in found]
        chosen = edit.choose(cases)
        first, rest = chosen.split(" if ", 1)
        condition, other = rest.rsplit(" else ", 1)
        if first not in made or other not in made:
            raise Refusal(
                "",
                line_of(self.tree, self.group.function),
                "attention",
                "the config chooses between more than two kinds of attention",
                "split the class",
            )
        return f"if {condition}:\n    self.attn = {made[first]}\nelse:\n    self.attn = {made[other]}\n"

    def _constructor(self, kind: str, found: list[Found]) -> str:
        self.imports.setdefault(PAGED, set()).add(kind)
        fields = [
            self._vary(found, lambda f: self._size(f, f.core.heads)),
            self._vary(found, lambda f: self._size(f, f.core.head_dim)),
            self._vary(found, lambda f: self._scaling(f)),
        ]
        kv = self._vary(found, lambda f: self._size(f, f.core.kv_heads))
        if kv != fields[0]:
            fields.append(f"num_kv_heads={kv}")
        if kind == "PagedAttentionWithRoPE":
            fields += self._rope(found)
        if kind == "PagedAttentionWithALiBi":
            fields += self._alibi(found, fields[0])
        fields += self._options(found)
        return f"{kind}({', '.join(fields)})"

    def _vary(self, found: list[Found], text: object) -> str:
        assert callable(text)
        cases = [(dict(f.world.decisions), str(text(f))) for f in found]
        try:
            return edit.choose(cases)
        except ValueError:
            raise Refusal(
                "",
                line_of(self.tree, self.group.function),
                "attention",
                f"its traits differ in a way that no config field tells: {sorted({t for _, t in cases})}",
                "port the layer kinds as two classes",
            ) from None

    def _size(self, found: Found, size: Poly | None, known: set[str] | None = None) -> str:
        """A size as an attribute of the attention (one of `known`) if one holds it, else over config fields."""
        assert size is not None
        if size.number is not None:
            return str(size.number)
        for name, value in found.owner.attrs.items():
            if known is not None and name not in known:
                continue
            if isinstance(value, Scalar) and value.size == size and not value.known:
                return f"self.{name}"
        return self._expression(size.text(), found)

    def _expression(self, text: str, found: Found) -> str:
        """Source over `config`, valid in the attention's __init__."""
        params = {p.name.value for p in edit.params_of(self.init)}
        if "config" in text and "config" not in params:
            raise Refusal(
                "",
                line_of(self.tree, self.init),
                "attention",
                f"its __init__ has no config for {text}",
                "pass the config to the class",
            )
        if "layer_idx" in text and "layer_idx" not in params:
            index = next((n for n, v in found.owner.attrs.items() if isinstance(v, Scalar) and v.op == "index"), None)
            bound = next((c.bound for c in found.world.calls if c.function.node is self.init), {})
            name = next((n for n, v in bound.items() if isinstance(v, Scalar) and v.op == "index"), None)
            if index is not None or name is not None:
                text = text.replace("layer_idx", name or f"self.{index}")
        return text

    def _value(self, found: Found, value: Value) -> str:
        """A scalar as an attribute, as its own source over self, or over config fields."""
        for name, held in found.owner.attrs.items():
            if held is value:
                return f"self.{name}"
        if isinstance(value, Scalar) and value.known:
            return repr(value.const)
        if value.node is not None and isinstance(value.node, cst.BaseExpression) and _over_self(value.node, found):
            return edit.code(value.node)
        return self._expression(scalars.text(value), found)

    def _scaling(self, found: Found) -> str:
        if found.core.default_scale:
            return f"{self._size(found, found.core.head_dim)}**-0.5"
        held = [id(v) for v in found.owner.attrs.values()]
        factors = [(op, self._value(found, v)) for op, v in found.core.scale if not _is_one(v) or id(v) in held]
        above, below = ([text for op, text in factors if op == wanted] for wanted in ("mul", "div"))
        text = " * ".join(above) or "1.0"
        for divisor in below:
            text = f"{text} / {divisor}" if divisor.isidentifier() or divisor.endswith(")") else f"{text} / ({divisor})"
        return text

    def _options(self, found: list[Found]) -> list[str]:
        options = []
        if any(_is_windowed(f.core) for f in found):
            text = self._vary(found, self._window)
            if text != "None":
                options.append(f"sliding_window={text}")
        for name in ("softcap", "sinks"):
            if any(getattr(f.core, name) is not None for f in found):
                options.append(
                    name
                    + "="
                    + self._vary(
                        found, lambda f, n=name: self._value(f, getattr(f.core, n)) if getattr(f.core, n) else "None"
                    )
                )
        return options

    def _window(self, found: Found) -> str:
        core = found.core
        if core.window is not None:
            return self._value(found, core.window)
        if core.by_key is not None:
            keys = core.by_key.attrs["keys"]
            sliding = [
                k
                for k, m in zip(keys, core.by_key.args[1:], strict=True)
                if isinstance(m, Mask) and m.kind == "sliding"
            ]
            if sliding:
                key = self._expression(scalars.text(core.by_key.args[0]), found)
                window = next(m.window for m in core.by_key.args[1:] if isinstance(m, Mask) and m.kind == "sliding")
                assert window is not None
                return f"{self._value(found, window)} if {key} == {sliding[0]!r} else None"
        return "None"

    def _rope(self, found: list[Found]) -> list[str]:
        rotation = found[0].core.rotation
        assert rotation is not None
        if not rotation.from_config:
            parameters = f'{{"rope_type": "default", "rope_theta": {rotation.base}}}'
        elif any("rope_parameters" in f for f in rotation.fields):
            parameters = "config.rope_parameters"
        else:
            self.imports.setdefault("porter.runtime.layers.rope", set()).add("get_rope_parameters")
            parameters = "get_rope_parameters(config)"
        fields = [
            f"rope_parameters={self._expression(parameters, found[0])}",
            f"max_position={self._expression('config.max_position_embeddings', found[0])}",
        ]
        if not rotation.full and not any(w in f for f in rotation.fields for w in ("partial", "pct")):
            fields.append(f"rotary_dim={self._rotary_dim(found[0])}")
        if rotation.interleaved:
            fields.append("interleaved=True")
        return fields

    def _rotary_dim(self, found: Found) -> str:
        for name, value in found.owner.attrs.items():
            if isinstance(value, Scalar) and not value.known and "rotary" in f"{name} {value.text}":
                return f"self.{name}"
        raise Refusal(
            "",
            line_of(self.tree, self.group.function),
            "partial rotation",
            "how many dims it turns is no attribute of the attention",
            "keep it as self.rotary_dim",
        )

    def _alibi(self, found: list[Found], heads: str) -> list[str]:
        self.imports.setdefault("porter.runtime.layers.alibi", set()).add("get_alibi_slopes")
        factors = self._vary(
            found,
            lambda f: " * ".join(
                [self._value(f, v) for op, v in f.core.alibi_scale if op == "mul" and not _is_one(v)]
                + [f"1 / {self._value(f, v)}" for op, v in f.core.alibi_scale if op == "div"]
            ),
        )
        slopes = f"get_alibi_slopes({heads})"
        fields = [f"alibi_slopes={slopes} * {factors}" if factors else f"alibi_slopes={slopes}"]
        if found[0].core.alibi_dtype:
            fields.append(f"bias_dtype=torch.{found[0].core.alibi_dtype}")
        return fields

    # one projection for q, k and v

    def _fuse_projection(self, init: cst.FunctionDef) -> None:
        node = self.first.sources[0]
        assert isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute)
        name = node.func.attr.value
        layouts = {f.core.fused for f in self.group.found if f.core.kv_heads != Poly.const(1)} or {
            self.first.core.fused
        }
        if len(layouts) > 1:
            raise Refusal(
                "",
                line_of(self.tree, node),
                name,
                "the config chooses between layouts of one projection",
                "port the layouts as two classes",
            )
        self.facts.notes.setdefault("fused", {})[name] = layouts.pop()
        self.imports.setdefault(LINEAR, set()).add("QKVParallelLinear")
        for creation in _creations(init, name):
            self.edits[creation] = self._qkv(creation, name)

    def _qkv(self, creation: cst.Call, name: str) -> edit.Edit:
        found = self.group.found
        layer = _layer_of(self.first.owner, name)
        if layer is not None and layer.kind == "conv1d":
            self.facts.notes.setdefault("transposed", set()).add(name)
        inputs, bias = _creation_parts(creation, layer)
        known = assigned_before(self.tree, self.init, creation)
        heads = self._vary(found, lambda f: self._size(f, f.core.heads, known))
        kv = self._vary(found, lambda f: self._size(f, f.core.kv_heads, known))
        dim = self._vary(found, lambda f: self._size(f, f.core.head_dim, known))
        shared = "" if kv == heads else f", {kv}"
        return edit.replace(f"QKVParallelLinear({inputs}, {dim}, {heads}{shared}, bias={bias})")


def _kind(core: Core) -> str:
    if core.rotation is not None:
        return "PagedAttentionWithRoPE"
    return "PagedAttentionWithALiBi" if core.alibi is not None else "PagedAttention"


def _is_one(value: Value) -> bool:
    return isinstance(value, Scalar) and value.known and value.const == 1


def _is_windowed(core: Core) -> bool:
    """Whether the mask, which is what eager attention obeys, limits the window."""
    masks = [m for m, _ in core.addends]
    sliding = any(isinstance(m, Mask) and m.kind == "sliding" for m in masks)
    return sliding or (
        core.by_key is not None and any(isinstance(m, Mask) and m.kind == "sliding" for m in core.by_key.args[1:])
    )


def _over_self(node: cst.BaseExpression, found: Found) -> bool:
    """Whether an expression reads only attributes that __init__ sets, and math."""
    names = edit.names_read(node)
    attributes = {
        n.attr.value for n in edit.walk(node) if isinstance(n, cst.Attribute) and edit.code(n.value) == "self"
    }
    return names <= {"self", "math"} and attributes <= set(found.owner.attrs) and isinstance(node, cst.BaseExpression)


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
                or (isinstance(value, Tensor) and core.output in _strip(value))
                or (isinstance(value, Tensor) and any(s in _strip(value) for s in sources))
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


def _creations(init: cst.FunctionDef, name: str) -> list[cst.Call]:
    """The calls that make `self.<name>` in an __init__."""
    assigns = [n for n in edit.walk(init.body) if isinstance(n, cst.Assign)]
    return [
        n.value
        for n in assigns
        if isinstance(n.value, cst.Call) and any(edit.code(t) == f"self.{name}" for t in edit.targets(n))
    ]


def _layer_of(owner: Instance, name: str) -> Layer | None:
    value = owner.attrs.get(name)
    if isinstance(value, Instance):
        value = value.attrs.get("<layer>")
    return value if isinstance(value, Layer) else None


def assigned_before(tree: cst.Module, init: cst.FunctionDef, node: cst.CSTNode) -> set[str]:
    """Attributes that an __init__ has set when it comes to a node."""
    line = edit.enclosing(tree, node, cst.SimpleStatementLine)
    found: set[str] = set()
    for other in edit.lines(init):
        if other is line:
            return found
        found |= {t.attr.value for small in other.body for t in edit.targets(small) if isinstance(t, cst.Attribute)}
    return found


def _creation_parts(creation: cst.Call, layer: Layer | None) -> tuple[str, str]:
    """(input size, bias) as source, from the call that makes a Linear or Conv1D."""
    named = {a.keyword.value: edit.code(a.value) for a in creation.args if a.keyword is not None}
    plain = [edit.code(a.value) for a in creation.args if a.keyword is None]
    if layer is not None and layer.kind == "conv1d":
        return named.get("nx", plain[1] if len(plain) > 1 else "nx"), "True"
    inputs = named.get("in_features", plain[0] if plain else "in_features")
    return inputs, named.get("bias", plain[2] if len(plain) > 2 else "True")


def turns_queries(facts: Facts) -> bool:
    """Whether queries are turned by position on any path, in the file's own code or in an attention layer."""
    for world in facts.worlds:
        for values in world.values.values():
            for value in values:
                if value.op == "attention" and _turns(value.attrs["given"]["query"]):
                    return True
                if value.op in ("matmul", "bmm", "baddbmm", "einsum") and any(_turns(a) for a in value.args):
                    return True
                if value.op == "paged_attention":
                    layer = value.attrs["layer"]
                    if layer.attrs.get("class") == "PagedAttentionWithRoPE" or any(_turns(a) for a in value.args):
                        return True
    return False
