"""Checkpoint names and layouts into port parameters, on any number of ranks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from porter.runtime.errors import ConfigError, WeightError
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from porter.runtime.layers.moe import FusedMoE
from porter.runtime.loader import build_port, load_weights
from porter.runtime.parallel import run_ranks
from porter.runtime.resolution import Misshaped, ParameterIndex, Skip, Target, Unknown, WeightRules, resolve

HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCAB = 8, 2, 4, 12, 8, 11
RULES = WeightRules(
    packed={"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "gate_up_proj": {"gate_proj": 0, "up_proj": 1}},
    tied={"lm_head.weight": "model.embed.weight"},
    skip=("rotary_emb.inv_freq", "attn.bias"),
    renames={"embed_out": "lm_head", "block.gate": "router"},
    base_prefix="model",
)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(VOCAB, HIDDEN)
        self.qkv_proj = QKVParallelLinear(HIDDEN, DIM, HEADS, KV_HEADS)
        self.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [INNER] * 2, bias=False)
        self.down_proj = RowParallelLinear(INNER, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.register_buffer("correction", torch.zeros(3))
        self.register_buffer("angles", torch.zeros(3), persistent=False)


class Port(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.filled: set[str] = set()
        self.config = SimpleNamespace(tie_word_embeddings=tie)
        self.model = Body()
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN)


def make_checkpoint() -> dict[str, torch.Tensor]:
    shapes = {
        "model.embed.weight": (VOCAB, HIDDEN),
        "model.q_proj.weight": (HEADS * DIM, HIDDEN),
        "model.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "model.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
        "model.q_proj.bias": (HEADS * DIM,),
        "model.k_proj.bias": (KV_HEADS * DIM,),
        "model.v_proj.bias": (KV_HEADS * DIM,),
        "model.gate_proj.weight": (INNER, HIDDEN),
        "model.up_proj.weight": (INNER, HIDDEN),
        "model.down_proj.weight": (HIDDEN, INNER),
        "model.down_proj.bias": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "model.norm.bias": (HIDDEN,),
        "model.correction": (3,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def load(checkpoint: dict[str, torch.Tensor], rules: WeightRules = RULES, tie: bool = True) -> Port:
    port = Port(tie)
    port.filled = load_weights(port, checkpoint.items(), rules)
    return port


@pytest.fixture
def checkpoint() -> dict[str, torch.Tensor]:
    return make_checkpoint()


def test_every_parameter_and_persistent_buffer_is_filled_and_reported(checkpoint: dict[str, torch.Tensor]) -> None:
    port = load(checkpoint)
    assert port.filled == {name for name in port.state_dict() if name != "model.angles"}
    torch.testing.assert_close(
        port.model.qkv_proj.weight, torch.cat([checkpoint[f"model.{x}_proj.weight"] for x in "qkv"])
    )
    torch.testing.assert_close(port.model.correction, checkpoint["model.correction"])


def test_a_missing_prefix_is_added(checkpoint: dict[str, torch.Tensor]) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}
    torch.testing.assert_close(load(bare).model.embed.weight, checkpoint["model.embed.weight"])


def test_renames_apply_to_whole_segments(checkpoint: dict[str, torch.Tensor]) -> None:
    head = checkpoint["embed_out.weight"] = checkpoint.pop("lm_head.weight")
    torch.testing.assert_close(load(checkpoint).lm_head.weight, head)


def test_what_carries_nothing_is_skipped(checkpoint: dict[str, torch.Tensor]) -> None:
    checkpoint["model.rotary_emb.inv_freq"] = checkpoint["model.attn.bias"] = torch.zeros(3)
    load(checkpoint)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.embed.weight"])
def test_a_tie_is_made_when_either_side_lacks(checkpoint: dict[str, torch.Tensor], lacking: str) -> None:
    del checkpoint[lacking]
    port = load(checkpoint)
    assert port.lm_head.weight is port.model.embed.weight
    assert "lm_head.weight" in port.filled
    assert port.lm_head.weight.any()


def test_equal_weights_are_tied_and_different_ones_are_not(checkpoint: dict[str, torch.Tensor]) -> None:
    port = load(checkpoint)
    assert port.lm_head.weight is not port.model.embed.weight
    checkpoint["lm_head.weight"] = checkpoint["model.embed.weight"].clone()
    port = load(checkpoint)
    assert port.lm_head.weight is port.model.embed.weight


def test_a_config_that_does_not_tie_needs_both(checkpoint: dict[str, torch.Tensor]) -> None:
    del checkpoint["lm_head.weight"]
    with pytest.raises(WeightError, match=r"lacks 'lm_head\.weight'"):
        load(checkpoint, tie=False)


def test_a_missing_shard_is_named(checkpoint: dict[str, torch.Tensor]) -> None:
    del checkpoint["model.k_proj.bias"]
    with pytest.raises(WeightError, match=r"lacks 'model\.qkv_proj\.bias\[k\]'"):
        load(checkpoint)


def test_an_unexpected_tensor_is_named(checkpoint: dict[str, torch.Tensor]) -> None:
    checkpoint["model.index_k_proj.weight"] = torch.zeros(2)
    with pytest.raises(WeightError, match=r"no place for checkpoint tensor 'model\.index_k_proj\.weight'"):
        load(checkpoint)


def test_a_wrong_shape_names_both_shapes(checkpoint: dict[str, torch.Tensor]) -> None:
    checkpoint["model.v_proj.weight"] = torch.zeros(HEADS * DIM, HIDDEN)
    expected = r"'model\.v_proj\.weight' has shape \[32, 12\], but 'model\.qkv_proj\.weight' needs \[8, 12\]"
    with pytest.raises(WeightError, match=expected):
        load(checkpoint)


def test_two_tensors_for_one_place_are_named(checkpoint: dict[str, torch.Tensor]) -> None:
    checkpoint["norm.weight"] = torch.zeros(HIDDEN)
    with pytest.raises(WeightError, match=r"'model\.norm\.weight' and 'norm\.weight' both fill"):
        load(checkpoint)


def test_integer_weights_are_refused(checkpoint: dict[str, torch.Tensor]) -> None:
    checkpoint["model.down_proj.weight"] = torch.zeros(HIDDEN, INNER, dtype=torch.int8)
    with pytest.raises(WeightError, match=r"torch\.int8, not floats"):
        load(checkpoint)


def qkv_of(tensors: dict[str, torch.Tensor], rules: WeightRules, size: int, kv_heads: int) -> list[torch.Tensor]:
    """Each rank's qkv weight (with its bias as the last column)."""

    def build(_: int) -> torch.Tensor:
        layer = QKVParallelLinear(HIDDEN, DIM, HEADS, kv_heads)
        model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": layer})})
        load_weights(model, [(f"attn.c_attn.{name}", tensor) for name, tensor in tensors.items()], rules)
        return torch.cat((layer.get_parameter("weight"), layer.get_parameter("bias")[:, None]), 1)

    return run_ranks(size, build)


