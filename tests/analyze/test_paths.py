"""Which paths a file can take: a path on which Python itself would raise is none."""

import libcst as cst

from porter.analyze.interp import explore
from porter.analyze.program import Program

FILE = """
import torch
from torch import nn


class MyrtleForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
{init}

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
{forward}
"""


def decisions(forward: str, init: str = "") -> list[dict[str, bool]]:
    source = FILE.format(forward=forward, init=init)
    return [dict(world.decisions) for world in explore(Program.read(cst.parse_module(source))).worlds]


def test_a_path_that_never_sets_a_variable_is_not_taken() -> None:
    forward = """
        if self.config.method == "plain":
            chosen = hidden_states
        elif self.config.method == "double":
            chosen = hidden_states * 2
        return chosen + hidden_states
"""
    plain, double = "config.method == 'plain'", "config.method == 'double'"
    assert decisions(forward) == [{plain: True}, {plain: False, double: True}]


def test_a_parameter_registered_as_none_is_none() -> None:
    init = """
        if config.num_experts > 0:
            self.weight = nn.Parameter(torch.ones(config.hidden_size))
        else:
            self.register_parameter("weight", None)
"""
    forward = """
        if self.weight is None:
            return hidden_states
        return hidden_states * self.weight
"""
    assert len(decisions(forward, init)) == 2


def test_what_skips_a_turn_over_hits_is_no_choice_of_the_config() -> None:
    forward = """
        for expert in range(self.config.num_experts):
            batch, rows, places = torch.where(hidden_states > expert)
            if rows.numel() == 0:
                continue
            hidden_states.index_add_(0, rows, hidden_states[rows])
        return hidden_states
"""
    assert decisions(forward) == [{}]
