"""Each module's output against the original's, in execution order, on one forward over several prompts."""

import torch

from porter.verify.causes import suggest
from porter.verify.compare import (
    Comparison,
    ModuleError,
    compare,
    first_divergence,
    originals,
    token_errors,
    wrong_by_itself,
)
from porter.verify.port_run import replay
from porter.verify.result import Check
from porter.verify.subject import Subject

NAME = "modules"
_LISTED = 40  # module errors kept in the report


def check(subject: Subject) -> Check:
    """PASS if every module is within the dtype's limit; else the first divergence and where it comes from."""
    comparison = _compare(subject)
    limit = subject.tolerance.module
    worst = _percentile(comparison) if subject.half else max((e.error for e in comparison.errors), default=float("inf"))
    figure = f"{worst:.1e} over {len(comparison.errors)}"
    if worst <= limit:
        return Check(NAME, "PASS", figure, f"{limit:g}", "", _data(comparison, worst))
    first = first_divergence(comparison.errors, limit)
    culprit = wrong_by_itself(comparison.errors, limit, lambda error: _rerun(subject, comparison, error))
    data = {**_data(comparison, worst), "first": first and first.module, "culprit": culprit and culprit.module}
    return Check(NAME, "FAIL", figure, f"{limit:g}", _explain(subject, first, culprit), data)


def _compare(subject: Subject) -> Comparison:
    rounded = originals(subject.rounded_run.trace, subject.reference) if subject.half else None
    original = originals(subject.reference_run.trace, subject.reference)
    return compare(subject.model, subject.port_run.trace, original, rounded)


def _percentile(comparison: Comparison) -> float:
    return float(torch.tensor([error.error for error in comparison.errors]).quantile(0.95))


def _explain(subject: Subject, first: ModuleError | None, culprit: ModuleError | None) -> str:
    if first is None:
        return "no module of the port could be compared"
    told = f"first divergence at {first.module} ({first.kind}), {first.error:.1e}"
    if culprit is None:
        return f"{told}, on input that is already wrong"
    where = "wrong by itself"
    if culprit.module != first.module:
        where = f"inherited: wrong by itself is {culprit.module} ({culprit.kind})"
    return f"{told}, {where}; look at: {_cause(subject, culprit)}"


def _rerun(subject: Subject, comparison: Comparison, error: ModuleError) -> float | None:
    """The module's error when it is given the original's input; None if that can't be done."""
    expected = comparison.expected.get((error.module, error.index))
    inputs = comparison.inputs.get((error.module, error.index))
    if expected is None or not inputs or error.index:
        return None
    outputs = replay(subject.model, subject.prompts, error.module, inputs)
    return float(token_errors(outputs[0], expected).max()) if outputs else None


def _cause(subject: Subject, culprit: ModuleError) -> str:
    module = subject.model.get_submodule(culprit.module)
    attends = any(hasattr(child, "cache_shape") for child in module.children())
    return suggest(culprit.kind, attends, culprit.token_errors, subject.positions, subject.tolerance.module)


def _data(comparison: Comparison, worst: float) -> dict[str, object]:
    errors = sorted(comparison.errors, key=lambda error: -error.error)[:_LISTED]
    listed = [{"module": error.module, "kind": error.kind, "error": error.error} for error in errors]
    return {"worst": worst, "largest": listed, "not_compared": list(comparison.not_compared)}
