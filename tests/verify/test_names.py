"""Which module stands for which: by name, rename, packing, or as the only one left."""

from porter.runtime.loader import WeightRules
from porter.verify.names import map_names

RULES = WeightRules(packed={"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}}, renames={"w": "wide"})
PORT = {"": 8, "model": 8, "model.layers.0": 8, "model.layers.0.qkv_proj": 12, "model.layers.0.wide": 4, "embed_out": 9}
ORIGINAL = {
    "": 9,
    "model": 8,
    "model.layers.0": 8,
    "model.layers.0.q_proj": 4,
    "model.layers.0.k_proj": 4,
    "model.layers.0.v_proj": 4,
    "model.layers.0.w": 4,
    "lm_head": 9,
}


def test_each_module_finds_its_original() -> None:
    names = map_names(PORT, ORIGINAL, RULES)
    layer = "model.layers.0"
    assert names.pairs[f"{layer}.qkv_proj"] == (f"{layer}.q_proj", f"{layer}.k_proj", f"{layer}.v_proj")
    assert names.pairs[f"{layer}.wide"] == (f"{layer}.w",)
    assert names.pairs["embed_out"] == ("lm_head",)
    assert names.unmatched == ()


def test_a_renamed_parent_carries_its_children() -> None:
    port = {"": 8, "moe": 8, "moe.gate": 4}
    original = {"": 8, "mlp": 8, "mlp.gate": 4}
    assert map_names(port, original, WeightRules()).pairs["moe.gate"] == ("mlp.gate",)


def test_two_that_fit_are_not_guessed() -> None:
    names = map_names({"": 8, "a": 4}, {"": 8, "b": 4, "c": 4}, WeightRules())
    assert names.unmatched == ("a",)
