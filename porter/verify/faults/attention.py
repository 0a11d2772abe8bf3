"""Faults of positions, attention and its cache."""

import libcst as cst

from porter.verify.faults.fault import ATTENTION, ROPE, Fault, edited, replaced
from porter.verify.faults.mutate import Edit, Place, called, code, keyword, layer_of, passed, positional

_REPLACE = "from dataclasses import replace\n\n\n"
_SLOTS = (
    _REPLACE
    + '''def faulty(m):
    """Keys and values go to the slot after their own."""
    slots = m.slot_mapping
    if m.max_seqlen_q == 1:
        slots = torch.where(slots > 0, slots - 1, slots)
    return replace(m, slot_mapping=slots, _memo={})
'''
)
_STALE = (
    _REPLACE
    + '''def faulty(m):
    """The newest block of a decoding sequence is not the one that was given to it."""
    tables = m.block_tables.clone()
    last = ((m.context_lens - 1) // BLOCK).long()
    rows = torch.arange(len(last))
    if m.max_seqlen_q == 1:
        tables[rows, last] = tables[rows, (last - 1).clamp(min=0)]
    return replace(m, block_tables=tables, _memo={})
'''
)
_SHORT = (
    _REPLACE
    + '''def faulty(m):
    """A decoding token doesn't see itself."""
    lens = m.context_lens - 1 if m.max_seqlen_q == 1 else m.context_lens
    return replace(m, context_lens=lens, _memo={})
'''
)
_CHUNK = (
    _REPLACE
    + '''def faulty(m):
    """A chunk of a prompt doesn't see the chunks before it."""
    lens = (m.cu_seqlens_q[1:] - m.cu_seqlens_q[:-1]) if m.max_seqlen_q > 1 else m.context_lens
    return replace(m, context_lens=lens, _memo={})
'''
)
_TILED = '''def tiled(x, attn):
    """Query heads by key-value head the other way around: tiled where they are repeated."""
    groups = attn.num_heads // attn.num_kv_heads
    return x.reshape(-1, groups, attn.num_kv_heads, attn.head_dim).transpose(1, 2).reshape(len(x), -1)
'''


def _window(template: str) -> Edit:
    return keyword(ATTENTION, "sliding_window", template)


def _names_layer_type(node: cst.BaseExpression, place: Place) -> bool:
    return isinstance(node, cst.Comparison) and "attention" in code(node) and "==" in code(node)


def _interleaved(node: cst.BaseExpression, place: Place) -> str | None:
    edit = keyword(ROPE, "interleaved", "not ({})", absent="True")
    return edit(node, place)


def _rotated(changes: str) -> Edit:
    return keyword(ROPE, "rope_parameters", "{{**({0}), " + changes + "}}")


def _first_cache(node: cst.BaseExpression, place: Place) -> str | None:
    return "kv_caches[0]" if code(node).startswith("kv_caches[") and code(node) != "kv_caches[0]" else None


def _other_arguments(first: int, second: int) -> Edit:
    """Exchange two arguments where attention is called; indices count from the first of q, k and v."""

    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        builder = layer_of(node, place)[1]
        if not isinstance(node, cst.Call) or not ATTENTION(builder):
            return None
        start = int(ROPE(builder))
        args = list(node.args)
        args[start + first], args[start + second] = args[start + second], args[start + first]
        return code(node.with_changes(args=args))

    return edit


def _query(template: str) -> Edit:
    def edit(node: cst.BaseExpression, place: Place) -> str | None:
        builder = layer_of(node, place)[1]
        return passed(ATTENTION, int(ROPE(builder)), template)(node, place)

    return edit


def _learned(node: cst.BaseExpression, place: Place) -> str | None:
    """Where a table of positions is read."""
    if isinstance(node, cst.Call) and called(node) == "super().forward" and "positions" in code(node):
        return code(node).replace("positions + self.offset", "positions").replace("positions)", "positions + 1)")
    name, builder = layer_of(node, place)
    table = isinstance(node, cst.Call) and "Embedding" in builder and len(node.args) == 1
    if table and code(node.args[0].value) == "positions":  # type: ignore[attr-defined]
        return f"self.{name}(positions + 1)"
    return None


_BLOCKS = "BLOCK = 4\n\n\n"
_ROPE_WORDS = ("rotary", "rope")
_DECODE = ("decode", "cache", "slot")
_SCALE = ("scale", "softcap")