def expected_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> list[torch.Tensor]:
    """q `[heads, dim, columns]`, k and v `[kv_heads, dim, columns]` dealt to `size` ranks."""
    replicas = max(size // k.shape[0], 1)
    k, v = k.repeat_interleave(replicas, 0), v.repeat_interleave(replicas, 0)
    return [torch.cat([x.chunk(size)[rank].flatten(0, 1) for x in (q, k, v)]) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("layout", ["contiguous", "grouped", "1 vqk", "kv kvq"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_qkv_layouts(size: int, kv_heads: int, layout: str, transposed: bool) -> None:
    columns = HIDDEN + 1
    q, k, v = torch.randn(HEADS, DIM, columns), torch.randn(kv_heads, DIM, columns), torch.randn(kv_heads, DIM, columns)
    if layout == "contiguous":
        fused = torch.cat((q, k, v)).flatten(0, 1)
    elif layout == "1 vqk":
        fused = torch.cat((v, q, k)).flatten(0, 1)
    else:
        groups = q.view(kv_heads, HEADS // kv_heads, DIM, columns)
        parts = (groups, k[:, None], v[:, None]) if layout == "grouped" else (k[:, None], v[:, None], groups)
        fused = torch.cat(parts, 1).flatten(0, 2)
    weight, bias = fused[:, :HIDDEN], fused[:, HIDDEN]
    rules = WeightRules(fused={"c_attn": layout}, transposed=("c_attn",) if transposed else ())
    tensors = {"weight": weight.t() if transposed else weight, "bias": bias}
    for found, expected in zip(qkv_of(tensors, rules, size, kv_heads), expected_qkv(q, k, v, size), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_qkv_in_blocks_of_heads(size: int) -> None:
    """Four blocks, each of its query heads, values and keys, whatever the number of heads."""
    q, k, v = (torch.randn(HEADS, DIM, HIDDEN + 1) for _ in range(3))
    blocks = [x.view(4, HEADS // 4, DIM, HIDDEN + 1) for x in (q, v, k)]
    fused = torch.cat(blocks, 1).flatten(0, 2)
    tensors = {"weight": fused[:, :HIDDEN], "bias": fused[:, HIDDEN]}
    rules = WeightRules(fused={"c_attn": "4 qvk"})
    for found, expected in zip(qkv_of(tensors, rules, size, HEADS), expected_qkv(q, k, v, size), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_transposed_row_parallel(size: int) -> None:
    weight = torch.randn(HIDDEN, HIDDEN)

    def build(_: int) -> torch.Tensor:
        model = nn.ModuleDict({"c_proj": RowParallelLinear(HIDDEN, HIDDEN, bias=False)})
        load_weights(model, [("c_proj.weight", weight)], WeightRules(transposed=("c_proj",)))
        return model["c_proj"].get_parameter("weight")

    torch.testing.assert_close(torch.cat(run_ranks(size, build), 1), weight.t())


EXPERTS = 12  # two digits, so that lexicographic order would show


def expert_tensors(form: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    if form == "stacked":
        return {"experts.gate_up_proj": torch.cat((gate, up), 1), "experts.down_proj": down}
    names = ("w1", "w3", "w2") if form == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    return {
        f"experts.{e}.{name}.weight": stack[e]
        for e in sorted(range(EXPERTS), key=str)
        for name, stack in zip(names, (gate, up, down), strict=True)
    }


@pytest.mark.parametrize("form", ["stacked", "mixtral", "qwen"])
@pytest.mark.parametrize("size", [1, 2])
def test_experts_load_from_every_form(form: str, size: int) -> None:
    gate, up = torch.randn(EXPERTS, INNER, HIDDEN), torch.randn(EXPERTS, INNER, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, INNER)

    def build(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = nn.ModuleDict({"experts": FusedMoE(EXPERTS, HIDDEN, INNER, "silu")})
        load_weights(model, expert_tensors(form, gate, up, down).items(), WeightRules())
        return model["experts"].get_parameter("gate_up_proj"), model["experts"].get_parameter("down_proj")

    for rank, (gate_up, local_down) in enumerate(run_ranks(size, build)):
        halves = [stack.chunk(size, 1)[rank] for stack in (gate, up)]
        torch.testing.assert_close(gate_up, torch.cat(halves, 1))
        torch.testing.assert_close(local_down, down.chunk(size, 2)[rank])


def test_a_missing_expert_is_named() -> None:
    tensors = expert_tensors("qwen", *(torch.zeros(EXPERTS, INNER, HIDDEN),) * 2, torch.zeros(EXPERTS, HIDDEN, INNER))
    del tensors["experts.10.up_proj.weight"]
    model = nn.ModuleDict({"experts": FusedMoE(EXPERTS, HIDDEN, INNER, "silu")})
    with pytest.raises(WeightError, match=r"'experts\.gate_up_proj\[\(10, 1\)\]'"):
        load_weights(model, tensors.items(), WeightRules())


def test_resolution_needs_names_and_shapes_only() -> None:
    with torch.device("meta"):
        index = ParameterIndex.from_model(Port())

    def found(name: str, *shape: int) -> object:
        return resolve(name, shape, RULES, index)

    assert found("model.q_proj.weight", HEADS * DIM, HIDDEN) == Target("model.qkv_proj.weight", "q")
    assert found("model.qkv_proj.weight", 48, HIDDEN) == Target("model.qkv_proj.weight", layout="contiguous")
    assert found("embed_out.weight", VOCAB, HIDDEN) == Target("lm_head.weight", renamed=True)
    assert found("model.norm.weight", 3) == Misshaped("model.norm.weight", (HIDDEN,), (3,))
    assert found("h.0.attn.bias", 1, 1) == Skip("attn.bias")
    assert found("model.position_ids", 1) == Skip("position_ids")
    assert found("model.attn_bias", 1) == Unknown()
    assert found("model.qk_proj.weight", 1) == Unknown()


def test_a_module_of_its_own_is_not_packed_away() -> None:
    model = nn.ModuleDict(
        {
            "gate_up_proj": MergedColumnParallelLinear(4, [4, 4], bias=False),
            "gate_proj": nn.Linear(4, 4, bias=False),
        }
    )
    index = ParameterIndex.from_model(model)
    assert resolve("gate_proj.weight", (4, 4), RULES, index) == Target("gate_proj.weight")
    assert resolve("gate_proj.weight", (4, 5), RULES, index) == Misshaped("gate_proj.weight", (4, 4), (4, 5))
    assert resolve("up_proj.weight", (4, 4), RULES, index) == Target("gate_up_proj.weight", 1)


def test_a_second_name_gives_way_to_the_tensor_of_that_name(checkpoint: dict[str, torch.Tensor]) -> None:
    """Some checkpoints hold a parameter under both of its names; which comes first decides nothing."""
    second = {"embed_out.weight": torch.zeros(VOCAB, HIDDEN)}
    for both in ({**checkpoint, **second}, {**second, **checkpoint}):
        torch.testing.assert_close(load(both, tie=False).lm_head.weight[:VOCAB], checkpoint["lm_head.weight"])
    only = {name: tensor for name, tensor in checkpoint.items() if name != "lm_head.weight"}
    assert not load({**only, **second}, tie=False).lm_head.weight.any()


def test_two_second_names_of_one_tensor_are_an_error(checkpoint: dict[str, torch.Tensor]) -> None:
    rules = replace(RULES, renames={**RULES.renames, "old_head": "lm_head"})
    both = {f"{name}.weight": checkpoint["lm_head.weight"] for name in ("embed_out", "old_head")}
    del checkpoint["lm_head.weight"]
    with pytest.raises(WeightError, match=r"both fill 'lm_head\.weight'"):
        load({**checkpoint, **both}, rules)


def test_a_field_that_a_config_lacks_is_named() -> None:
    class Asking(nn.Module):
        def __init__(self, config: PretrainedConfig, linear_method: None) -> None:
            super().__init__()
            self.size = config.no_such_field

    with pytest.raises(ConfigError, match="Asking reads no_such_field"):
        build_port(Asking, PretrainedConfig())
