"""Attention is read by what it computes: rotation, mask, ALiBi, layout, scale; refused where a reading would lie."""

import libcst as cst
import pytest

from porter.analyze.attention import find_cores
from porter.analyze.bias import standard_slopes
from porter.analyze.core import Core, NotUnderstood
from porter.analyze.interp import explore
from porter.analyze.poly import Poly
from porter.analyze.program import Program
from porter.analyze.scalars import text
from porter.analyze.values import Value

HEADS, KV_HEADS = Poly.symbol("config.num_heads"), Poly.symbol("config.num_kv_heads")

FILE = """
import math

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

{helpers}

class AlderAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.num_kv_heads = {kv}
        self.head_dim = config.head_dim
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
{layers}

    def forward(self, hidden_states, mask):
        batch, length, _ = hidden_states.shape
{project}
{between}
{scores}
        weights = torch.softmax(scores, dim=-1)
        output = torch.matmul(weights, value)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))


class AlderForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = AlderAttention(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        length = input_ids.shape[1]
        mask = {mask}
        return self.attention(hidden_states, mask)
"""
LAYERS = """
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)
"""
FUSED_LAYERS = """
        self.qkv = nn.Linear(config.hidden_size, 3 * self.num_heads * self.head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)
"""
PROJECT = """
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
"""
SCORES = "        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5 + mask\n"
CAUSAL = "create_causal_mask(self.config, hidden_states, None, None)"
SLIDING = "create_sliding_window_causal_mask(self.config, hidden_states, None, None)"
WINDOWED = (
    "(torch.arange(length) > torch.arange(length).reshape(-1, 1)).bitwise_or_("
    "torch.arange(length) <= torch.arange(length).reshape(-1, 1) - self.config.sliding_window) * -1e9"
)
CUT_WINDOW = f"({WINDOWED})[None, None][:, :, :, : torch.arange(length)[-1] + 1]"
TRIANGLE = "torch.full((length, length), -1e9).triu(1)[None, None]"

HALVES = """
def turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * torch.cat((cos, cos), dim=-1) + torch.cat((-b, a), dim=-1) * torch.cat((sin, sin), dim=-1)
"""
PAIRS = """
def turned(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
"""
BACKWARDS = HALVES.replace("torch.cat((-b, a), dim=-1)", "torch.cat((b, -a), dim=-1)")
ANGLES = """
        frequencies = 1.0 / (config_theta ** (torch.arange(0, {dim}, 2).float() / {dim}))
        angles = torch.outer(torch.arange(length).float(), frequencies)
        cos, sin = angles.cos()[None, None], angles.sin()[None, None]
""".replace("config_theta", "self.config.rope_theta")
TURN = """
        query, key = turned(query, cos, sin), turned(key, cos, sin)
"""
TURN_PART = """
        part = self.config.rotary_dim
        query = torch.cat((turned(query[..., :part], cos, sin), query[..., part:]), dim=-1)
        key = torch.cat((turned(key[..., :part], cos, sin), key[..., part:]), dim=-1)
"""
WHOLE = ANGLES.format(dim="self.head_dim") + TURN
PART = ANGLES.format(dim="self.config.rotary_dim") + TURN_PART

SLOPES = """
def slopes_of(heads):
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-8.0 / power)
    slopes = torch.pow(base, torch.arange(1, 1 + power))
    if power != heads:
        extra = 2.0 ** (-4.0 / power)
        rest = torch.pow(extra, torch.arange(1, 1 + 2 * (heads - power), 2))
        slopes = torch.cat([slopes, rest], dim=0)
    return slopes
"""
NAIVE_SLOPES = """
def slopes_of(heads):
    return torch.pow(2.0 ** (-8.0 / heads), torch.arange(1, 1 + heads))
"""
SLOPED = """
        bias = slopes_of(self.num_heads)[None, :, None, None] * torch.arange(length)[None, None, None, :]
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5 + bias + mask
"""


def file(
    kv: str = "config.num_heads",
    layers: str = LAYERS,
    project: str = PROJECT,
    between: str = "",
    scores: str = SCORES,
    mask: str = CAUSAL,
    helpers: str = "",
) -> str:
    return FILE.format(
        kv=kv, layers=layers, project=project, between=between, scores=scores, mask=mask, helpers=helpers
    )


