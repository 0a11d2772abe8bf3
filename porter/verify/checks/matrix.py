"""However the same tokens are computed, the logits are the same: the port against its own one forward."""

from itertools import takewhile
from typing import Any

from torch import nn

from porter.runtime.layers.state import StateMixer
from porter.verify.compare import compare, logits_error, originals, token_errors
from porter.verify.port_run import run_port
from porter.verify.result import Check
from porter.verify.schedule import Schedule, schedules
from porter.verify.subject import Subject

NAME = "matrix"
_CAUSES = {
    "decode": "decode: slots, context lengths, block tables or positions of single tokens",
    "chunks": "chunked prefill: keys of earlier chunks in the cache, positions or the window",
    "mixed batches": "mixed batches: what one sequence's tokens take from another's",
    "alone": "batching: what a sequence takes from those it is computed with",
    "prefix": "shared prefix blocks: what is read from a cache that another sequence filled",
}


def check(subject: Subject) -> Check:
    """PASS if every schedule gives the logits of one forward at every position; else the module that does not."""
    limit, errors = subject.tolerance.parallel, {}
    expected = subject.port_logits
    for name, steps in schedules(subject.prompts, subject.keeps_states).items():
        logits = subject.logits(subject.model, steps)
        found = token_errors(logits, expected)
        errors[name] = logits_error(logits, expected, subject.half)
        if not errors[name] <= limit:
            culprit, cause = _culprit(subject, steps), _CAUSES[name]
            where = f", first at {culprit}" if culprit else ""
            if shared := _shared_cache(subject):
                culprit = _around(subject, shared)
                cause = f"{' and '.join(shared[:2])} are handed the same cache by {culprit}"
            start = int(subject.positions[~(found <= limit)].min())
            detail = f"{name}: {errors[name]:.1e}, from position {start} on{where}; look at: {cause}"
            data = {"worst": errors[name], "errors": errors, "culprit": culprit}
            return Check(NAME, "FAIL", f"{errors[name]:.1e}", f"{limit:g}", detail, data)
    worst = max(errors.values())
    data = {"worst": worst, "errors": errors, **states_kept(subject)}
    return Check(NAME, "PASS", f"{worst:.1e}", f"{limit:g}", ", ".join(errors), data)


def states_kept(subject: Subject) -> dict[str, bool]:
    """Says of a port with states that no prefix is shared."""
    return {"keeps_states": True} if subject.keeps_states else {}


def _around(subject: Subject, names: list[str]) -> str:
    """The innermost module that holds all of `names` and calls them itself: a list of layers does not."""
    parts = [name.split(".") for name in names]
    shared = [pieces[0] for pieces in takewhile(lambda pieces: len(set(pieces)) == 1, zip(*parts, strict=False))]
    while shared and isinstance(subject.model.get_submodule(".".join(shared)), nn.ModuleList):
        shared.pop()
    return ".".join(shared)


def _culprit(subject: Subject, steps: Schedule) -> str | None:
    """The first module with attention in it whose output isn't the original's: all others work on single tokens."""
    run = run_port(subject.model, subject.prompts, subject.torch_dtype, steps)
    comparison = compare(subject.model, run.trace, originals(subject.reference_run.trace, subject.reference))
    limit = subject.tolerance.parallel
    wrong = (error for error in comparison.errors if not error.error <= limit)
    return next((error.module for error in wrong if _attends(subject, error.module)), None)


def _attends(subject: Subject, name: str) -> bool:
    modules = list(subject.model.get_submodule(name).modules())
    return any(hasattr(module, "cache_shape") or isinstance(module, StateMixer) for module in modules)


def _shared_cache(subject: Subject) -> list[str]:
    """Attention layers that are handed one cache, which each must have to itself."""
    seen: dict[int, list[str]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = next((arg for arg in (*args, *kwargs.values()) if getattr(arg, "ndim", 0) >= 4), None)
            if cache is not None and name not in seen.setdefault(cache.data_ptr(), []):
                seen[cache.data_ptr()].append(name)

        return hook

    layers = [(n, m) for n, m in subject.model.named_modules() if hasattr(m, "cache_shape")]
    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in layers]
    try:
        subject.logits(subject.model)
    finally:
        for handle in handles:
            handle.remove()
    return next((names for names in seen.values() if len(names) > 1), [])
