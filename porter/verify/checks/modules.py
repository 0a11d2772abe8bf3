"""Each module's output against the original's, in execution order, on one forward over several prompts."""

from dataclasses import replace
from itertools import pairwise

import torch

from porter.verify.causes import Culprit, suggest
from porter.verify.compare import (
    Comparison,
    ModuleError,
    compare,
    finite,
    first_divergence,
    originals,
    other_choices,
    rules_of,
    token_errors,
    turned_layout,
    usual_distance,
    wrong_by_itself,
)
from porter.verify.port_run import replay
from porter.verify.result import Check
from porter.verify.signatures import Evidence
from porter.verify.subject import Subject

NAME = "modules"
_HALF_LIMIT = 2e-2  # error of a token that counts as wrong in half precision, when a cause is looked for
_PUT_RIGHT = 0.1  # of an error may remain once its cause is removed
_OTHER_CHOICES = 0.2  # of the tokens, given the original's input: rounding tips a router near a tie for far fewer
_STEP = 0.5  # of the later modules must be wrong too for a divergence that stays


def check(subject: Subject) -> Check:
    """PASS if every module is within the dtype's limit; else the first divergence and where it comes from."""
    comparison = _compare(subject)
    limit = subject.tolerance.module
    worst = _percentile(comparison) if subject.half else max((e.error for e in comparison.errors), default=float("inf"))
    if worst > limit and subject.chooses_otherwise:
        comparison = _alone(subject, comparison)
        worst = _percentile(comparison)
    moved = () if subject.same_release or subject.half else moved_elsewhere(comparison.errors, limit)
    if moved:
        comparison = replace(comparison, errors=tuple(e for e in comparison.errors if e not in moved))
        worst = max((e.error for e in comparison.errors), default=float("inf"))
    figure = f"{worst:.1e} over {len(comparison.errors)}"
    if worst <= limit:
        told = f"at another place in this release, with the same result: {', '.join(e.module for e in moved)}"
        return Check(NAME, "PASS", figure, f"{limit:g}", told if moved else "", _data(comparison, worst))
    first = first_divergence(comparison.errors, limit)
    culprit = wrong_by_itself(comparison.errors, limit, lambda error: _rerun(subject, comparison, error))
    fused = _fused_layout(subject, comparison, culprit) if culprit else ""
    named = fused or (culprit and culprit.module)
    data = {**_data(comparison, worst), "first": first and first.module, "culprit": named}
    return Check(NAME, "FAIL", figure, f"{limit:g}", _explain(subject, comparison, first, culprit, fused), data)


def moved_elsewhere(errors: tuple[ModuleError, ...], limit: float) -> tuple[ModuleError, ...]:
    """Modules that give something else while all that follows is right: another release does part of their work, such
    as a factor on embeddings, in the module above."""
    wrong = [i for i, error in enumerate(errors) if not error.error <= limit]
    alone = bool(wrong) and wrong[-1] + 1 < len(errors) and all(j - i > 1 for i, j in pairwise(wrong))
    return tuple(errors[i] for i in wrong) if alone else ()


def _fused_layout(subject: Subject, comparison: Comparison, culprit: ModuleError) -> str:
    """A fused q/k/v layer in a wrong attention, if reading its weight in the other layout puts the attention right."""
    error = _rerun(subject, comparison, culprit)
    for name, layer in subject.model.get_submodule(culprit.module).named_children():
        if name in rules_of(subject.model).fused and error is not None:
            with turned_layout(layer, rules_of(subject.model).fused[name]):
                after = _rerun(subject, comparison, culprit)
            if after is not None and after < _PUT_RIGHT * error:
                return f"{culprit.module}.{name}"
    return ""


def _compare(subject: Subject) -> Comparison:
    rounded = originals(subject.rounded_run.trace, subject.reference) if subject.half else None
    return compare(subject.model, subject.port_run.trace, subject.original_calls, rounded)


def _alone(subject: Subject, comparison: Comparison) -> Comparison:
    """The comparison of each module on the original's input; those that can't be given it are left out."""
    local = [(error, _rerun(subject, comparison, error)) for error in comparison.errors]
    errors = tuple(replace(error, error=found) for error, found in local if found is not None)
    return replace(comparison, errors=errors)


def _percentile(comparison: Comparison) -> float:
    return float(torch.tensor([error.error for error in comparison.errors]).quantile(0.95))