def cores(source: str) -> list[Core]:
    """The attention of every path of a file."""
    return [core for world in explore(Program.read(cst.parse_module(source))).worlds for core in find_cores(world)]


def only(source: str) -> Core:
    (found,) = cores(source)
    return found


def factors(core: Core) -> list[tuple[str, str]]:
    return [(op, text(value)) for op, value in core.scale]


def test_plain_causal_attention() -> None:
    core = only(file())
    assert (core.heads, core.kv_heads, core.fused, core.rotation, core.alibi, core.softcap) == (
        HEADS,
        HEADS,
        "",
        None,
        None,
        None,
    )
    assert factors(core) == [("mul", "config.head_dim ** -0.5")]


def test_keys_shared_by_groups_are_counted_once() -> None:
    repeat = """
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
"""
    core = only(file(kv="config.num_kv_heads", between=repeat))
    assert (core.heads, core.kv_heads) == (HEADS, KV_HEADS)


def test_keys_expanded_by_groups_are_counted_once() -> None:
    repeat = """
        key = key[:, :, None].expand(batch, self.num_kv_heads, self.num_key_value_groups, length, self.head_dim)
        value = value[:, :, None].expand(batch, self.num_kv_heads, self.num_key_value_groups, length, self.head_dim)
        key = key.reshape(batch, self.num_heads, length, self.head_dim)
        value = value.reshape(batch, self.num_heads, length, self.head_dim)
"""
    assert only(file(kv="config.num_kv_heads", between=repeat)).kv_heads == KV_HEADS


def test_tiled_keys_are_refused() -> None:
    tile = """
        key = key.repeat(1, self.num_key_value_groups, 1, 1)
        value = value.repeat(1, self.num_key_value_groups, 1, 1)
"""
    with pytest.raises(NotUnderstood, match=r"order that is not (grouped|contiguous)"):
        cores(file(kv="config.num_kv_heads", between=tile))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ("torch.matmul(query * 0.25, key.transpose(2, 3)) + mask", []),
        ("torch.matmul(query, key.transpose(2, 3)) + mask", []),
        (
            "torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim) + mask",
            [("div", "sqrt(config.head_dim)")],
        ),
        ("torch.matmul(query, key.transpose(2, 3)) * self.config.scale + mask", [("mul", "config.scale")]),
    ],
    ids=["on the query", "none", "divided by a root", "of the config"],
)
def test_the_scale_is_the_one_that_the_scores_get(scores: str, expected: list[tuple[str, str]]) -> None:
    found = factors(only(file(scores=f"        scores = {scores}\n")))
    assert [(op, value.removeprefix("math.")) for op, value in found] == expected


@pytest.mark.parametrize(
    ("helpers", "between", "expected"),
    [
        (HALVES, WHOLE, (False, True)),
        (PAIRS, WHOLE, (True, True)),
        (HALVES, PART, (False, False)),
        (PAIRS, PART, (True, False)),
    ],
    ids=["halves", "pairs", "part by halves", "part by pairs"],
)
def test_a_rotation_is_told_by_what_it_turns(helpers: str, between: str, expected: tuple[bool, bool]) -> None:
    rotation = only(file(helpers=helpers, between=between)).rotation
    assert rotation is not None
    assert (rotation.interleaved, rotation.full) == expected


@pytest.mark.parametrize(
    ("helpers", "between"),
    [
        (BACKWARDS, WHOLE),
        (HALVES, WHOLE.replace("(0, self.head_dim, 2)", "(1, 1 + self.head_dim, 2)")),
        (HALVES, WHOLE.replace("torch.arange(length)", "torch.arange(1, 1 + length)")),
        (HALVES, WHOLE.replace(".float() / self.head_dim", ".float() / self.config.hidden_size")),
    ],
    ids=["backwards", "other frequencies", "shifted positions", "another exponent"],
)
def test_another_rotation_is_not_taken_for_the_standard_one(helpers: str, between: str) -> None:
    assert only(file(helpers=helpers, between=between)).rotation is None


def test_a_base_in_the_code_is_not_one_of_the_config() -> None:
    fixed = WHOLE.replace("self.config.rope_theta", "10000.0")
    rotations = [only(file(helpers=HALVES, between=each)).rotation for each in (WHOLE, fixed)]
    assert [r.from_config for r in rotations if r] == [True, False]


