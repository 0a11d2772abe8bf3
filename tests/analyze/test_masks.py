"""Masks that are chosen by a layer's kind, however the file fills its table of them."""

import libcst as cst
import pytest

from porter.analyze.interp import explore
from porter.analyze.program import Program
from porter.analyze.values import Mask

FILE = """
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


class YewForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        given = {{"config": self.config, "inputs_embeds": hidden_states}}
{table}
        return masks[self.config.layer_types[0]]
"""
LOOP = """
        makers = {
            "full": lambda: create_causal_mask(**given),
            "local": lambda: create_sliding_window_causal_mask(**given),
        }
        masks = {}
        for kind in set(self.config.layer_types):
            masks[kind] = makers[kind]()
"""
DICT = """
        masks = {"full": create_causal_mask(**given), "local": create_sliding_window_causal_mask(**given)}
"""


@pytest.mark.parametrize("table", [LOOP, DICT])
def test_a_mask_is_chosen_by_the_kind_of_the_layer(table: str) -> None:
    (world,) = explore(Program.read(cst.parse_module(FILE.format(table=table)))).worlds
    mask = world.result
    assert isinstance(mask, Mask)
    key, *masks = mask.args
    assert (mask.kind, mask.attrs["keys"]) == ("by_key", ("full", "local"))
    assert key.text == "config.layer_types[0]"  # type: ignore[attr-defined]
    assert [m.kind for m in masks if isinstance(m, Mask)] == ["causal", "sliding"]
