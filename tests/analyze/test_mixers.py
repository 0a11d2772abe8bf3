"""Models that mix tokens in a way that no paged cache serves are refused by that, whatever porter stumbled over."""

import libcst as cst
import pytest

from porter.analyze.mixers import find_mixer
from porter.analyze.program import Program

RECURRENCE = """
        length = x.shape[1]
        for t in range(length):
            state = gate[:, t] * state + x[:, t]
            out.append(state)
"""
IN_PLACE = """
        offset = 0
        while offset < x.shape[1]:
            piece, left = self.block(x[:, offset : offset + 8], self.state)
            self.state.copy_(left)
            offset += 8
"""
STREAMS = """
        first = self.core(q, k, v, mask)
        second = self.core(g, k, v, other)
"""
BUCKETS = """
        order = torch.argsort(self.hash(x), dim=-1)
        return torch.softmax(x.gather(1, order), -1)
"""
INDEXER = """
        best = self.scores(x).topk(8, dim=-1).indices
"""
PATCHES = """
        return pooled.scatter_reduce(src=x, dim=1, index=ids, reduce="amax")
"""
PROMPT = """
        ids = torch.cat((self.prompt.expand(2, 4), input_ids), dim=1)
"""
STACKED = """
        x = torch.cat([x] + streams, 1)
"""
SHARED = """
        if self.reads:
            keys, values = shared[self.source]
        else:
            keys, values = self.k(x), self.v(x)
            shared[self.index] = keys, values
"""
AGAIN = """
        for _ in range(self.cycles):
            x = self.stack(x, past_key_values)
"""
EXPERTS = """
        for e in range(self.num_experts):
            x = x + weights[:, e, None] * self.experts[e](x)
"""
LAYERS = """
        for i in range(len(self.layers)):
            x = self.layers[i](x, masks[i])
"""
HEADS = """
        one = self.split(q, self.heads, self.dim)
        two = self.split(k, self.heads, self.dim)
"""
PLACES = """
        inside = torch.cat([first, second], dim=-1)
"""


def found(body: str, arguments: str = "x") -> str:
    """Why a model with a mixer of this body is refused; empty if it is not."""
    text = f"""
from torch import nn

class Mixer(nn.Module):
    def forward(self, {arguments}):{body}

KINDS = {{"mixer": Mixer}}

class OakForCausalLM(nn.Module):
    def __init__(self, config):
        self.mixer = KINDS[config.kind]()

class Unused(nn.Module):
    def __init__(self):
        self.conv = nn.Conv1d(4, 4, 3)
"""
    program = Program.read(cst.parse_module(text))
    mixer = find_mixer(program, program.classes["OakForCausalLM"])
    return mixer.why if mixer is not None else ""


@pytest.mark.parametrize(
    ("body", "arguments", "kind"),
    [
        (RECURRENCE, "x", "a recurrence over positions"),
        (IN_PLACE, "x", "a recurrence over positions"),
        (STREAMS, "x", "two streams of queries"),
        (BUCKETS, "x", "LSH attention"),
        (INDEXER, "x, position_embeddings", "an indexer"),
        (PATCHES, "x", "patches"),
        (SHARED, "x, shared", "KV sharing across layers"),
        (AGAIN, "x, past_key_values", "the same layers run again"),
        (PROMPT, "input_ids", "learned prompts"),
        (STACKED, "x", "n-gram streams"),
        ("\n        self.conv = nn.Conv1d(4, 4, 3)\n", "x", "a convolution along the sequence"),
    ],
)
def test_the_kind_is_named(body: str, arguments: str, kind: str) -> None:
    assert kind in found(body, arguments)


@pytest.mark.parametrize("body", [INDEXER, EXPERTS, LAYERS, HEADS, PLACES])
def test_routers_experts_layers_and_heads_are_none(body: str) -> None:
    assert found(body) == ""