@pytest.mark.parametrize("mask", [CAUSAL, TRIANGLE, "torch.ones(length, length).tril().log()[None, None]"])
def test_a_causal_mask_however_it_is_made(mask: str) -> None:
    assert only(file(mask=mask)).window is None


def test_a_sliding_mask_gives_its_window() -> None:
    window = only(file(mask=SLIDING)).window
    assert window is not None
    assert text(window) == "config.sliding_window"


@pytest.mark.parametrize("mask", [WINDOWED, CUT_WINDOW])
def test_a_window_in_a_mask_that_the_file_computes_is_found(mask: str) -> None:
    found = only(file(mask=mask))
    assert found.masks_window
    assert found.window is not None
    assert text(found.window) == "config.sliding_window"


def test_a_window_that_is_no_config_field_is_refused() -> None:
    with pytest.raises(NotUnderstood, match="no field of the config"):
        cores(file(mask=WINDOWED.replace("self.config.sliding_window", "4")))


def test_a_condition_that_fills_scores_is_a_mask() -> None:
    filled = """
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        allowed = torch.ones(length, length).tril().bool()[None, None]
        scores = torch.where(allowed, scores, torch.finfo(torch.float32).min)
"""
    assert only(file(scores=filled)).alibi is None


@pytest.mark.parametrize(
    "mask",
    [
        "torch.zeros(1, 1, length, length)",
        "torch.full((length, length), -1e9).tril(-1)[None, None]",
        "torch.full((length, length), -1e9).triu(0)[None, None]",
        "torch.full((length, length), -1e9).triu(2)[None, None]",
    ],
    ids=["none", "looks ahead", "not itself", "one ahead"],
)
def test_a_mask_that_is_not_causal_is_refused(mask: str) -> None:
    with pytest.raises(NotUnderstood, match="causal"):
        cores(file(mask=mask))


def test_no_mask_is_refused() -> None:
    bare = "        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5\n"
    with pytest.raises(NotUnderstood, match="no causal mask"):
        cores(file(scores=bare))


@pytest.mark.parametrize("mask", [CAUSAL, TRIANGLE])
def test_standard_alibi_is_recognised(mask: str) -> None:
    core = only(file(helpers=SLOPES, scores=SLOPED, mask=mask).replace("if power != heads:", "if False:"))
    assert core.alibi is not None
    assert factors(core) == [("mul", "config.head_dim ** -0.5")]


def test_alibi_for_a_head_count_that_is_no_power_of_two() -> None:
    found = cores(file(helpers=SLOPES, scores=SLOPED))
    assert [core.alibi is not None for core in found] == [True] * len(found)


def test_slopes_for_six_heads() -> None:
    assert standard_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]


