"""The helpers that a vLLM plugin brings along, run without vLLM: its names are stood in for."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from porter.emit import render
from porter.runtime.layers.alibi import get_alibi_slopes
from porter.runtime.layers.rope import rope_init
from porter.targets.support import support_text


class QKV(nn.Module):
    """The sizes that vLLM's QKVParallelLinear has."""

    total_num_heads, total_num_kv_heads, head_size = 4, 2, 3


class Loader:
    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())

    def load_weights(self, weights: Any) -> set[str]:
        found = dict(weights)
        for name, weight in found.items():
            self.parameters[name].data.copy_(weight)
        return set(found)


class Attention(nn.Module):
    """Gives back the values that it is given, which have to be as large as the keys."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int) -> None:
        super().__init__()
        self.head_size = head_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert value.shape == key.shape
        return value


def set_attributes(parameter: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(parameter, name, value)


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def support(monkeypatch: pytest.MonkeyPatch, rank: int) -> Any:
    """The whole support file, on one of two ranks."""
    names: dict[str, dict[str, Any]] = {
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: rank,
            "get_tensor_model_parallel_world_size": lambda: 2,
            "tensor_model_parallel_all_reduce": lambda x: x,
        },
        "vllm.model_executor.layers.activation": {"get_act_and_mul_fn": _unknown, "get_act_fn": lambda name: nn.SiLU()},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.layers.linear": {"QKVParallelLinear": QKV},
        "vllm.model_executor.model_loader.weight_utils": {"sharded_weight_loader": lambda dim: None},
        "vllm.model_executor.models.utils": {
            "AutoWeightsLoader": Loader,
            "is_pp_missing_parameter": lambda name, model: False,
        },
        "vllm.model_executor.utils": {"set_weight_attrs": set_attributes},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        for part in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:part])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    module = ModuleType("support")
    exec(render("vllm", "support.py.j2", {}), vars(module))
    return module


def _unknown(name: str) -> None:
    raise ValueError(name)


def test_a_fused_tensor_by_heads_is_taken_apart(support: Any) -> None:
    """Two KV heads, each with its two queries, its key and its value: rows are numbered as they are to come out."""
    q, k, v = torch.arange(12).view(2, 6), torch.arange(12, 18).view(2, 3), torch.arange(18, 24).view(2, 3)
    fused = torch.cat([q, k, v], dim=1).flatten()
    assert support.ungrouped(fused, QKV()).tolist() == list(range(24))


def test_slopes_are_those_of_the_rank_s_heads(support: Any, rank: int) -> None:
    slopes = get_alibi_slopes(4)
    assert support.local_slopes(slopes, 2) == slopes[2 * rank : 2 * rank + 2].tolist()
    assert support.local_slopes(slopes, 4) == slopes.tolist()


def test_experts_of_two_ranks_add_up_to_the_whole(support: Any, rank: int) -> None:
    """Each rank computes its half of every expert; loaded whole or by expert, the weights are the same."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(3, 5, 4)
    x, chosen, weights = torch.randn(6, 5), torch.randint(3, (6, 2)), torch.rand(6, 2)
    model = nn.Module()
    by_expert = model.experts = support.Experts(3, 5, 4, "silu")
    tensors = {f"experts.{e}.{n}.weight": w[e] for e in range(3) for n, w in (("w1", gate), ("w3", up), ("w2", down))}
    mapper = SimpleNamespace(apply=lambda pairs: pairs)
    assert support.load_weights(model, tensors.items(), mapper, {}) == {"experts.gate_up_proj", "experts.down_proj"}
    whole = support.Experts(3, 5, 4, "silu")
    whole.load_expert(whole.gate_up_proj, torch.cat([gate, up], dim=1))
    whole.load_expert(whole.down_proj, down)
    mine = slice(2 * rank, 2 * rank + 2)
    expected = torch.zeros(6, 5)
    for token in range(6):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            inner = nn.functional.silu(gate[expert][mine] @ x[token]) * (up[expert][mine] @ x[token])
            expected[token] += weight * (down[expert][:, mine] @ inner)
    for experts in (by_expert, whole):
        torch.testing.assert_close(experts.forward(x, chosen, weights), expected)


