"""Ways to convert a model into one that runs and computes something else. Each test is one of them."""

from functools import cache
from pathlib import Path
from typing import Any

import libcst as cst
import pytest
import torch

from porter.analyze.interp import explore
from porter.analyze.program import Program
from porter.convert import convert
from porter.errors import Refusal
from porter.passes.base import discover
from porter.source import Source

FILE = """
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

{helpers}

class PineAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.sliding_window = config.sliding_window
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)

    def forward(self, hidden_states, attention_mask):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = (self.q_proj(hidden_states){scaled_query}).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = interface(self, query, key, value, attention_mask, {arguments})
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))


class PineMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(torch.tanh(self.up_proj(hidden_states)))


class PineBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = PineAttention(config, layer_idx)
        self.mlp = PineMLP(config)
        self.input_layernorm = {norm}

    def forward(self, hidden_states, attention_mask):
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, attention_mask)
        return hidden_states + {mlp}


class PineModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = {embedding}
        self.embed_positions = {table}
        self.layers = nn.ModuleList([PineBlock(config, i) for i in range(config.num_hidden_layers)])
        self.dropout = config.dropout

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden_states = self.embed_tokens(input_ids)
        {positions}
        mask = {mask}
        for layer in {layers}:
            hidden_states = layer(hidden_states, mask)
        return hidden_states


class PineForCausalLM(nn.Module):
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = PineModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias={head_bias})

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden_states = self.model(input_ids, attention_mask, position_ids)
        logits = self.lm_head(hidden_states)
        return logits{logits}
"""
PLAIN = {
    "helpers": "",
    "scaled_query": "",
    "arguments": "scaling=self.scaling",
    "norm": "nn.LayerNorm(config.hidden_size)",
    "mlp": "self.mlp(hidden_states)",
    "embedding": "nn.Embedding(config.vocab_size, config.hidden_size)",
    "table": "nn.Embedding(config.max_position_embeddings, config.hidden_size)",
    "positions": "hidden_states = hidden_states + self.embed_positions(position_ids)",
    "mask": "create_causal_mask(self.config, hidden_states, attention_mask, None)",
    "layers": "self.layers",
    "head_bias": "False",
    "logits": "",
}


def file(**parts: str) -> str:
    """The plain decoder, with some of its parts written in another way."""
    return FILE.format(**{**PLAIN, **parts})


@cache
def port(**parts: str) -> str:
    """The port of such a decoder, its lines joined so that a search does not depend on line breaks."""
    source = Source("modeling_pine.py", file(**parts), Path("modeling_pine.py"))
    return " ".join(convert(source).code.split())


def attention_line(**parts: str) -> str:
    code = port(**parts)
    start = code.index("self.attn = ")
    return code[start : code.index(" def ", start)]


def apply(name: str, source: str) -> str:
    each = next(p for p in discover() if p.name == name)
    return each.apply(explore(Program.read(cst.parse_module(source)), flat=each.flat)).code


# -- scale, softcap, window --------------------------------------------------------------------------------------------


def test_a_query_scaled_before_attention_is_not_scaled_again() -> None:
    parts = {"scaled_query": " * self.scaling", "arguments": "scaling=1.0"}
    assert "self.head_dim, 1.0," in attention_line(**parts)
    assert "self.scaling" in port(**parts).split("def forward")[1]


def test_a_scale_that_init_sets_but_the_call_does_not_pass_is_not_used() -> None:
    assert "self.scaling" not in attention_line(arguments="scaling=self.config.attention_multiplier")


def test_a_softcap_that_init_sets_but_the_call_does_not_pass_is_not_used() -> None:
    assert "softcap" not in attention_line()


def test_a_softcap_that_the_call_passes_is_used() -> None:
    assert "softcap=self.softcap" in attention_line(arguments="scaling=self.scaling, softcap=self.softcap")