FAULTS = (
    Fault(
        "rotary base doubled",
        "theta",
        edited(_rotated('"rope_theta": 2 * ({0}).get("rope_theta", 10000.0)')),
        _ROPE_WORDS,
    ),
    Fault(
        "rotary base 1 % off",
        "theta",
        edited(_rotated('"rope_theta": 1.01 * ({0}).get("rope_theta", 10000.0)')),
        _ROPE_WORDS,
    ),
    Fault("rotary pairs the other way", "pairing", edited(_interleaved), _ROPE_WORDS),
    Fault(
        "half of the dimensions rotated",
        "partial dim",
        edited(_rotated('"partial_rotary_factor": 0.5 * ({0}).get("partial_rotary_factor", 1.0)')),
        _ROPE_WORDS,
    ),
    Fault("first position lost", "position offset", edited(passed(ROPE, 0, "{}.clamp(min=1)")), _ROPE_WORDS),
    Fault("positions wrap at 256", "long positions", edited(passed(ROPE, 0, "{} % 256")), _ROPE_WORDS),
    Fault("nothing rotated", "pairing", edited(passed(ROPE, 0, "0 * {}")), _ROPE_WORDS),
    Fault(
        "rotary scaling lost",
        "rope scaling",
        edited(_rotated('"rope_type": "default"')),
        _ROPE_WORDS,
    ),
    Fault(
        "rotary scaling by another factor",
        "rope scaling",
        edited(_rotated('"factor": 1.5 * ({0}).get("factor", 1.0)')),
        _ROPE_WORDS,
    ),
    Fault(
        "positions rounded to bfloat16",
        "dtype of rope",
        edited(passed(ROPE, 0, "{}.to(torch.bfloat16).long()")),
        _ROPE_WORDS,
    ),
    Fault("learned positions one off", "position offset", edited(_learned), ("offset", "position")),
    Fault("scale of scores doubled", "scale", edited(positional(ATTENTION, 2, "2 * ({})")), _SCALE),
    Fault("scale of scores 1 % off", "scale", edited(positional(ATTENTION, 2, "1.01 * ({})")), _SCALE),
    Fault("scale of scores lost", "scale", edited(positional(ATTENTION, 2, "1.0")), _SCALE),
    Fault("softcap of scores lost", "softcap", edited(keyword(ATTENTION, "softcap", None)), _SCALE),
    Fault("softcap of scores doubled", "softcap", edited(keyword(ATTENTION, "softcap", "({0}) and 2 * ({0})")), _SCALE),
    Fault("window one longer", "window off by one", edited(_window("({0}) and ({0}) + 1")), ("window",)),
    Fault("window one shorter", "window off by one", edited(_window("({0}) and ({0}) - 1")), ("window",)),
    Fault("window lost", "window on the wrong layer", edited(_window("None")), ("window",)),
    Fault(
        "window on the other layers",
        "window on the wrong layer",
        replaced(_names_layer_type, lambda text: text.replace("==", "!=")),
        ("window",),
    ),
    Fault("sinks dropped", "sinks dropped", edited(keyword(ATTENTION, "sinks", "None")), ("sink",)),
    Fault(
        "ALiBi slopes in reverse",
        "slopes order",
        edited(keyword(ATTENTION, "alibi_slopes", "({0}).flip(0)")),
        ("alibi",),
    ),
    Fault("ALiBi slopes halved", "slopes order", edited(keyword(ATTENTION, "alibi_slopes", "0.5 * ({0})")), ("alibi",)),
    Fault(
        "key and value exchanged", "q/k/v order", edited(_other_arguments(1, 2)), ("exchanged", "v or", "position 0")
    ),
    Fault("query heads tiled", "KV head mapping", edited(_query("tiled({}, {self})"), _TILED), ("head",)),
    Fault("query negated", "scale", edited(_query("-{}")), (*_SCALE, "sign")),
    Fault("layers share one cache", "cache of another layer", edited(_first_cache), _DECODE),
    Fault("slot off by one", "slot mapping off by one", edited(passed(ATTENTION, -1, "faulty({})"), _SLOTS), _DECODE),
    Fault("stale block", "stale block", edited(passed(ATTENTION, -1, "faulty({})"), _BLOCKS + _STALE), _DECODE),
    Fault(
        "context one short in decode", "context length", edited(passed(ATTENTION, -1, "faulty({})"), _SHORT), _DECODE
    ),
    Fault(
        "chunks don't see the past", "context length", edited(passed(ATTENTION, -1, "faulty({})"), _CHUNK), ("chunk",)
    ),
    Fault(
        "positions stop at 36", "decode positions", edited(passed(ROPE, 0, "{}.clamp(max=36)")), _ROPE_WORDS + _DECODE
    ),
)
