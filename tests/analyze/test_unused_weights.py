"""Which checkpoint tensors a port has no use for, by the paths of modules before and after."""

import libcst as cst

from porter.analyze.program import Program
from porter.analyze.unused_weights import second_names, uncalled

LAYER = "model.layers.{i}"


def test_a_module_that_no_path_calls_is_skipped_as_a_whole() -> None:
    before = frozenset({f"{LAYER}.attn.q", f"{LAYER}.cross.q", f"{LAYER}.cross.k", f"{LAYER}.mlp"})
    after = frozenset({f"{LAYER}.attn.q", f"{LAYER}.mlp"})
    assert uncalled(before, after, ()) == {"cross"}


def test_what_the_port_holds_in_another_form_is_not_skipped() -> None:
    before = frozenset({f"{LAYER}.attn.q", f"{LAYER}.attn.k", f"{LAYER}.norm.weight"})
    after = frozenset({f"{LAYER}.attn.qk", f"{LAYER}.norm"})
    assert uncalled(before, after, ("q", "k")) == set()


def test_a_name_that_a_called_module_has_too_is_skipped_only_below_its_owner() -> None:
    before = frozenset({f"{LAYER}.attn.proj", f"{LAYER}.cross.proj", "pooler.attn.proj"})
    after = frozenset({f"{LAYER}.attn.proj", "pooler.other"})
    assert uncalled(before, after, ()) == {"cross", "pooler.attn"}


def test_a_tied_bias_is_found_under_either_name() -> None:
    tied = 'class Oak:\n    _tied_weights_keys = {"head.decoder.bias": "head.bias"}\n'
    program = Program.read(cst.parse_module(tied))
    before, after = frozenset({"head.decoder", "head.bias"}), frozenset({"head.decoder"})
    assert second_names(program, program.classes["Oak"], before, after) == {"head.bias": "head.decoder.bias"}
    assert second_names(program, program.classes["Oak"], before, before) == {}
