"""The constructor of a paged attention layer, from the traits of the attention."""

from __future__ import annotations

import re

import libcst as cst

from porter.analyze import scalars
from porter.analyze.core import Core
from porter.analyze.facts import line_of
from porter.analyze.poly import Poly
from porter.analyze.rotation import is_theta
from porter.analyze.values import Instance, Layer, Mask, Scalar, Value
from porter.errors import Refusal
from porter.passes import edit
from porter.passes.attend_place import Found
from porter.passes.attend_traits import TraitSource
from porter.passes.creations import assigned_before, creation_parts, creations_of

PAGED = "porter.runtime.attention.paged"
LINEAR = "porter.runtime.layers.linear"


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
    return (
        sliding
        or core.masks_window
        or (core.by_key is not None and any(isinstance(m, Mask) and m.kind == "sliding" for m in core.by_key.args[1:]))
    )


def _layer_of(owner: Instance, name: str) -> Layer | None:
    value = owner.attrs.get(name)
    if isinstance(value, Instance):
        value = value.attrs.get("<layer>")
    return value if isinstance(value, Layer) else None


# Spellings of a base that `get_rope_parameters` reads as the file does.
_THETA = re.compile(r"\.(rope_theta|rotary_emb_base)$|'(rope_theta|rotary_emb_base)', (None|10000|10000\.0)\)$")


class LayerSource(TraitSource):
    """The paged layer that an attention's __init__ makes, and its fused projection."""

    def _init(self) -> cst.FunctionDef:
        """The __init__ that makes the layer."""
        init = self.facts.program.method(self.first.owner.cls, "__init__") if self.first.owner.cls else None
        if init is None or init.owner is None:
            raise Refusal(
                "",
                line_of(self.tree, self.group.function),
                "attention",
                "its class has no __init__",
                "give it one",
                "P202",
            )
        return init.node

    def _construct(self) -> None:
        init, lines = self.init, self._layer_lines()
        self.edits[init.body] = lambda updated: updated.with_changes(body=[*updated.body, *edit.block(lines)])
        if self.first.core.fused:
            self._fuse_projection(init)

    def _layer_lines(self) -> str:
        """`self.attn = ...`, under a condition when the config chooses between kinds of attention."""
        kinds: dict[str, list[Found]] = {}
        for found in self.group.found:
            kinds.setdefault(_kind(found.core), []).append(found)
        if set(kinds) == {"PagedAttention", "PagedAttentionWithRoPE"}:
            kinds = {"PagedAttentionWithRoPE": self.group.found}
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
                "P202",
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
        if any(f.core.v_head_dim != f.core.head_dim for f in found):
            fields.append(f"v_head_dim={self._vary(found, lambda f: self._size(f, f.core.v_head_dim))}")
        if kind == "PagedAttentionWithRoPE":
            fields += self._rope(found)
        if kind == "PagedAttentionWithALiBi":
            fields += self._alibi(found, fields[0])
        fields += self._options(found)
        return f"{kind}({', '.join(fields)})"

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
        """How queries and keys turn; layers that don't have no parameters."""
        turned = [f for f in found if f.core.rotation is not None]
        rotation = turned[0].core.rotation
        assert rotation is not None
        fields = [
            f"rope_parameters={self._vary(found, self._rope_parameters)}",
            f"max_position={self._expression('config.max_position_embeddings', turned[0])}",
        ]
        if not rotation.full and not any(w in f for f in rotation.fields for w in ("partial", "pct")):
            fields.append(f"rotary_dim={self._rotary_dim(turned[0])}")
        if rotation.interleaved:
            fields.append("interleaved=True")
        return fields

    def _rope_parameters(self, found: Found) -> str:
        rotation = found.core.rotation
        if rotation is None:
            return "None"
        if not rotation.from_config:
            return self._with_theta(found, str(rotation.base))
        thetas = {f.removesuffix("['rope_theta']") for f in rotation.fields if f.endswith("['rope_theta']")}
        if len(thetas) == 1:
            return self._expression(thetas.pop(), found)
        if any("rope_parameters" in f for f in rotation.fields):
            return self._expression("config.rope_parameters", found)
        others = [f for f in sorted(rotation.fields) if is_theta(f) and not _THETA.search(f)]
        if others:
            return self._with_theta(found, self._expression(others[0], found))
        self.imports.setdefault("porter.runtime.layers.rope", set()).add("get_rope_parameters")
        return self._expression("get_rope_parameters(config)", found)

    def _with_theta(self, found: Found, theta: str) -> str:
        """A base that is no field the runtime knows; scaling is the config's if the file asks for it."""
        if not any("rope_scaling" in world.config_reads for world in self.facts.worlds):
            return f'{{"rope_type": "default", "rope_theta": {theta}}}'
        self.imports.setdefault("porter.runtime.layers.rope", set()).add("get_rope_parameters")
        return f'{{**{self._expression("get_rope_parameters(config)", found)}, "rope_theta": {theta}}}'

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
            "P202",
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

    def _fuse_projection(self, init: cst.FunctionDef) -> None:
        nodes = [f.sources[0] for f in self.group.found]
        names = dict.fromkeys(
            n.func.attr.value for n in nodes if isinstance(n, cst.Call) and isinstance(n.func, cst.Attribute)
        )
        for name in names:
            self._fuse(init, name, nodes[0])

    def _fuse(self, init: cst.FunctionDef, name: str, node: cst.BaseExpression) -> None:
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
                "P202",
            )
        self.facts.notes.setdefault("fused", {})[name] = layouts.pop()
        self.imports.setdefault(LINEAR, set()).add("QKVParallelLinear")
        for creation in creations_of(init, name):
            self.edits[creation] = self._qkv(creation, name)

    def _qkv(self, creation: cst.Call, name: str) -> edit.Edit:
        found = self.group.found
        layer = _layer_of(self.first.owner, name)
        if layer is not None and layer.kind == "conv1d":
            self.facts.notes.setdefault("transposed", set()).add(name)
        inputs, bias = creation_parts(creation, layer)
        known = assigned_before(self.tree, self.init, creation)
        heads = self._vary(found, lambda f: self._size(f, f.core.heads, known))
        kv = self._vary(found, lambda f: self._size(f, f.core.kv_heads, known))
        dim = self._vary(found, lambda f: self._size(f, f.core.head_dim, known))
        shared = "" if kv == heads else f", {kv}"
        return edit.replace(f"QKVParallelLinear({inputs}, {dim}, {heads}{shared}, bias={bias})")