def test_a_window_that_only_the_call_mentions_limits_nothing() -> None:
    """Eager attention obeys the mask alone."""
    line = attention_line(arguments="scaling=self.scaling, sliding_window=self.sliding_window")
    assert "sliding_window" not in line


def test_a_window_that_only_the_mask_has_is_kept() -> None:
    line = attention_line(mask="create_sliding_window_causal_mask(self.config, hidden_states, attention_mask, None)")
    assert "sliding_window=" in line


def test_a_bidirectional_mask_is_not_dropped() -> None:
    with pytest.raises(Refusal, match="causal"):
        port(mask="None", arguments="scaling=self.scaling, is_causal=False")


def test_an_unknown_argument_of_attention_is_refused() -> None:
    with pytest.raises(Refusal, match="position_bias"):
        port(arguments="scaling=self.scaling, position_bias=hidden_states")


def test_activations_from_a_table_of_the_file_keep_the_names_of_the_table() -> None:
    """What a file calls gelu may be another one than the config's usual word for it."""
    helpers = """
from transformers.activations import gelu_new

KINDS = {"plain": nn.ReLU(), "gelu": gelu_new}

"""
    source = file(helpers=helpers).replace("torch.tanh(", "KINDS[self.act](")
    made = source.replace("self.up_proj = ", "self.act = config.kind\n        self.up_proj = ")
    code = " ".join(convert(Source("modeling_pine.py", made, Path("modeling_pine.py"))).code.split())
    assert 'KINDS = {"plain": nn.ReLU(), "gelu": get_act_fn("gelu_new")}' in code
    assert "KINDS[self.act](self.up_proj(hidden_states))" in code


def test_attention_that_only_some_paths_have_where_heads_are_merged_is_refused() -> None:
    """The layer would take the place of what the other paths compute too."""
    call = "output, _ = interface(self, query, key, value, attention_mask, scaling=self.scaling)"
    source = file().replace(
        f"        {call}",
        f"        if self.config.attends:\n            {call}\n"
        "        else:\n            output = torch.tanh(value).transpose(1, 2)",
    )
    with pytest.raises(Refusal, match=r"no attention was recognised when not config\.attends"):
        convert(Source("modeling_pine.py", source, Path("modeling_pine.py")))


# -- positions ---------------------------------------------------------------------------------------------------------


HEAD_NORM = """
class HeadNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states):
        spread = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(spread + 1e-6)
"""


def test_a_norm_over_heads_that_only_some_configs_have_is_given_heads() -> None:
    """On the path without it q is split into heads for attention alone; on the other one the norm needs them."""
    changes = {
        "        self.o_proj =": "        self.norms = config.norms\n        if self.norms:\n"
        "            self.q_norm = HeadNorm((config.num_attention_heads, self.head_dim))\n        self.o_proj =",
        "query = (self.q_proj(hidden_states)).view(shape).transpose(1, 2)": "query = self.q_proj(hidden_states)"
        ".view(shape)\n        if self.norms:\n            query = self.q_norm(query)\n"
        "        query = query.transpose(1, 2)",
    }
    text = file(helpers=HEAD_NORM)
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    code = convert(Source("modeling_pine.py", text, Path("modeling_pine.py"))).code
    assert "self.q_norm = HeadNorm(" in code
    assert "query = self.q_proj(hidden_states).view(" in code


def test_positions_counted_over_the_sequence_become_the_engines_positions() -> None:
    code = port(
        positions="""places = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        hidden_states = hidden_states + self.embed_positions(places)"""
    )
    assert "self.embed_positions(positions)" in code
    assert "arange" not in code


def test_an_offset_into_the_position_table_stays() -> None:
    code = port(positions="hidden_states = hidden_states + self.embed_positions(position_ids + 2)")
    assert "self.embed_positions(positions + 2)" in code