def _explain(
    subject: Subject, comparison: Comparison, first: ModuleError | None, culprit: ModuleError | None, fused: str
) -> str:
    if first is None:
        return "no module of the port could be compared"
    told = (
        f"first divergence at {first.module} ({first.kind}), {first.error:.1e}, {_course(subject, comparison, first)}"
    )
    if left := _never_called(subject):
        told += f", and the port never calls {left}"
    if culprit is None:
        return f"{told}, on input that is already wrong"
    if fused:
        cause = "its weight is read in the wrong layout of q, k and v (shards): read in the other, attention is right"
        return f"{told}, inherited: wrong by itself is {fused}; look at: {cause}"
    where = "wrong by itself"
    if culprit.module != first.module:
        where = f"inherited: wrong by itself is {culprit.module} ({culprit.kind})"
    return f"{told}, {where}; look at: {_cause(subject, comparison, culprit)}"


def _never_called(subject: Subject) -> str:
    """The first module of the port that its run left out though the original called its own of that name."""
    called = {call.module for call in subject.port_run.trace.calls}
    theirs = subject.original_calls
    missing = (name for name, _ in subject.model.named_modules() if name not in called and name in theirs)
    return next(missing, "")


def _course(subject: Subject, comparison: Comparison, first: ModuleError) -> str:
    """A step: what follows is wrong too. A spike: what follows is right again."""
    later = comparison.errors[comparison.errors.index(first) + 1 :]
    wrong = sum(not error.error <= subject.tolerance.module for error in later)
    return "a step" if wrong >= _STEP * len(later) else "a spike"


def _rerun_outputs(subject: Subject, comparison: Comparison, error: ModuleError) -> tuple[torch.Tensor, ...]:
    """What the module returns when it is given the original's input; nothing if that can't be done."""
    key = (error.module, error.index)
    inputs = comparison.inputs.get(key)
    if not inputs or error.index or key not in comparison.expected:
        return ()
    return replay(subject.model, subject.prompts, subject.torch_dtype, error.module, inputs)


def _rerun_output(subject: Subject, comparison: Comparison, error: ModuleError) -> torch.Tensor | None:
    """Of these outputs the one that `error` is about."""
    return _fitting(comparison, error, _rerun_outputs(subject, comparison, error))


def _fitting(comparison: Comparison, error: ModuleError, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    key = (error.module, error.index)
    fits = len(outputs) > error.output and outputs[error.output].shape == comparison.expected[key].shape
    return outputs[error.output] if fits else None


def _rerun(subject: Subject, comparison: Comparison, error: ModuleError) -> float | None:
    """The module's error when it is given the original's input, in the units of `limit`; None if that can't be done."""
    outputs = _rerun_outputs(subject, comparison, error)
    output = _fitting(comparison, error, outputs)
    if output is None:
        return None
    expected = comparison.expected[error.module, error.index]
    theirs = subject.original_calls[comparison.names[error.module][0]][error.index].outputs
    if other_choices(outputs, theirs) > _OTHER_CHOICES:
        return float("inf")
    if error.rounding is None:
        return finite(float(token_errors(output, expected).max()))
    return finite(usual_distance(output, expected) / error.rounding)


def _evidence(subject: Subject, comparison: Comparison, culprit: ModuleError) -> Evidence:
    key = (culprit.module, culprit.index)
    output = _rerun_output(subject, comparison, culprit)
    ours = comparison.ours[key] if output is None else output
    module = subject.model.get_submodule(culprit.module)
    norm = module if "Norm" in culprit.kind else None
    limit = _HALF_LIMIT if subject.half else subject.tolerance.module
    inputs = comparison.inputs.get(key, {})
    return Evidence(culprit.kind, ours, comparison.expected[key], inputs, subject.positions, limit, norm)


def _cause(subject: Subject, comparison: Comparison, culprit: ModuleError) -> str:
    if subject.recorded is not None:
        return "the difference itself: a recording has no modules to try causes on"
    found = _evidence(subject, comparison, culprit)
    original = subject.reference.get_submodule(comparison.names[culprit.module][0])
    port = subject.model.get_submodule(culprit.module)

    def rerun() -> float | None:
        again = _rerun_output(subject, comparison, culprit)
        return None if again is None else float(token_errors(again, found.expected).max())

    return suggest(Culprit(port, original, subject.model, subject.reference, rerun), found)


def _data(comparison: Comparison, worst: float) -> dict[str, object]:
    listed = [error.to_json() for error in comparison.errors]
    return {"worst": worst, "modules": listed, "not_compared": list(comparison.not_compared)}
