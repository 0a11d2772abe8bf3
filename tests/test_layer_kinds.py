"""Decoders whose layers differ: rotated or not, one table of frequencies for each kind of layer."""

from functools import cache
from pathlib import Path

import pytest

from porter.convert import convert
from porter.runtime.attention.paged import PagedAttentionWithRoPE
from porter.source import Source, load

FILE = """
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


class RowanRotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        {frequencies}

    def forward(self, x, position_ids, layer_type=None):
        freqs = position_ids[..., None].float() * {table}
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos(), emb.sin()


class RowanAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.use_rope = {rotated}
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)

    def forward(self, hidden_states, position_embeddings, attention_mask):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.use_rope:
            cos, sin = position_embeddings
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            query = query * cos + rotate_half(query) * sin
            key = key * cos + rotate_half(key) * sin
        interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = interface(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))


class RowanModel(PreTrainedModel):
    config: RowanTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RowanRotary(config)
        self.layers = nn.ModuleList([RowanAttention(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden_states = self.embed_tokens(input_ids)
        masks = {{
            "full_attention": create_causal_mask(self.config, hidden_states, attention_mask, None),
            "sliding_attention": create_sliding_window_causal_mask(self.config, hidden_states, attention_mask, None),
        }}
        {positions}
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, {embeddings}, masks[self.config.layer_types[i]])
        return hidden_states


class RowanForCausalLM(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = RowanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.lm_head(self.model(input_ids, attention_mask, position_ids))
"""
INVERSE = "1.0 / ({base} ** (torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim))"
ONE_TABLE = {
    "frequencies": "self.register_buffer('inv_freq', "
    + INVERSE.format(base="config.rope_parameters['rope_theta']")
    + ", persistent=False)",
    "table": "self.inv_freq",
    "positions": "position_embeddings = self.rotary_emb(hidden_states, position_ids)",
    "embeddings": "position_embeddings",
    "rotated": "True",
}
TABLE_OF_EACH_TYPE = {
    "frequencies": """for layer_type in sorted(set(config.layer_types)):
            parameters = config.rope_parameters[layer_type]
            if parameters is None:
                continue
            setattr(self, f"{layer_type}_inv_freq", """
    + INVERSE.format(base="parameters['rope_theta']")
    + ")",
    "table": 'getattr(self, f"{layer_type}_inv_freq")',
    "positions": """position_embeddings = {}
        for layer_type in set(self.config.layer_types):
            position_embeddings[layer_type] = self.rotary_emb(hidden_states, position_ids, layer_type)""",
    "embeddings": "position_embeddings[self.config.layer_types[i]]",
}


@cache
def attention_line(**parts: str) -> str:
    source = Source("modeling_rowan.py", FILE.format(**{**ONE_TABLE, **parts}), Path("modeling_rowan.py"))
    code = " ".join(convert(source).code.split())
    assert "RowanTextConfig" not in code
    start = code.index("self.attn = ")
    return code[start : code.index(" def ", start)]


def test_a_decoder_that_always_rotates_has_no_condition() -> None:
    assert "rope_parameters=config.rope_parameters," in attention_line()


def test_layers_that_do_not_rotate_have_no_rope_parameters() -> None:
    """A flag of 1 means what the file's own test makes of it, whatever the field is called."""
    line = attention_line(rotated="config.no_rope_layers[layer_idx]")
    assert "rope_parameters=config.rope_parameters if config.no_rope_layers[layer_idx] else None" in line


def test_the_condition_of_rotation_is_not_turned_around() -> None:
    line = attention_line(rotated="config.layer_types[layer_idx] != 'full_attention'")
    assert "rope_parameters=None if config.layer_types[layer_idx] == 'full_attention' else" in line.replace('"', "'")


def test_each_kind_of_layer_has_its_own_frequencies() -> None:
    line = attention_line(**TABLE_OF_EACH_TYPE)
    assert "rope_parameters=config.rope_parameters[config.layer_types[layer_idx]]," in line


def test_a_kind_of_layer_without_frequencies_that_asks_for_them_has_no_path() -> None:
    """The original raises there, so that no condition remains."""
    assert "is None" not in attention_line(**TABLE_OF_EACH_TYPE).replace("window", "")


def test_a_layer_without_rope_parameters_leaves_queries_and_keys_alone() -> None:
    layer = PagedAttentionWithRoPE(2, 4, 0.5, rope_parameters=None, max_position=8)
    assert layer.rotary_emb is None


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("gemma3_text", "Gemma3ForCausalLM"), ("gpt-sw3", "GPT2LMHeadModel"), ("openai-gpt", "OpenAIGPTLMHeadModel")],
)
def test_a_model_type_without_a_folder_is_found_by_its_class(model_type: str, architecture: str) -> None:
    source = load(model_type)
    assert source.architecture == architecture
    assert f"class {architecture}(" in source.text
    assert source.config_text


def test_a_multimodal_model_type_is_its_text_model() -> None:
    assert load("gemma3").architecture is None