def test_an_offset_inside_a_position_table_of_its_own_class_stays() -> None:
    helpers = """
class PinePositions(nn.Embedding):
    def __init__(self, count, width):
        self.offset = 2
        super().__init__(count + self.offset, width)

    def forward(self, position_ids):
        return super().forward(position_ids + self.offset)

"""
    table = "PinePositions(config.max_position_embeddings, config.hidden_size)"
    code = port(helpers=helpers, table=table)
    assert "super().forward(positions + self.offset)" in code
    assert "count + self.offset" in code


def test_an_offset_that_is_counted_in_another_class_is_added_once() -> None:
    """Both the sum and what it is looked up with count from 2 on."""
    helpers = """
class PineTable(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.offset = 2
        self.weights = nn.Buffer(torch.arange(count + self.offset).float()[:, None] / (torch.arange(width) + 1))

    def forward(self, position_ids):
        batch, length = position_ids.size()
        position_ids = position_ids + self.offset
        return self.weights.index_select(0, position_ids.view(-1)).view(batch, length, self.weights.shape[-1])

"""
    places = "torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)"
    code = port(
        helpers=helpers,
        table="PineTable(config.max_position_embeddings, config.hidden_size)",
        positions=f"hidden_states = hidden_states + self.embed_positions({places})",
    )
    assert "self.weights.index_select(0, positions + 2)" in code
    assert code.count("positions +") == 1


def test_positions_counted_from_the_mask_do_not_run_on_from_sequence_to_sequence() -> None:
    code = port(
        positions="""
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, device=input_ids.device)
        places = (torch.cumsum(attention_mask, dim=1) * attention_mask).long() - 1
        hidden_states = hidden_states + self.embed_positions(places)"""
    )
    assert "self.embed_positions(positions)" in code
    assert "cumsum" not in code


@pytest.mark.parametrize("ids", ["input_ids", "input_ids.view(-1, input_ids.shape[-1])"])
def test_positions_that_the_file_counts_from_a_padding_id_on_keep_that_start(ids: str) -> None:
    """Nobody gives the original positions; it counts from padding_idx + 1 on, and a plain count would be other rows."""
    code = port(
        positions=f"""
        if position_ids is None:
            mask = {ids}.ne(self.config.pad_token_id).int()
            position_ids = (torch.cumsum(mask, dim=1) * mask).long() + self.config.pad_token_id
        hidden_states = hidden_states + self.embed_positions(position_ids)"""
    )
    assert "positions + 1 + self.config.pad_token_id" in code.replace("(", "").replace(")", "")
    assert "cumsum" not in code


def test_a_token_type_that_nobody_gives_is_zero_for_every_token() -> None:
    code = port(
        positions="""types = torch.zeros(input_ids.size(), dtype=torch.long, device=input_ids.device)
        hidden_states = hidden_states + self.embed_positions(types)"""
    )
    assert "self.embed_positions(torch.zeros_like(positions))" in code


def test_a_variable_called_positions_is_not_taken_for_the_engines() -> None:
    code = port(
        positions="""positions = self.embed_positions(position_ids)
        hidden_states = hidden_states * positions + positions"""
    )
    assert "own_positions = self.embed_positions(positions)" in code
    assert "hidden_states * own_positions + own_positions" in code


def test_a_copy_of_the_config_has_what_is_set_on_it_and_the_original_has_not() -> None:
    helpers = "import copy"
    with_copy = attention_line(helpers=helpers, arguments="scaling=copy.deepcopy(self.config).attention_multiplier")
    assert "config.attention_multiplier" in with_copy


def test_a_running_sum_over_the_sequence_is_refused() -> None:
    with pytest.raises(Refusal, match="along the sequence"):
        port(positions="hidden_states = torch.cumsum(hidden_states, dim=1)")


def test_a_convolution_along_the_sequence_is_refused_by_the_kind_of_cache_that_it_needs() -> None:
    with pytest.raises(Refusal, match="a convolution along the sequence") as caught:
        port(
            norm="nn.Conv1d(config.hidden_size, config.hidden_size, 4, groups=config.hidden_size, padding=3)",
            positions="hidden_states = hidden_states.transpose(1, 2)[:, :, : input_ids.shape[1]].transpose(1, 2)",
        )
    assert caught.value.code == "P201"