def test_slopes_for_eight_heads() -> None:
    assert standard_slopes(8) == [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize(
    "bias",
    [
        "slopes_of(self.num_heads)[None, :, None, None] * torch.arange(length)[None, None, None, :] ** 2",
        "torch.arange(length)[None, None, None, :] * 0.5",
        "slopes_of(self.num_heads)[None, :, None, None] * torch.arange(length)[None, None, None, :] * 2",
    ],
    ids=["squared", "one slope", "steeper"],
)
def test_a_bias_that_is_no_alibi_is_refused(bias: str) -> None:
    helpers = SLOPES.replace("if power != heads:", "if False:")
    scores = f"""
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5 + {bias} + mask
"""
    with pytest.raises(NotUnderstood, match="not ALiBi"):
        cores(file(helpers=helpers, scores=scores))


def test_a_learned_bias_is_refused() -> None:
    layers = LAYERS + "        self.bias = nn.Parameter(torch.zeros(1, config.num_heads, 1, 1))\n"
    with pytest.raises(NotUnderstood, match="added to the scores"):
        cores(file(layers=layers, scores=SCORES.replace("+ mask", "+ self.bias + mask")))


def test_a_softcap_comes_after_the_scale_and_before_the_mask() -> None:
    capped = """
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        scores = self.config.cap * torch.tanh(scores / self.config.cap)
        scores = scores + mask
"""
    core = only(file(scores=capped))
    assert core.softcap is not None
    assert (text(core.softcap), factors(core)) == ("config.cap", [("mul", "config.head_dim ** -0.5")])


@pytest.mark.parametrize(
    "line",
    [
        "scores = self.config.cap * torch.tanh(scores)",
        "scores = self.config.cap * torch.tanh(scores / self.config.other)",
        "scores = torch.sigmoid(scores)",
    ],
    ids=["not divided", "by another cap", "sigmoid"],
)
def test_another_squashing_of_the_scores_is_refused(line: str) -> None:
    scores = f"""
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        {line}
        scores = scores + mask
"""
    with pytest.raises(NotUnderstood):
        cores(file(scores=scores))


def test_a_softcap_after_the_mask_is_refused() -> None:
    """The cap would lift masked scores back into view."""
    scores = """
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5 + mask
        scores = self.config.cap * torch.tanh(scores / self.config.cap)
"""
    with pytest.raises(NotUnderstood):
        cores(file(scores=scores))


LAYOUTS = {
    "contiguous": """
        query, key, value = self.qkv(hidden_states).split(self.num_heads * self.head_dim, dim=-1)
        query = query.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = key.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        value = value.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
""",
    "grouped": """
        fused = self.qkv(hidden_states).view(batch, length, self.num_heads, 3, self.head_dim)
        query, key = fused[..., 0, :].transpose(1, 2), fused[..., 1, :].transpose(1, 2)
        value = fused[..., 2, :].transpose(1, 2)
""",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_a_fused_projection(layout: str) -> None:
    assert only(file(layers=FUSED_LAYERS, project=LAYOUTS[layout])).fused == layout


def test_heads_side_by_side_in_three_parts_are_grouped() -> None:
    project = """
        fused = self.qkv(hidden_states).view(batch, length, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
"""
    assert only(file(layers=FUSED_LAYERS, project=project)).fused == "grouped"


def test_heads_whose_dims_lie_apart_are_refused() -> None:
    project = LAYOUTS["grouped"].replace(
        "self.num_heads, 3, self.head_dim)", "self.num_heads, self.head_dim, 3).transpose(3, 4)"
    )
    with pytest.raises(NotUnderstood, match="neither contiguous nor in groups"):
        cores(file(layers=FUSED_LAYERS, project=project))


def test_values_before_keys_is_a_layout_of_its_own() -> None:
    project = LAYOUTS["contiguous"].replace("query, key, value = ", "query, value, key = ")
    assert only(file(layers=FUSED_LAYERS, project=project)).fused == "1 qvk"


BLOCKS = """
        blocks = self.qkv(hidden_states).reshape(batch, length, {blocks}, -1)
        query, value, key = torch.split(blocks, self.num_heads * self.head_dim // {blocks}, dim=-1)
        query = query.reshape(batch, length, -1, self.head_dim).transpose(1, 2)
        key = key.reshape(batch, length, -1, self.head_dim).transpose(1, 2)
        value = value.reshape(batch, length, -1, self.head_dim).transpose(1, 2)
"""


@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_of_heads_are_counted(blocks: int) -> None:
    """At as many heads as blocks, one block for each head fits too: the number shows at twice as many."""
    core = only(file(layers=FUSED_LAYERS, project=BLOCKS.format(blocks=blocks)))
    assert core.fused == f"{blocks} qvk"


ZEROED = """
        kept = torch.tril(torch.ones(length, length))[None, None]
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        scores = scores * {factor} + -1e4 * (1 - kept)
"""


def test_scores_zeroed_where_the_mask_hides_them() -> None:
    core = only(file(scores=ZEROED.format(factor="kept"), mask="None"))
    assert factors(core) == [("mul", "config.head_dim ** -0.5")]


@pytest.mark.parametrize("factor", ["(kept + 1)", "torch.tril(torch.ones(length, length), -1)[None, None]"])
def test_scores_changed_where_a_token_may_look_are_refused(factor: str) -> None:
    with pytest.raises(NotUnderstood, match="neither a number nor a mask"):
        cores(file(scores=ZEROED.format(factor=factor), mask="None"))


LATER = """
        query = query * (1 + torch.log(1 + torch.floor(torch.arange(length) / {limit})))[None, None, :, None]
"""


def test_queries_that_grow_beyond_the_length_of_training_are_no_plain_rotation() -> None:
    """On short sequences the factor is 1; the runtime's rotation would be right up to there only."""
    limit = "self.config.original_max_position_embeddings"
    plain, scaled = (only(file(helpers=HALVES, between=WHOLE + more)) for more in ("", LATER.format(limit=limit)))
    assert plain.rotation is not None
    assert scaled.rotation is None


def test_a_softmax_over_scores_of_unknown_layout_is_refused() -> None:
    """Otherwise the path would seem to have no attention, and the port would lose its mask."""
    with pytest.raises(NotUnderstood, match="unfathomable"):
        cores(file(scores=SCORES + "        scores = torch.unfathomable(scores)\n"))


def test_a_window_cut_out_by_exclusive_or() -> None:
    mask = """(1.0 - torch.bitwise_xor(
            torch.tril(torch.ones(length, length)), torch.tril(torch.ones(length, length), -self.config.sliding_window)
        )) * -1e9"""
    core = only(file(mask=mask))
    assert core.window is not None
    assert text(core.window) == "config.sliding_window"


def test_heads_in_another_order_are_laid_out_by_the_file() -> None:
    project = PROJECT.replace(
        "self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)",
        "self.q_proj(hidden_states).view(batch, length, self.head_dim, self.num_heads).permute(0, 3, 1, 2)",
    )
    core = only(file(project=project))
    assert [source.op for source in core.sources] == ["permute", "linear", "linear"]


def test_values_of_another_size_than_keys() -> None:
    project = PROJECT.replace("self.v_proj(hidden_states)", "self.k_proj(hidden_states)").replace(
        "value = self.k_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)",
        "value = self.k_proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim)[..., : config_part]",
    )
    core = only(file(project=project.replace("config_part", "self.config.part")))
    assert (core.head_dim, core.v_head_dim) == (Poly.symbol("config.head_dim"), Poly.symbol("config.part"))
    assert [source.op for source in core.sources] == ["linear", "linear", "getitem"]


def scored(*lines: str) -> str:
    """A file whose scores come from these lines; `product` is the scaled product of queries and keys."""
    product = "product = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5"
    return file(scores="\n".join(f"        {line}" for line in (product, *lines)))


@pytest.mark.parametrize(
    "lines",
    [
        ["scores = product.clamp(-5.0, 5.0) + mask"],
        ["scores = torch.maximum(product, torch.zeros_like(product)) + mask"],
        ["future = torch.ones(length, length).triu(1).bool()[None, None]", "scores = product.masked_fill(future, 0.0)"],
        [
            "future = torch.ones(length, length).triu(1).bool()[None, None]",
            "scores = torch.where(future, product, -1e9)",
        ],
        ["scores = product**2 + mask"],
        ["scores = product.abs() + mask"],
    ],
    ids=["clamped", "cut at zero", "filled with zero", "filled the wrong way", "squared", "absolute"],
)
def test_scores_that_are_changed_in_another_way_are_refused(lines: list[str]) -> None:
    with pytest.raises(NotUnderstood):
        cores(scored(*lines))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=1)"),
        ("torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-2)"),
        ("torch.softmax(scores, dim=-1)", "torch.softmax(scores, dim=-1).masked_fill(scores > 0, 0.0)"),
        ("torch.matmul(weights, value)", "torch.matmul(weights.transpose(2, 3), value)"),
        ("torch.matmul(weights, value)", "torch.matmul(weights, value) * 2"),
    ],
    ids=["softmax over heads", "softmax over queries", "weights left out", "turned round", "doubled"],
)
def test_another_weighted_sum_is_not_taken_for_attention(old: str, new: str) -> None:
    """Refused, not found, or found with the change left outside of it."""
    source = file()
    assert old in source
    try:
        found = cores(source.replace(old, new))
    except NotUnderstood:
        return
    assert [core for core in found if "* 2" not in new] == []


def test_the_left_side_of_the_scores_are_the_queries_whatever_their_name() -> None:
    swapped = file().replace("torch.matmul(query, key.transpose(2, 3))", "torch.matmul(key, query.transpose(2, 3))")
    assert _projection(cores(swapped)[0].query) == _projection(cores(file())[0].key)


def _projection(value: Value) -> str:
    return next(str(v.attrs["layer"].path) for v in value.walk() if v.op == "linear")


COMPLEX = """
def turned(x, angles):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)
"""


def test_a_rotation_by_complex_numbers_is_of_pairs() -> None:
    turn = """
        angles = angles[None, None]
        query, key = turned(query, angles), turned(key, angles)
"""
    core = only(file(helpers=COMPLEX, between=ANGLES.format(dim="self.head_dim") + turn))
    assert core.rotation is not None
    assert (core.rotation.interleaved, core.rotation.full) == (True, True)
