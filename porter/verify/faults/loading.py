"""Faults of weight rules, of loading and of the model as a whole."""

from collections.abc import Callable

import libcst as cst

from porter.verify.faults.fault import Fault, loaded, replaced, rules
from porter.verify.faults.mutate import Place, called, code

_SWAPPED_LAYERS = '''def faulty(weights):
    """The first two layers in each other's place."""
    for name, tensor in weights:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        other = {"0": "1", "1": "0"}.get(number, number)
        yield (name if number is None else name.replace(f".{number}.", f".{other}.", 1)), tensor
'''
_ROUNDED = '''def faulty(weights):
    """A matrix rounded to bfloat16 on its way."""
    for name, tensor in weights:
        yield name, tensor.bfloat16().to(tensor.dtype) if "WORD" in name else tensor
'''
_TENSOR = '''def faulty(weights):
    """A tensor changed on its way."""
    for name, tensor in weights:
        yield name, (CHANGE) if "WORD" in name and tensor.ndim == NDIM else tensor
'''
_EXPERTS = '''import re


def faulty(weights):
    """Each expert in the next one's place."""
    for name, tensor in weights:
        if "experts" in name and tensor.ndim == 3:
            tensor = tensor.roll(1, 0)
        elif match := re.search(r"experts\\.(\\d+)\\.", name):
            name = name.replace(match[0], f"experts.{(int(match[1]) + 1) % 4}.")
        yield name, tensor
'''


def _changed(word: str, change: str, ndim: int) -> str:
    return _TENSOR.replace("CHANGE", change).replace("WORD", word).replace("NDIM", str(ndim))


def _swap(first: str, second: str) -> Callable[[str], str]:
    return lambda text: text.replace(first, "@").replace(second, first).replace("@", second)


def _layer_loop(node: cst.BaseExpression, place: Place) -> bool:
    return isinstance(node, cst.Call) and called(node) == "enumerate" and "self." in code(node)


def _logits(node: cst.BaseExpression, place: Place) -> bool:
    return called(node) == "self.lm_head" and place.method == "compute_logits"


_ROWS = ("row", "embedding")
_ORDER = ("shard", "order", "swapped", "exchanged", "layout")
_WEIGHT = ("weight",)

FAULTS = (
    Fault("q and k exchanged", "q/k/v order", rules("packed", _swap('"q"', '"k"')), (*_ORDER, "needs")),
    Fault("k and v exchanged", "q/k/v order", rules("packed", _swap('"k"', '"v"')), _ORDER),
    Fault("fused layout taken for the other", "interleave", rules("fused", _swap('"grouped"', '"contiguous"')), _ORDER),
    Fault("gate and up exchanged", "gate/up swapped", rules("packed", _swap(": 0", ": 1")), ("gate",)),
    Fault("transposition forgotten", "transposed", rules("transposed", lambda text: "()"), ("needs", "transposed")),
    Fault("tie forgotten", "tie wrong", rules("tied", lambda text: ""), ("filled by no tensor", "tie")),
    Fault(
        "head always tied",
        "tie wrong",
        replaced(
            _logits,
            lambda text: (
                f"{text} * 0 + torch.nn.functional.linear(hidden_states, "
                "next(p for p in self.parameters() if p.ndim == 2 and len(p) >= self.config.vocab_size))"
                "[:, : self.config.vocab_size]"
            ),
        ),
        ("tied", "head"),
    ),
    Fault("logits scaled", "multiplier dropped", replaced(_logits, lambda text: f"0.99 * {text}"), ("factor", "scale")),
    Fault(
        "layers in reverse",
        "layer order",
        replaced(_layer_loop, lambda text: text.replace("(", "(list(reversed(", 1)[:-1] + ")))"),
        ("order", "layer"),
    ),
    Fault(
        "last layer skipped",
        "layer skipped",
        replaced(_layer_loop, lambda text: f"list({text})[:-1]"),
        ("never called", "layer"),
    ),
    Fault("two layers exchanged in loading", "layer order", loaded(_SWAPPED_LAYERS, "*"), _WEIGHT + _ORDER),
    Fault(
        "rows of the embedding moved by one",
        "embedding rows",
        loaded(_changed("embed", "tensor.roll(1, 0)", 2), "embed|lm_head", "embed"),
        _ROWS,
    ),
    Fault(
        "last row of the embedding lost",
        "embedding rows",
        loaded(_changed("embed", "torch.cat([tensor[:-1], 0 * tensor[-1:]])", 2), "embed|lm_head", "embed"),
        _ROWS,
    ),
    Fault("experts one further", "expert order", loaded(_EXPERTS, "experts", "xperts"), ("expert",)),
    Fault(
        "a projection rounded to bfloat16",
        "precision of weights",
        loaded(_ROUNDED.replace("WORD", "o_proj"), "o_proj", "o_proj"),
        _WEIGHT,
    ),
    Fault(
        "a square projection transposed",
        "transposed",
        loaded(_changed("o_proj", "tensor.T if tensor.shape[0] == tensor.shape[1] else tensor", 2), "o_proj", "o_proj"),
        (*_WEIGHT, "transposed"),
    ),
    Fault(
        "heads of keys in reverse",
        "KV head mapping",
        loaded(
            _changed("k_proj", "tensor.reshape(2, -1, tensor.shape[1]).flip(0).reshape(tensor.shape)", 2),
            "k_proj|qkv_proj",
            "k_proj",
        ),
        (*_ORDER, "head"),
    ),
    Fault(
        "norm weights lost in loading",
        "norm weight + 1",
        loaded(_changed("norm", "0 * tensor + 1", 1), "norm", "RMSNorm("),
        ("norm", "weight"),
    ),
    Fault(
        "bias of the query lost in loading",
        "bias dropped",
        loaded(_changed("q_proj.bias", "0 * tensor", 1), "q_proj|qkv_proj", "bias"),
        ("bias", "feature"),
    ),
    Fault(
        "biases lost in loading",
        "bias dropped",
        loaded(_changed("bias", "0 * tensor", 1), "*", "LayerNorm("),
        ("bias",),
    ),
)
