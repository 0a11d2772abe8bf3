"""The names of checkpoints are read from a mapping file as text, however it is put together."""

from pathlib import Path

import pytest

from porter.analyze.checkpoint_names import _mappings, _pair, plain_name
from porter.analyze.module_paths import paths_below
from porter.analyze.values import Instance, Layer

MAPPING = """
ALIASES = {"rowan_vision": "rowan"}


def build():
    mapping = {
        "rowan": [
            WeightRenaming(source_patterns=r"mixer\\.input\\.weight", target_patterns="mixer.experts.gate_up_proj"),
            WeightConverter(source_patterns="experts.*.w1.weight", target_patterns="experts.gate_up_proj"),
        ],
    }
    mapping["sorbus"] = mapping["rowan"].copy()
    mapping["sorbus"] += [WeightRenaming(".old_bias", ".gate.bias")]
    mapping["hawthorn"] = mapping["sorbus"].copy() + [WeightRenaming([r"^back\\."], ["model."])]
    return mapping
"""
FIRST = ("mixer.input.weight", "mixer.experts.gate_up_proj")


@pytest.mark.parametrize(
    ("key", "pairs"),
    [
        ("rowan", [FIRST]),
        ("rowan_vision", [FIRST]),
        ("sorbus", [FIRST, ("old_bias", "gate.bias")]),
        ("hawthorn", [FIRST, ("old_bias", "gate.bias"), ("back", "model")]),
    ],
)
def test_copies_and_sums_are_followed(key: str, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "mapping.py").write_text(MAPPING, encoding="utf-8")
    found = [_pair(call) for call in _mappings(tmp_path / "mapping.py")[key]]
    assert [pair for pair in found if pair] == pairs


def test_a_pattern_with_wildcards_is_no_plain_name() -> None:
    assert plain_name(r"experts.*.w1.weight") == ""


def test_a_subclass_of_a_linear_has_the_linear_s_tensors() -> None:
    """A rename of a router's weight has to find it where the router is an nn.Linear itself."""
    router = Instance(attrs={"<layer>": Layer(kind="linear")})
    assert {"router", "router.weight", "router.bias"} == set(paths_below(Instance(attrs={"router": router})))
