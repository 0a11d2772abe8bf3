"""Faults of norms, projections, activations, experts, residuals and sharding."""

from collections.abc import Callable, Iterator

import libcst as cst

from porter.verify.faults.fault import LINEARS, NORMS, ROW, Fault, dropped_operand, edited, replaced
from porter.verify.faults.mutate import Edit, Place, Site, called, code, keyword, one_of, positional, result

_ALONE = '''def alone(layer, x):
    """What this rank has, never summed with the others."""
    size, layer.tp_size = layer.tp_size, 1
    try:
        return layer(x)
    finally:
        layer.tp_size = size
'''
_TWICE = "from porter.runtime.parallel import all_reduce\n"
_OTHER_ACTIVATION = '{{"silu": "gelu", "gelu": "gelu_pytorch_tanh", "relu": "silu"}}.get({0}, "gelu")'


def _eps(template: str) -> Edit:
    return keyword(NORMS, "eps", template)


def _by_heart(node: cst.BaseExpression, place: Place) -> str | None:
    """A number of the config, taken from the config class's defaults instead."""
    words = ("eps", "multiplier", "scal", "softcap", "factor", "per_tok", "alpha", "limit")
    if not isinstance(node, cst.Attribute) or code(node.value) != "config" or place.method != "__init__":
        return None
    return f"type(config)().{node.attr.value}" if any(word in node.attr.value for word in words) else None


def _is_residual(node: cst.BaseExpression, place: Place) -> bool:
    return isinstance(node, cst.Name) and node.value in ("residual", "hidden_states", "attn_output")


def _is_setting(node: cst.BaseExpression, place: Place) -> bool:
    """A number that config or class holds, as a factor."""
    words = ("multiplier", "scal", "normalizer", "factor", "softcap", "embed_scale")
    text = code(node)
    return text.startswith(("self.", "config.")) and any(word in text for word in words)


def _flag_tests(text: str, words: tuple[str, ...]) -> Iterator[Site]:
    """Turn around each `if` of a forward whose test names one of `words`."""
    module = cst.parse_module(text)
    for owner in module.body:
        if not isinstance(owner, cst.ClassDef):
            continue
        for method in owner.body.body:
            if isinstance(method, cst.FunctionDef) and method.name.value != "__init__":
                for node in _ifs(method):
                    if any(word in code(node.test) for word in words):
                        changed = cst.parse_expression(f"not ({code(node.test)})")
                        edited_module = module.deep_replace(node, node.with_changes(test=changed))
                        assert isinstance(edited_module, cst.Module)
                        yield Site(edited_module.code, owner.name.value, "")


def _ifs(node: cst.CSTNode) -> Iterator[cst.If]:
    if isinstance(node, cst.If):
        yield node
    for child in node.children:
        yield from _ifs(child)


def _residual_after_norm(text: str) -> Iterator[Site]:
    """`residual = x; x = norm(x)` the other way around."""
    module = cst.parse_module(text)
    for owner in module.body:
        if not isinstance(owner, cst.ClassDef):
            continue
        for block in _blocks(owner):
            for i, (first, second) in enumerate(zip(block.body, block.body[1:], strict=False)):
                if code(first).strip() == "residual = hidden_states" and "norm" in code(second):
                    body = [*block.body[:i], second, first, *block.body[i + 2 :]]
                    changed = module.deep_replace(block, block.with_changes(body=body))
                    assert isinstance(changed, cst.Module)
                    yield Site(changed.code, owner.name.value, "")


def _blocks(node: cst.CSTNode) -> Iterator[cst.IndentedBlock]:
    if isinstance(node, cst.IndentedBlock):
        yield node
    for child in node.children:
        yield from _blocks(child)


def _call_to(*names: str) -> Callable[[cst.BaseExpression, Place], bool]:
    return lambda node, place: isinstance(node, cst.Call) and called(node) in names


def _first_argument(text: str) -> str:
    call = cst.parse_expression(text)
    assert isinstance(call, cst.Call)
    return code(call.args[0].value)


def _softmax_last(node: cst.BaseExpression, place: Place) -> bool:
    return isinstance(node, cst.Call) and called(node).endswith("softmax")


def _sum_of_shared(node: cst.BaseExpression, place: Place) -> bool:
    return "shared" in code(node)


def _top_k(node: cst.BaseExpression, place: Place) -> str | None:
    if isinstance(node, cst.Call) and called(node).endswith("topk") and len(node.args) > 1:
        k = code(node.args[1].value)
        return code(node).replace(k, f"{k} - 1", 1)
    return None


