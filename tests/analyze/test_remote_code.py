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
from porter.source import Source, load

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
BY_TAIL = "... (three h d) -> ... three h d"
BY_PART = "b n (three h d) -> b n three h d"
BY_HEAD = "b n (h three d) -> b n three h d"


def core(pattern: str, text: str = FILE) -> Core:
    source = text.replace("{pattern}", pattern).replace("{known}", "three=3, d=self.head_dim")
    (world,) = explore(Program.read(cst.parse_module(source))).worlds
    (found,) = find_cores(world)
    return found


@pytest.mark.parametrize(
    ("pattern", "layout"), [(BY_PART, "contiguous"), (BY_TAIL, "contiguous"), (BY_HEAD, "grouped")]
)
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


def fork(*changes: tuple[str, str]) -> Source:
    """The tiny model that came with a checkpoint, changed."""
    path = Path(__file__).parents[1] / "models" / "juniper" / "modeling_juniper.py"
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return Source(path.name, text, path, path.with_name("configuration_juniper.py").read_text(encoding="utf-8"))


def test_a_base_under_another_name_is_read_under_that_name() -> None:
    code = conversion.convert(fork(("config.rope_theta", "config.rotary_base"))).code
    assert '{**get_rope_parameters(config), "rope_theta": config.rotary_base}' in code


def test_a_base_that_the_file_fixes_keeps_the_scaling_that_it_asks_for() -> None:
    code = conversion.convert(fork(("base=self.config.rope_theta,", "base=5000,"))).code
    assert '{**get_rope_parameters(config), "rope_theta": 5000.0}' in code


_LENGTHS = "kv_seq_len = key_states.shape[-2]\n"


def test_what_depends_on_lengths_is_left_to_configs_without_it() -> None:
    scaled = f"""{_LENGTHS}\
        self.use_logn_attn = self.config.use_logn_attn
        if self.use_logn_attn:
            query_states = query_states * math.log(kv_seq_len)
"""
    assert 'requires = {"use_logn_attn": False}' in conversion.convert(fork((_LENGTHS, scaled))).code


def test_one_of_two_classes_is_called_by_its_own_name() -> None:
    code = conversion.convert(fork()).code
    assert ("apex" in code, "self.norm = JuniperRMSNorm(" in code) == (False, True)


def test_a_generator_for_conditions_is_taken_where_there_is_no_causal_one() -> None:
    changed = fork(("JuniperForCausalLM", "JuniperForConditionalGeneration"))
    assert conversion.convert(changed).spec["architecture"] == "JuniperForConditionalGeneration"


def test_a_path_that_raises_is_refused_at_the_line_that_raises() -> None:
    with pytest.raises(Refusal) as caught:
        conversion.convert(fork(('find_spec("torch")', 'find_spec("apex")')))
    lines = fork().text.splitlines()
    assert ("find_spec" in lines[caught.value.line - 1], caught.value.code) == (True, "P110")


def test_an_import_inside_a_function_is_refused_as_one_at_the_top() -> None:
    changed = fork(("return self.w2(", "import apex\n        apex.hint(self)\n        return self.w2("))
    with pytest.raises(Refusal, match="apex"):
        conversion.convert(changed)


def test_the_configuration_is_the_file_that_the_import_names(tmp_path: Path) -> None:
    (tmp_path / "modelling_own.py").write_text(fork().text, encoding="utf-8")
    (tmp_path / "configuration_juniper.py").write_text("class OwnConfig: pass\n", encoding="utf-8")
    assert load(str(tmp_path / "modelling_own.py")).config_text == "class OwnConfig: pass\n"


def test_sizes_that_are_put_together_first_hold_for_any_layout() -> None:
    halves = """shape = x.size()[:-1] + (2, x.shape[-1] // 2)
        x = x.view(*shape).flatten(-2)
        return self.w2("""
    assert "x.view(*shape)" in conversion.convert(fork(("return self.w2(", halves))).code


def test_a_class_that_says_how_to_export_is_not_the_configuration() -> None:
    text = """
class OwnConfig(PretrainedConfig):
    model_type = "own"
    attribute_map = {"hidden_size": "n_embd"}


class OwnOnnxConfig(OnnxConfig):
    pass
"""
    program = Program.read(cst.parse_module("x = 1\n"), cst.parse_module(text))
    assert program.config_aliases == {"hidden_size": "n_embd"}