@pytest.mark.parametrize(
    "line",
    [
        "hidden_states = hidden_states - hidden_states.mean(dim=1, keepdim=True)",
        "hidden_states = hidden_states + torch.roll(hidden_states, 1, dims=1)",
        "hidden_states = torch.cat([hidden_states[:, :1], hidden_states[:, 1:]], dim=1)",
        "hidden_states = hidden_states.flip(1)",
        "hidden_states = hidden_states / hidden_states.shape[1]",
        "hidden_states = hidden_states / hidden_states.norm()",
        "hidden_states = hidden_states[:, -1:] + hidden_states",
        "hidden_states = hidden_states.transpose(0, 1).softmax(0).transpose(0, 1)",
        "hidden_states = hidden_states / hidden_states.max()",
        "hidden_states = hidden_states - hidden_states.mean()",
        "hidden_states = hidden_states / torch.sum(hidden_states)",
        "hidden_states = hidden_states.cumprod(1)",
        "hidden_states = torch.tril(hidden_states)",
        "hidden_states = F.layer_norm(hidden_states, hidden_states.shape[1:])",
        "hidden_states = hidden_states + self.embed_tokens(torch.roll(input_ids, 1, 1))",
    ],
)
def test_an_operation_that_mixes_tokens_is_refused(line: str) -> None:
    with pytest.raises(Refusal):
        port(positions=line)


def test_positions_that_are_cut_off_are_not_taken_for_plain_ones() -> None:
    """Up to the cut they look alike."""
    cut = "hidden_states = hidden_states + self.embed_positions(position_ids.clamp(max=7))"
    assert "clamp(max=7)" in port(positions=cut)


# -- norms, embeddings, logits -----------------------------------------------------------------------------------------


def test_a_layer_norm_is_not_taken_for_an_rms_norm_by_its_name() -> None:
    assert "self.input_layernorm = nn.LayerNorm(config.hidden_size)" in port()


@pytest.mark.parametrize(
    "norm",
    [
        "nn.LayerNorm(config.hidden_size, eps=config.norm_eps)",
        "nn.LayerNorm(config.hidden_size, bias=False)",
        "nn.RMSNorm(config.hidden_size, eps=1e-3)",
    ],
)
def test_eps_and_bias_of_a_norm_stay(norm: str) -> None:
    assert norm in port(norm=norm)


def test_an_rms_norm_with_a_bias_stays_as_it_is() -> None:
    helpers = """
class PineNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype) + self.bias

"""
    code = port(helpers=helpers, norm="PineNorm(config.hidden_size)")
    assert "self.input_layernorm = PineNorm(config.hidden_size)" in code


def test_a_norm_keeps_the_default_eps_of_its_class() -> None:
    helpers = """
class PineNorm(nn.Module):
    def __init__(self, width, eps=1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

"""
    assert "RMSNorm(config.hidden_size, eps=1e-3)" in port(helpers=helpers, norm="PineNorm(config.hidden_size)")


SCALED = """
class PineEmbedding(nn.Embedding):
    def __init__(self, count, width, scale):
        super().__init__(count, width)
        self.scale = scale

    def forward(self, input_ids):
        return super().forward(input_ids) * self.scale

"""


def test_a_scaled_embedding_keeps_its_scale_and_leaves_the_tied_head_alone() -> None:
    embedding = "PineEmbedding(config.vocab_size, config.hidden_size, math.sqrt(config.hidden_size))"
    code = port(helpers=SCALED, embedding=embedding)
    assert "* self.scale" in code
    assert "math.sqrt(config.hidden_size)" in code
    assert "return self.lm_head(hidden_states)" in code


def test_a_scale_of_the_embeddings_in_the_model_stays() -> None:
    assert "* self.config.embed_scale" in port(positions="hidden_states = hidden_states * self.config.embed_scale")


