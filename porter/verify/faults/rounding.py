"""Faults that only half precision shows: what the original computes in float32 computed in the working dtype."""

import libcst as cst

from porter.verify.faults.fault import Fault, replaced
from porter.verify.faults.mutate import Place, called, code

_HALF = ("round", "cast", "half", "dtype", "precision", "rout")


def _float_softmax(node: cst.BaseExpression, place: Place) -> bool:
    return isinstance(node, cst.Call) and called(node).endswith("softmax") and "torch.float" in code(node)


def _without_dtype(text: str) -> str:
    return text.replace("dtype=torch.float32", "dtype=None").replace("dtype=torch.float", "dtype=None")


def _widened(node: cst.BaseExpression, place: Place) -> bool:
    """`x.to(torch.float32)` or `x.float()` in a norm of the port's own."""
    text = code(node) if isinstance(node, cst.Call) else ""
    return "Norm" in place.owner and text.endswith((".to(torch.float32)", ".float()"))


def _narrow(text: str) -> str:
    return text.removesuffix(".to(torch.float32)").removesuffix(".float()")


FAULTS = (
    Fault(
        "router's softmax in half precision",
        "dtype of softmax",
        replaced(_float_softmax, _without_dtype),
        _HALF,
        "bfloat16",
    ),
    Fault("norm's float32 lost", "dtype of norm", replaced(_widened, _narrow), _HALF, "bfloat16"),
)
