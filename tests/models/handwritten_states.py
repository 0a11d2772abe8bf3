"""A port with states written by hand: a decaying sum that goes on from a given state, a convolution that does not."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

from porter.runtime.attention.paged import PagedAttention
from porter.runtime.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from porter.runtime.layers.linear import LinearMethod
from porter.runtime.layers.state import StateMixer, States
from porter.runtime.loader import WeightRules, load_weights
from porter.runtime.metadata import AttentionMetadata
from porter.runtime.sampling import Sampler, SamplerOutput, SamplingMetadata

KERNEL = 3


class Decay(StateMixer):
    """h[t] = tanh(weight) * h[t - 1] + x[t]"""

    resumes = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def mix(self, hidden_states: torch.Tensor, states: States) -> torch.Tensor:
        state = states.recurrent_states[0] if states.has_previous_state else torch.zeros_like(hidden_states[:, 0])
        outputs = []
        for token in hidden_states.unbind(1):
            state = torch.tanh(self.weight) * state + token
            outputs.append(state)
        states.update_recurrent_state(state)
        return torch.stack(outputs, dim=1)


class Window(StateMixer):
    """A causal convolution of each channel, which sees the tokens before only if it is given one token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, KERNEL))

    def mix(self, hidden_states: torch.Tensor, states: States) -> torch.Tensor:
        inputs = hidden_states.transpose(1, 2)
        if states.has_previous_state and inputs.shape[-1] == 1:
            kept = states.conv_states[0]
            kept.copy_(torch.cat([kept[..., 1:], inputs], dim=-1))
            return (kept * self.weight).sum(-1, keepdim=True).transpose(1, 2)
        states.update_conv_state(inputs, conv_kernel_size=KERNEL)
        padded = F.pad(inputs, (KERNEL - 1, 0))
        return F.conv1d(padded, self.weight[:, None], groups=len(self.weight)).transpose(1, 2)


class Attention(nn.Module):
    """One head without projections."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn = PagedAttention(1, config.hidden_size, config.hidden_size**-0.5)

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        return self.attn(hidden_states, hidden_states, hidden_states, kv_cache, attn_metadata)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, kind: str) -> None:
        super().__init__()
        self.attends = kind == "attention"
        self.mixer = {"decay": Decay, "attention": Attention, "window": Window}[kind](config)

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: torch.Tensor | None, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:])
        mixed = self.mixer(normed, kv_cache, attn_metadata) if self.attends else self.mixer(normed, attn_metadata)
        return hidden_states + mixed


class StatesForCausalLM(nn.Module):
    weight_rules = WeightRules()
    kinds: tuple[str, ...] = ("decay", "attention", "window")

    def __init__(self, config: LlamaConfig, linear_method: LinearMethod | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, linear_method=linear_method)
        self.layers = nn.ModuleList([Layer(config, kind) for kind in self.kinds])
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, bias=False, linear_method=linear_method)
        self.sampler = Sampler()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor | None],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        hidden_states = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, kv_caches[i] if kv_caches else None, attn_metadata)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        return self.sampler(logits, sampling_metadata)

    def load_weights(self, weights: object) -> set[str]:
        return load_weights(self, weights, self.weight_rules)  # type: ignore[arg-type]


class OnlyStatesForCausalLM(StatesForCausalLM):
    """Without any attention: no cache of keys and values."""

    kinds = ("decay", "window")
