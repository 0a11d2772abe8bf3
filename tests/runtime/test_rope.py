"""RoPE against transformers: frequencies of every type, configs of every era, and the rotation itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from porter.runtime.errors import ConfigError
from porter.runtime.layers.rope import RotaryEmbedding, get_rope_parameters, get_rotary_dim, max_model_len, rope_init

FACTORS = {"short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [4.0 + i for i in range(16)]}
TYPES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"factor": 2.5}, {"factor": 4.0, "partial_rotary_factor": 0.5}],
    "dynamic": [{"factor": 2.0}],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 512},
        {"factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.3},
        {"factor": None, "original_max_position_embeddings": 512},
    ],
    "longrope": [
        {**FACTORS, "original_max_position_embeddings": 512},
        {**FACTORS, "original_max_position_embeddings": 4096, "factor": 8.0},
        {**FACTORS, "original_max_position_embeddings": 512, "attention_factor": 1.2},
    ],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    ],
    "proportional": [{"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.5, "factor": 2.0}],
}
CASES = [(kind, settings) for kind, cases in TYPES.items() for settings in cases]


def test_every_type_of_transformers_is_known() -> None:
    assert set(TYPES) == set(ROPE_INIT_FUNCTIONS)


def make_config(kind: str, settings: dict[str, Any]) -> LlamaConfig:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=2048)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 50000.0, **settings}
    return config


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_frequencies_equal_transformers(kind: str, settings: dict[str, Any]) -> None:
    config = make_config(kind, dict(settings))
    expected, expected_scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=2048)
    parameters = get_rope_parameters(config)
    inv_freq, scale = rope_init(parameters, get_rotary_dim(parameters, 32), 2048)
    torch.testing.assert_close(inv_freq, expected, rtol=0, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_longrope_chooses_once_by_the_longest_sequence_served() -> None:
    parameters = {"rope_type": "longrope", "original_max_position_embeddings": 512, **FACTORS}
    plain = 1 / (10000.0 ** (torch.arange(0, 32, 2) / 32))
    torch.testing.assert_close(rope_init(parameters, 32, 2048)[0] * torch.tensor(FACTORS["long_factor"]), plain)
    with max_model_len(512):
        inv_freq, scale = rope_init(parameters, 32, 2048)
    torch.testing.assert_close(inv_freq * torch.tensor(FACTORS["short_factor"]), plain)
    assert scale == rope_init(parameters, 32, 2048)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
def test_cos_and_sin_equal_transformers(kind: str, dtype: torch.dtype) -> None:
    config = make_config(kind, TYPES[kind][0] if kind in TYPES else {})
    positions = torch.tensor([0, 1, 511, 2047])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    rope = RotaryEmbedding(get_rope_parameters(config), 32, 2048).to(torch.bfloat16)
    for found, wanted in zip(rope(positions, dtype), expected, strict=True):
        torch.testing.assert_close(found, wanted[0], rtol=0, atol=1e-6)


def test_parameters_of_todays_configs() -> None:
    assert get_rope_parameters(LlamaConfig(rope_theta=7.0)) == {
        "rope_type": "default",
        "rope_theta": 7.0,
        "partial_rotary_factor": 1.0,
    }
    assert get_rope_parameters(GPTNeoXConfig(rotary_pct=0.4))["partial_rotary_factor"] == 0.4
    phi = Phi3Config(
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **{k: v * 3 for k, v in FACTORS.items()}},
        original_max_position_embeddings=77,
    )
    assert get_rope_parameters(phi)["original_max_position_embeddings"] == 77


def test_parameters_by_layer_type() -> None:
    config = Gemma3TextConfig()
    sliding, full = (get_rope_parameters(config, f"{kind}_attention") for kind in ("sliding", "full"))
    assert (sliding["rope_theta"], full["rope_theta"]) == (10_000.0, 1_000_000.0)
    with pytest.raises(ConfigError, match=r"ask for one of: .*sliding_attention"):
        get_rope_parameters(config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
        ({"rotary_emb_base": 500, "rotary_pct": 0.25}, {"rope_theta": 500, "partial_rotary_factor": 0.25}),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
            {"rope_type": "linear", "rope_theta": 9.0, "factor": 3.0},
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 99},
            {"rope_type": "llama3", "original_max_position_embeddings": 99},
        ),
        ({"rope_scaling": {"type": "su"}}, {"rope_type": "longrope"}),
        ({"rope_scaling": None, "rope_theta": 3.0}, {"rope_type": "default", "rope_theta": 3.0}),
    ],
)
def test_parameters_of_older_configs(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = get_rope_parameters(SimpleNamespace(**fields))
    assert {key: found[key] for key in expected} == expected
    assert "type" not in found


def test_the_config_is_left_alone() -> None:
    config = SimpleNamespace(rope_scaling={"type": "linear", "factor": 3.0})
    get_rope_parameters(config)
    assert config.rope_scaling == {"type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"rope_type": "spiral"}, "unknown rope_type 'spiral'"), ({"rope_type": "linear"}, "'linear' needs 'factor'")],
)
def test_bad_parameters_are_one_clear_line(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rope_init(parameters, 32, 2048)