def test_a_bias_of_the_head_stays() -> None:
    assert "ParallelLMHead(config.vocab_size, config.hidden_size, bias=True" in port(head_bias="True")


def test_what_happens_to_the_logits_happens_in_compute_logits() -> None:
    code = port(logits=" * self.config.logit_scale")
    assert "self.config.logit_scale" in code.split("def compute_logits")[1]


# -- structure ---------------------------------------------------------------------------------------------------------


def test_dropout_goes_and_what_it_wraps_stays() -> None:
    code = port(mlp="F.dropout(self.mlp(hidden_states), p=0.1, training=self.training)")
    assert "hidden_states + self.mlp(hidden_states)" in code
    assert "dropout(" not in code


def test_dropout_in_a_sequence_of_modules_does_not_shift_the_names_of_the_others() -> None:
    """Checkpoints number the modules of a Sequential: the second linear is `norm.2`."""
    norm = (
        "nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Dropout(0.1), "
        "nn.Linear(config.hidden_size, config.hidden_size))"
    )
    try:
        code = port(norm=norm)
    except Refusal:
        return
    assert "nn.Dropout(0.1)" in code or "nn.Identity()" in code


@pytest.mark.parametrize(
    "layers", ["self.layers[:-1]", "self.layers[1:]", "self.layers[: self.config.num_used_layers]"]
)
def test_layers_that_a_slice_leaves_out_are_not_run(layers: str) -> None:
    try:
        code = port(layers=layers)
    except Refusal:
        return
    assert layers.replace(" ", "") in code.replace(" ", "")


def test_layers_in_reverse_are_not_run_forwards() -> None:
    try:
        code = port(layers="reversed(self.layers)")
    except Refusal:
        return
    assert "reversed(" in code


def test_a_flag_of_the_config_stays_a_choice_of_the_port() -> None:
    code = port(
        positions="""if self.config.use_positions:
            hidden_states = hidden_states + self.embed_positions(position_ids)"""
    )
    assert "if self.config.use_positions:" in code


def test_an_operation_in_place_on_what_is_read_later_stays() -> None:
    code = port(positions="hidden_states.mul_(2.0)")
    assert "hidden_states.mul_(2.0)" in code


def test_positive_dims_count_from_the_front_of_a_token() -> None:
    code = port(positions="hidden_states = hidden_states.softmax(dim=2)")
    assert "softmax(dim=-1)" in code or "softmax(dim=1)" in code


def test_a_split_along_a_positive_dim_is_one_along_features() -> None:
    code = port(
        positions="""left, right = hidden_states.chunk(2, dim=2)
        hidden_states = torch.cat((right, left), dim=2)"""
    )
    assert "chunk(2, dim=-1)" in code
    assert "dim=-1)" in code.split("torch.cat")[1]


def test_a_name_that_stands_for_two_things_is_followed() -> None:
    code = port(
        positions="""position_ids = self.embed_positions(position_ids)
        hidden_states = hidden_states + position_ids"""
    )
    assert "self.embed_positions(positions)" in code


def test_a_head_that_is_not_last_is_refused() -> None:
    with pytest.raises(Refusal):
        convert(
            Source("modeling_pine.py", file().replace("self.lm_head(hidden_states)", "hidden_states"), Path("x.py"))
        )


# -- weights -----------------------------------------------------------------------------------------------------------