def _gate_first(node: cst.BaseExpression, place: Place) -> str | None:
    """Halves of an interleaved or packed gate and up exchanged."""
    text = code(node)
    if isinstance(node, cst.Tuple) and "::2" in text and "1::2" in text:
        return text.replace("1::2", "@").replace("::2", "1::2").replace("@", "::2")
    return None


_NORM = ("eps", "norm", "1 + weight")
_FACTOR = ("factor", "multipl", "scale")
_RESIDUAL = ("residual", "input")
_BIAS = ("bias", "term")
_SHARDS = ("reduc", "rank", "shard")
_ROUTER = ("rout", "expert")

FAULTS = (
    Fault("eps ten times too large", "eps", edited(_eps("10 * ({})")), ("eps",)),
    Fault(
        "a number of the config by heart",
        "config ignored",
        edited(_by_heart),
        ("eps", "factor", "scale", "cap", "expert"),
    ),
    Fault("eps of 1e-5 for 1e-6", "eps", edited(_eps("({}) + 9e-6")), ("eps",)),
    Fault(
        "norm weight plus 1",
        "norm weight + 1",
        edited(keyword(one_of("RMSNorm"), "unit_offset", "not ({})", "True")),
        _NORM,
    ),
    Fault("norm skipped", "norm skipped", edited(result(NORMS, "{arg}")), _NORM),
    Fault(
        "norm in half precision",
        "dtype of norm",
        edited(result(NORMS, "{self}({arg}.bfloat16().to({arg}.dtype))")),
        _NORM,
    ),
    Fault("bias dropped", "bias dropped", edited(keyword(LINEARS, "bias", "False", absent="False")), _BIAS),
    Fault("bias added to nothing", "bias added", edited(result(LINEARS, "0.01 + {}")), _BIAS),
    Fault(
        "another activation",
        "activation approximation",
        edited(positional(one_of("get_act_and_mul", "get_act_fn"), 0, _OTHER_ACTIVATION)),
        ("activation",),
    ),
    Fault(
        "another activation of experts",
        "activation approximation",
        edited(positional(one_of("FusedMoE"), 3, _OTHER_ACTIVATION)),
        ("activation",),
    ),
    Fault(
        "gelu without its approximation",
        "activation approximation",
        replaced(lambda node, place: isinstance(node, cst.Float) and code(node) == "0.044715", lambda text: "0.0"),
        ("activation",),
    ),
    Fault("residual lost", "residual order", dropped_operand(_is_residual, cst.Add), _RESIDUAL),
    Fault("residual taken after the norm", "residual order", _residual_after_norm, _RESIDUAL),
    Fault(
        "parallel residual for sequential",
        "parallel residual",
        lambda text: _flag_tests(text, ("residual", "parallel", "layer_norm_before")),
        _RESIDUAL,
    ),
    Fault("multiplier dropped", "multiplier dropped", dropped_operand(_is_setting, cst.Multiply, cst.Divide), _FACTOR),
    Fault(
        "output softcap lost", "multiplier dropped", replaced(_call_to("torch.tanh"), _first_argument), ("cap", "logit")
    ),
    Fault(
        "router's softmax after its choice lost",
        "router order",
        replaced(_softmax_last, _first_argument),
        _ROUTER,
    ),
    Fault("one expert too few", "router order", edited(_top_k), _ROUTER),
    Fault(
        "expert weights normalised or not",
        "router normalised",
        lambda text: _flag_tests(text, ("norm_topk", "normalize")),
        _ROUTER,
    ),
    Fault(
        "sum of expert weights lost",
        "router normalised",
        dropped_operand(lambda n, p: ".sum(" in code(n), cst.Divide),
        _ROUTER,
    ),
    Fault("shared expert dropped", "shared expert", dropped_operand(_sum_of_shared, cst.Add), ("expert", "term")),
    Fault(
        "gate of the shared expert dropped",
        "shared expert",
        replaced(_call_to("F.sigmoid", "torch.sigmoid"), _first_argument),
        (*_ROUTER, "activation"),
    ),
    Fault("gate and up of experts exchanged", "gate/up swapped", edited(_gate_first), ("gate",)),
    Fault("all-reduce missing", "all-reduce missing", edited(result(ROW, "alone({self}, {arg})"), _ALONE), _SHARDS),
    Fault("all-reduce doubled", "all-reduce doubled", edited(result(ROW, "all_reduce({})"), _TWICE), _SHARDS),
)
