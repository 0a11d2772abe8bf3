"""What the port needs beside vLLM's layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import get_act_and_mul_fn, get_act_fn
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.utils import AutoWeightsLoader, is_pp_missing_parameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_EXPERT_WEIGHTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}


def supported_rope(rope_parameters, rotary_dim=None):
    """RoPE parameters that vLLM turns into the same rotation; ValueError for a type that it computes otherwise."""
    parameters = dict(rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"vLLM does not compute rope_type {kind!r} as this model does; known: {', '.join(_ROPE_TYPES)}")
    if rotary_dim is not None:
        parameters["rope_dim"] = rotary_dim
    return parameters


def local_slopes(slopes):
    """The ALiBi slopes of this rank's heads, from those of all heads."""
    count = slopes.numel() // get_tensor_model_parallel_world_size()
    return slopes[get_tensor_model_parallel_rank() * count :][:count].tolist()


def shard_heads(parameter):
    """Let each rank load its own part of a parameter with one value per head."""
    set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})


class ActAndMul(nn.Module):
    """`[..., 2 * size]` -> act(first half) * second half, for activations that vLLM has not fused."""

    def __init__(self, name):
        super().__init__()
        self.act = get_act_fn(name)

    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return self.act(gate) * up


def get_act_and_mul(name):
    """The gated form of an activation; ValueError for a name that vLLM does not know."""
    try:
        return get_act_and_mul_fn(name)
    except ValueError:
        return ActAndMul(name)


class Experts(nn.Module):
    """sum_k weight_k * down_k(act(gate_k x) * up_k x) over each token's experts; each rank holds a part of every expert."""

    def __init__(self, num_experts, hidden_size, intermediate_size, hidden_act, quant_config=None, prefix=""):
        super().__init__()
        if quant_config is not None:
            raise ValueError("the experts of this port can't be quantized")
        self.num_experts, self.hidden_act = num_experts, hidden_act
        self.act_fn = get_act_and_mul(hidden_act)
        self.local_size = intermediate_size // get_tensor_model_parallel_world_size()
        self.gate_up_proj = self._stack(2 * self.local_size, hidden_size)
        self.down_proj = self._stack(hidden_size, self.local_size)

    def _stack(self, outputs, inputs):
        parameter = nn.Parameter(torch.empty(self.num_experts, outputs, inputs), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self.load_expert})
        return parameter

    def load_expert(self, parameter, weight, expert=None, half=None):
        """Fill one expert's matrix, a half of it, or all experts' (None) with this rank's part of `weight`."""
        rank, size = get_tensor_model_parallel_rank(), self.local_size
        if parameter is self.down_proj:
            mine = weight.narrow(-1, rank * size, size)
        elif half is not None:
            mine = weight.narrow(-2, rank * size, size)
        else:
            mine = torch.cat([w.narrow(-2, rank * size, size) for w in weight.chunk(2, dim=-2)], dim=-2)
        place = parameter.data if expert is None else parameter.data[expert]
        (place if half is None else place.narrow(-2, half * size, size)).copy_(mine)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if current_platform.is_cpu():
            y = self._one_by_one(hidden_states, top_k_index, top_k_weights)
        else:
            from vllm.model_executor.layers.fused_moe import MoEActivation, fused_experts

            y = fused_experts(
                hidden_states=hidden_states,
                w1=self.gate_up_proj,
                w2=self.down_proj,
                topk_weights=top_k_weights.float(),
                topk_ids=top_k_index.int(),
                activation=MoEActivation.from_str(self.hidden_act),
            )
        return y if get_tensor_model_parallel_world_size() == 1 else tensor_model_parallel_all_reduce(y)

    def _one_by_one(self, hidden_states, top_k_index, top_k_weights):
        """Every expert on every token, weighted by zero where it was not chosen: sizes never depend on data."""
        y = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
            inner = self.act_fn(nn.functional.linear(hidden_states, self.gate_up_proj[expert]))
            y = y + (weight * nn.functional.linear(inner, self.down_proj[expert])).to(y.dtype)
        return y


def load_weights(model, weights, mapper, packed, transposed=(), grouped=()):
    """Fill the parameters of `model` from (name, tensor) pairs; the names filled.

    `packed` maps a packed module to the checkpoint's modules that fill it, in order; the weights of `transposed` modules
    are `[in, out]`; a `grouped` q/k/v tensor has, for each KV head, its queries, its key and its value.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    filled = set()

    def rest():
        for name, weight in mapper.apply(weights):
            if is_pp_missing_parameter(name, model):
                continue
            target, *shards = place_of(name, packed, parameters, modules)
            owners = {path.rpartition(".")[0].rpartition(".")[2] for path in (name, target)}
            if owners & set(transposed) and name.endswith(".weight"):
                weight = weight.t()
            if owners & set(grouped):
                weight = ungrouped(weight, modules[target.rpartition(".")[0]])
            if shards:
                parameters[target].weight_loader(parameters[target], weight, *shards)
                filled.add(target)
            else:
                yield target, weight

    return AutoWeightsLoader(model).load_weights(rest()) | filled


def place_of(name, packed, parameters, modules):
    """(parameter, shard ids ...) that a tensor fills: of a packed module, of one expert, or of its own name."""
    segments = name.split(".")
    if name in parameters:
        return (name,)
    for new, parts in packed.items():
        for i, old in enumerate(parts):
            path = [new if s == old else s for s in segments]
            if old in segments and ".".join(path) in parameters:
                is_qkv = isinstance(modules[".".join(path[:-1])], QKVParallelLinear)
                return ".".join(path), "qkv"[i] if is_qkv else i
    if len(segments) > 3 and segments[-3].isdigit() and segments[-2] in _EXPERT_WEIGHTS:
        stack, half = _EXPERT_WEIGHTS[segments[-2]]
        target = ".".join([*segments[:-3], stack])
        if target in parameters:
            return target, int(segments[-3]), half
    return (name,)


def ungrouped(weight, layer):
    """All queries, then all keys, then all values, of a fused tensor that goes by KV head."""
    groups = weight.reshape(layer.total_num_kv_heads, -1, layer.head_size, *weight.shape[1:])
    queries = layer.total_num_heads // layer.total_num_kv_heads
    parts = groups.split([queries, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])
