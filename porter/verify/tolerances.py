"""The one table of tolerances. Loosening a row is a change of its own, with its reason."""

from dataclasses import dataclass

from porter.errors import UsageError


@dataclass(frozen=True)
class Tolerance:
    """Limits for one dtype.

    module: in float32, a module's largest error of a token relative to the original's output. In half precision, the
        95th percentile over modules of the error divided by the original's own error in that dtype.
    kl: mean Kullback-Leibler divergence of the next-token distributions, in nats; None: reported, not judged.
    margin: two best logits closer than this are a tie, and either token is right. In half precision the original's own
        largest logit error is added.
    parallel, quantized: relative error of the logits of tp_size n against 1, and of a quantized layer against its own
        dequantised weights.
    """

    module: float
    kl: float | None
    margin: float
    parallel: float
    quantized: float


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(module=1e-4, kl=1e-6, margin=1e-3, parallel=1e-4, quantized=1e-4),
    "bfloat16": Tolerance(module=1.2, kl=None, margin=1e-2, parallel=5e-2, quantized=5e-2),
    "float16": Tolerance(module=1.2, kl=None, margin=1e-3, parallel=1e-2, quantized=1e-2),
}


def tolerance(dtype: str) -> Tolerance:
    """The row for `dtype`; UsageError if there is none."""
    if dtype not in TOLERANCES:
        raise UsageError(f"no tolerances for dtype {dtype}", f"use one of {', '.join(TOLERANCES)}")
    return TOLERANCES[dtype]
