"""Every pass of a target does what its examples show, does it once, and leaves alone what it says it leaves alone."""

import libcst as cst
import pytest

from porter.emit import target_settings
from porter.errors import Refusal
from porter.passes.base import Example, Unchanged
from porter.spec import ModelSpec
from porter.targets.base import TargetPass, passes_of

PASSES = passes_of("vllm", target_settings("vllm")["passes"])
EXAMPLES = [pytest.param(p, e, id=f"{p.name}-{i}") for p in PASSES for i, e in enumerate(p.EXAMPLES)]
UNCHANGED = [pytest.param(p, u, id=f"{p.name}-{i}") for p in PASSES for i, u in enumerate(p.UNCHANGED)]
BY_NAME = {p.name: p for p in PASSES}


def apply(each: TargetPass, source: str) -> str:
    return each.apply(cst.parse_module(source), each.SPEC).code


@pytest.mark.parametrize(("each", "example"), EXAMPLES)
def test_an_example_is_what_the_pass_does(each: TargetPass, example: Example) -> None:
    assert apply(each, example.before) == example.after


@pytest.mark.parametrize(("each", "example"), EXAMPLES)
def test_the_result_of_an_example_is_left_alone(each: TargetPass, example: Example) -> None:
    assert apply(each, example.after) == example.after


@pytest.mark.parametrize(("each", "unchanged"), UNCHANGED)
def test_what_a_pass_must_not_touch_stays(each: TargetPass, unchanged: Unchanged) -> None:
    assert apply(each, unchanged.source) == unchanged.source


@pytest.mark.parametrize("each", PASSES, ids=lambda p: p.name)
def test_a_pass_explains_itself(each: TargetPass) -> None:
    assert each.EXAMPLES
    assert type(each).__doc__
    assert each.reason
    assert "\n" not in each.reason


def refused(name: str, line: str) -> str:
    """The refusal of a pass on a class whose __init__ is one line."""
    source = f"class OakLayer:\n    def __init__(self, config, linear_method=None):\n        {line}\n"
    imports = "from porter.runtime.attention.paged import PagedAttention\n\n\n"
    with pytest.raises(Refusal) as error:
        BY_NAME[name].apply(cst.parse_module(imports + source), ModelSpec("OakForCausalLM"))
    return str(error.value)


def test_a_layer_without_a_name_is_refused() -> None:
    assert "name it" in refused("thread_config", "mix = ReplicatedLinear(8, 8, linear_method=linear_method)")


@pytest.mark.parametrize(
    ("made", "names"),
    [
        ("nn.ModuleList([Layer(linear_method=linear_method) for _ in range(4)])", "{prefix}.x.{i}"),
        ("nn.ModuleList([Layer(k, linear_method=linear_method) for k in kinds])", "{prefix}.x.{i}"),
        ("nn.ModuleList([Layer(linear_method=linear_method), Layer(linear_method=linear_method)])", "{prefix}.x.1"),
        ("nn.Sequential(nn.SiLU(), Layer(linear_method=linear_method))", "{prefix}.x.1"),
        ("nn.ModuleDict({'a': Layer(linear_method=linear_method)})", "{prefix}.x.a"),
        ("Layer(linear_method=linear_method) if config.big else None", "{prefix}.x"),
    ],
)
def test_layers_in_containers_have_the_names_of_their_weights(made: str, names: str) -> None:
    source = f"class Oak:\n    def __init__(self, config, linear_method=None):\n        self.x = {made}\n"
    after = BY_NAME["thread_config"].apply(cst.parse_module(source), ModelSpec("OakForCausalLM")).code
    assert f'prefix=f"{names}"' in after