def resolution(rules: Any, shapes: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> Any:
    from porter.runtime.resolution import ParameterIndex, resolve

    model = torch.nn.Module()
    for path, size in shapes.items():
        *above, leaf = path.split(".")
        inner = model
        for part in above:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(leaf, torch.nn.Parameter(torch.empty(size, device="meta")))
    return resolve(name, shape, rules, ParameterIndex.from_model(model))


def test_packing_matches_whole_names_only() -> None:
    """`v_proj` is part of `kv_proj`, and a `gate_proj` of attention is none of the MLP."""
    from porter.runtime.loader import WeightRules

    rules = WeightRules(
        packed={
            "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
            "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
        }
    )
    shapes: dict[str, tuple[int, ...]] = {"attention.kv_proj.weight": (4, 4), "attention.gate_proj.weight": (4, 4)}
    for name in shapes:
        found = resolution(rules, shapes, name, (4, 4))
        assert (found.parameter, found.shard_id) == (name, None)


def test_a_square_conv1d_weight_is_transposed() -> None:
    from porter.runtime.loader import WeightRules

    rules = WeightRules(transposed=("c_proj",))
    found = resolution(rules, {"attn.c_proj.weight": (4, 4)}, "attn.c_proj.weight", (4, 4))
    assert found.transposed


def test_a_conv1d_is_named_as_transposed_by_its_port() -> None:
    text = file().replace(
        "self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)",
        "self.o_proj = Conv1D(config.hidden_size, config.num_attention_heads * self.head_dim)",
    )
    text = text.replace("import math\n", "import math\nfrom transformers.pytorch_utils import Conv1D\n")
    rules = convert(Source("modeling_pine.py", text, Path("modeling_pine.py"))).manifest["spec"]["weight_rules"]
    assert list(rules["transposed"]) == ["o_proj"]


def test_the_head_is_tied_by_the_checkpoint_and_config_not_by_the_port() -> None:
    source = Source("modeling_pine.py", file(), Path("modeling_pine.py"))
    rules = convert(source).manifest["spec"]["weight_rules"]
    assert rules["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "tie_weights" not in port()


# -- caches ------------------------------------------------------------------------------------------------------------


def caches(source: str) -> list[str]:
    """The cache that each call of an attention layer gets, as written; empty if the file is refused."""
    try:
        code = convert(Source("modeling_pine.py", source, Path("modeling_pine.py"))).code
    except Refusal:
        return []
    return [line.strip() for line in code.splitlines() if "kv_caches[" in line or "(kv_cache, " in line]


def test_two_attentions_of_one_block_do_not_share_a_cache() -> None:
    source = file().replace(
        "        self.mlp = PineMLP(config)\n",
        "        self.mlp = PineMLP(config)\n        self.second = PineAttention(config, layer_idx)\n",
    )
    source = source.replace(
        "        return hidden_states + self.mlp(hidden_states)",
        "        hidden_states = hidden_states + self.second(hidden_states, attention_mask)\n"
        "        return hidden_states + self.mlp(hidden_states)",
    )
    assert "self.second(" in source
    assert caches(source) == []


def test_a_layer_that_runs_twice_does_not_share_its_cache() -> None:
    once = "            hidden_states = layer(hidden_states, mask)\n"
    assert caches(file().replace(once, once * 2)) == []


def test_two_stacks_of_layers_do_not_share_caches() -> None:
    stack = "[PineBlock(config, i) for i in range(config.num_hidden_layers)])\n"
    source = file().replace(stack, f"{stack}        self.more = nn.ModuleList({stack}")
    source = source.replace(
        "        return hidden_states\n\n\nclass PineForCausalLM",
        "        for layer in self.more:\n            hidden_states = layer(hidden_states, mask)\n"
        "        return hidden_states\n\n\nclass PineForCausalLM",
    )
    assert "in self.more" in source
    assert caches(source) == []


def test_heads_that_a_norm_brings_together_are_not_split_over_ranks() -> None:
    """Each rank would take the norm over its own heads only."""
    plain = file()
    normed = plain.replace(
        "return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))",
        "return self.o_proj(self.sub_norm(output.reshape(*hidden_states.shape[:-1], -1)))",
    ).replace(
        "        self.q_proj =", "        self.sub_norm = nn.LayerNorm(config.hidden_size)\n        self.q_proj ="
    )
    assert normed.count("sub_norm") == 2
    converted = [convert(Source("modeling_pine.py", text, Path("modeling_pine.py"))).code for text in (plain, normed)]
    assert ["QKVParallelLinear(" in code for code in converted] == [True, False]