def test_transposed_and_packed_tensors_find_their_places(support: Any) -> None:
    model = nn.Module()
    model.mix, model.gate_up = nn.Linear(3, 2, bias=False), nn.Linear(3, 4, bias=False)
    set_attributes(model.gate_up.weight, {"weight_loader": lambda p, w, i: p.data[2 * i : 2 * i + 2].copy_(w)})
    tensors = {"mix.weight": torch.randn(3, 2), "gate.weight": torch.randn(2, 3), "up.weight": torch.randn(2, 3)}
    mapper = SimpleNamespace(apply=lambda pairs: pairs)
    support.load_weights(model, tensors.items(), mapper, {"gate_up": ["gate", "up"]}, transposed=("mix",))
    torch.testing.assert_close(model.mix.weight.data, tensors["mix.weight"].t())
    torch.testing.assert_close(model.gate_up.weight.data, torch.cat([tensors["gate.weight"], tensors["up.weight"]]))


def test_a_second_name_gives_way_to_the_tensor_of_that_name(support: Any) -> None:
    model = nn.Module()
    model.head = nn.Linear(3, 2)
    names = {"bias": "head.bias"}
    mapper = SimpleNamespace(apply=lambda pairs: [(names.get(name, name), tensor) for name, tensor in pairs])
    tensors = {"head.weight": torch.randn(2, 3), "head.bias": torch.ones(2), "bias": torch.zeros(2)}
    for order in (list(tensors.items()), list(tensors.items())[::-1]):
        support.load_weights(model, order, mapper, {})
        assert model.head.bias.tolist() == [1.0, 1.0]
    support.load_weights(model, [("bias", torch.zeros(2))], mapper, {})
    assert model.head.bias.tolist() == [0.0, 0.0]


def test_a_rotation_that_vllm_computes_otherwise_is_refused(support: Any) -> None:
    for kind in ("dynamic", "proportional", "new"):
        with pytest.raises(ValueError, match=kind):
            support.supported_rope({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("extra", [{"attention_factor": 1.25}, {"factor": 4.0}, {"factor": 0.5}])
def test_longrope_is_scaled_as_the_runtime_does(support: Any, extra: dict[str, float]) -> None:
    parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.0],
        "long_factor": [2.0, 2.0],
        **extra,
    }
    found = support.supported_rope(parameters)
    scale = rope_init(parameters, 4, 64)[1]
    assert found["short_mscale"] == found["long_mscale"] == pytest.approx(scale)


def test_only_what_a_port_reads_comes_along() -> None:
    text = support_text(render("vllm", "support.py.j2", {}), "from .support import local_slopes, get_alibi_slopes\n")
    assert "def local_slopes" in text
    assert "def get_alibi_slopes" in text
    assert "import math" in text
    assert "class Experts" not in text
    assert "AutoWeightsLoader" not in text


def test_a_config_without_rope_parameters_is_refused_rather_than_rotated_by_default(support: Any) -> None:
    with pytest.raises(ValueError, match="no rope_parameters"):
        support.supported_rope(None)


def test_values_smaller_than_keys_are_padded_and_cut(support: Any) -> None:
    attention = support.AttentionWithSmallValues(2, 3, 4, 1.0, num_kv_heads=3)
    query, key, value = torch.randn(5, 12), torch.randn(5, 12), torch.randn(5, 6)
    assert torch.equal(attention(query, key, value), value)


def test_values_larger_than_keys_are_refused(support: Any) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        support.AttentionWithSmallValues(8, 3, 4, 1.0, num_kv_heads=3)


def test_a_layer_without_sinks_has_nothing_to_shard(support: Any) -> None:
    support.shard_heads(None)
    support.shard_heads(sinks := nn.Parameter(torch.zeros(4)))
    assert "weight_loader" in vars(sinks)
