"""Which paths a file can take: a path on which Python itself would raise is none."""

import libcst as cst
import pytest

from porter.analyze.interp import explore
from porter.analyze.poly import Poly
from porter.analyze.program import Program
from porter.analyze.rotation import turns
from porter.analyze.settled_sizes import settle
from porter.analyze.values import Tensor
from porter.errors import Refusal

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


TURNED = """
        heads = hidden_states.view(*hidden_states.shape[:-1], self.config.num_heads, -1)
        factors = torch.ones(self.config.turned or self.config.hidden_size)
        if self.config.turned is None:
            heads = heads * factors
        else:
            heads = torch.cat((heads[..., :self.config.turned] * factors, heads[..., self.config.turned:]), -1)
        return heads.flatten(-2)
"""


def test_a_path_whose_sizes_never_meet_is_not_taken() -> None:
    """A head times as many factors as there are features: with more than one head the original raises."""
    assert decisions(TURNED) == [{"config.turned is None": False}]


def test_nobody_has_to_ask_for_what_makes_every_path_raise() -> None:
    program = Program.read(cst.parse_module(FILE.format(forward=TURNED, init="")))
    (world,) = explore(program).worlds
    (tests,) = world.open_tests
    assert world.branches[tests] == {False}


def test_sizes_that_are_only_unknown_may_meet() -> None:
    forward = """
        if self.config.wide:
            return hidden_states * torch.ones(self.config.width)
        return hidden_states
"""
    assert len(decisions(forward)) == 2


def test_a_size_that_the_config_chooses_is_settled_on_each_path() -> None:
    taken = {"config.multi_query": True}
    size = Poly.symbol("(1 if config.multi_query else config.num_heads)") * Poly.symbol("config.head_dim")
    assert settle(size, taken).text() == "config.head_dim"
    assert settle(size, {"config.multi_query": False}).text() == "config.head_dim * config.num_heads"
    assert settle(size, {}) == size


def test_joined_pieces_are_as_many_as_were_split() -> None:
    init = "        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(config.num_heads)])"
    forward = """
        heads = hidden_states.view(*hidden_states.shape[:-1], self.config.num_heads, -1)
        pieces = torch.split(heads, 1, dim=2)
        return torch.cat([norm(piece) for norm, piece in zip(self.norms, pieces)], dim=2)
"""
    (world,) = explore(Program.read(cst.parse_module(FILE.format(forward=forward, init=init)))).worlds
    assert isinstance(world.result, Tensor)
    assert world.result.shape is not None
    assert [s.text() for s in world.result.shape[2:]] == ["config.num_heads", "config.hidden_size // config.num_heads"]
    assert not world.result.sizes_only


def test_more_paths_than_porter_follows_are_refused_rather_than_some_of_them_taken() -> None:
    line = "        hidden_states = hidden_states * 2 if self.config.flag_{0} else hidden_states\n"
    forward = "".join(line.format(i) for i in range(8)) + "        return hidden_states\n"
    with pytest.raises(Refusal, match="more than 128 paths") as caught:
        decisions(forward)
    assert caught.value.code == "P102"


def test_the_size_of_what_was_turned_turns_nothing() -> None:
    init = "        self.proj = nn.Linear(config.hidden_size, config.hidden_size)"
    forward = """
        summed = hidden_states + torch.sin(torch.arange(self.config.hidden_size))
        return self.proj(hidden_states).view(summed.shape){more}
"""
    for more, turned in (("", False), (" * torch.cos(summed)", True)):
        source = FILE.format(forward=forward.format(more=more), init=init)
        (world,) = explore(Program.read(cst.parse_module(source))).worlds
        assert world.result is not None
        assert turns(world.result) is turned
