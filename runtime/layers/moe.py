"""Mixture-of-experts feed-forward layer, sharded inside each expert."""

import torch
from torch import nn

from porter.kernels.act_and_mul import ACTIVATIONS
from porter.kernels.fused_moe import fused_moe, fused_moe_stacked
from porter.runtime.deferred import materialize
from porter.runtime.errors import ConfigError
from porter.runtime.layers.linear import UNQUANTIZED, LinearMethod
from porter.runtime.layers.sharding import Part, ShardId, set_parts
from porter.runtime.parallel import all_reduce, divide, get_tp_rank, get_tp_size


class FusedMoE(nn.Module):
    """sum_k weight_k * down_k(act(gate_k x) * up_k x) over each token's chosen experts, complete on every rank.

    Parameters: gate_up_proj `[E, 2 * I_local, H]`, down_proj `[E, H, I_local]`. Shard ids of a checkpoint tensor:
    (expert, 0) gate, (expert, 1) up, (expert, None) down, None for the whole stack.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        *,
        linear_method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ConfigError(f"unknown activation {hidden_act!r}", f"known: {', '.join(sorted(ACTIVATIONS))}")
        self.num_experts = num_experts
        self.hidden_act = hidden_act
        self.linear_method = linear_method or UNQUANTIZED
        self.tp_size = get_tp_size()
        local = divide(intermediate_size, self.tp_size, "intermediate_size")
        dtype = torch.get_default_dtype()
        for name, inputs, outputs in (("gate_up_proj", hidden_size, 2 * local), ("down_proj", local, hidden_size)):
            self.linear_method.create_weights(self, inputs, outputs, dtype, name=name, num_experts=num_experts)
        self._set_parts(hidden_size, intermediate_size, local)

    def _set_parts(self, hidden_size: int, intermediate_size: int, local: int) -> None:
        start = get_tp_rank() * local
        gate_up: dict[ShardId, Part] = {}
        down: dict[ShardId, Part] = {}
        for expert in range(self.num_experts):
            for half in (0, 1):
                shape = (intermediate_size, hidden_size)
                gate_up[expert, half] = Part(shape, 0, start, local, half * local, expert)
            down[expert, None] = Part((hidden_size, intermediate_size), 1, start, local, 0, expert)
        set_parts(self.get_parameter("gate_up_proj"), gate_up)
        set_parts(self.get_parameter("down_proj"), down)

    def _weights(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        method = self.linear_method
        return (
            method.expert_weight(self, "gate_up_proj", expert, dtype),
            method.expert_weight(self, "down_proj", expert, dtype),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        top_k_index: torch.Tensor,  # [num_tokens, top_k]
        top_k_weights: torch.Tensor,  # [num_tokens, top_k]
    ) -> torch.Tensor:
        hidden_states = materialize(hidden_states)
        if self.linear_method is UNQUANTIZED and hidden_states.is_cuda:
            stacks = self.get_parameter("gate_up_proj"), self.get_parameter("down_proj")
            y = fused_moe_stacked(hidden_states, *stacks, top_k_index, top_k_weights, self.hidden_act)
            return y if self.tp_size == 1 else all_reduce(y)
        y = fused_moe(
            hidden_states,
            lambda expert: self._weights(expert, hidden_states.dtype),
            self.num_experts,
            top_k_index,
            top_k_weights,
            self.hidden_act,
        )
        return y if self.tp_size == 1 else all_reduce(y)
