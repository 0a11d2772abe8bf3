"""Idioms of code that checkpoints bring along: guarded imports, einops, and files that porter itself trips over."""

from pathlib import Path

import libcst as cst
import pytest

from porter import convert as conversion
from porter.analyze.attention import find_cores
from porter.analyze.core import Core
from porter.analyze.interp import explore
from porter.analyze.program import Program
from porter.errors import Refusal
from porter.source import Source

FILE = """
import importlib.util

import torch
from torch import nn
from einops import rearrange
from transformers.masking_utils import create_causal_mask

try:
    from fast_kernels import fast_attention
    HAS_FAST = True
except ImportError:
    fast_attention = None
    HAS_FAST = False


class RowanAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.fast = importlib.util.find_spec("fast_kernels") is not None

    def forward(self, hidden_states, mask):
        qkv = rearrange(self.wqkv(hidden_states), "{pattern}", {known}).permute(2, 0, 1, 3, 4)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(0))
        if HAS_FAST or self.fast or fast_attention is not None:
            return fast_attention(query, key, value)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5 + mask
        return rearrange(torch.softmax(scores, dim=-1) @ value, "b h n d -> b n (h d)")


class RowanForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = RowanAttention(config)

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        return self.attention(hidden_states, create_causal_mask(self.config, hidden_states, None, None))
"""
BY_PART = "b n (three h d) -> b n three h d"
BY_HEAD = "b n (h three d) -> b n three h d"


def core(pattern: str, text: str = FILE) -> Core:
    source = text.replace("{pattern}", pattern).replace("{known}", "three=3, d=self.head_dim")
    (world,) = explore(Program.read(cst.parse_module(source))).worlds
    (found,) = find_cores(world)
    return found


@pytest.mark.parametrize(("pattern", "layout"), [(BY_PART, "contiguous"), (BY_HEAD, "grouped")])
def test_a_projection_split_by_einops_has_the_layout_of_its_pattern(pattern: str, layout: str) -> None:
    assert core(pattern).fused == layout


def test_a_guarded_import_of_torch_is_there() -> None:
    program = Program.read(cst.parse_module("try:\n    from torch import nn\nexcept ImportError:\n    nn = None\n"))
    assert (program.imports["nn"], "nn" in program.constants) == ("torch.nn", False)


def test_an_optional_package_is_absent_and_its_fallback_holds() -> None:
    program = Program.read(cst.parse_module(FILE))
    assert "fast_attention" not in program.imports
    assert {"fast_attention", "HAS_FAST"} <= set(program.constants)


def test_a_mistake_of_porter_is_one_line_with_a_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(conversion._Work, "check", fail)
    with pytest.raises(Refusal, match=r"rowan.py:1: P900 the file: porter went wrong on it .KeyError: 'lost'"):
        conversion.convert(Source("rowan.py", FILE, tmp_path / "rowan.py"))
