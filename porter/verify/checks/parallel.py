"""tp_size n against 1: the same logits from shards, on threads of one process and through processes of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from porter.runtime.errors import ConfigError
from porter.runtime.model_runner import torch_defaults
from porter.runtime.parallel import run_ranks
from porter.verify.checks.generation import Scenario, Tally, run_scenario
from porter.verify.checks.logits import tolerated
from porter.verify.compare import logits_error, relative_error
from porter.verify.port_run import PortRun, load_port_weights, run_port
from porter.verify.result import Check
from porter.verify.subject import Subject

T = TypeVar("T")


def check(subject: Subject, size: int) -> Check:
    """PASS if all ranks return the logits of tp_size 1; skip if the model's sizes don't divide."""
    name = f"tp {size}"
    try:
        ranks = _on_ranks(subject, size, _rank_logits)
    except ConfigError as error:
        return Check(name, "skip", detail=str(error))
    worst = max(logits_error(logits, subject.port_logits, subject.half) for logits in ranks)
    limit = subject.tolerance.parallel
    if worst <= limit:
        return Check(name, "PASS", f"{worst:.1e}", f"{limit:g}", "", {"worst": worst})
    culprit = _culprit(subject, size)
    where = f"first at {culprit}; " if culprit else ""
    detail = f"{where}look at: {_cause(subject, culprit)}"
    return Check(name, "FAIL", f"{worst:.1e}", f"{limit:g}", detail, {"worst": worst, "culprit": culprit})


def _on_ranks(subject: Subject, size: int, work: Callable[[Subject], T]) -> list[T]:
    with torch_defaults(subject.torch_dtype, torch.device("cpu")):  # the default is shared by the threads
        return run_ranks(size, lambda rank: work(subject))


def _culprit(subject: Subject, size: int) -> str | None:
    """The first module, in execution order, whose output on any rank is whole and not that of tp_size 1."""
    alone = {key: call.outputs[:1] for key, call in subject.port_run.trace.keyed()}
    for calls in zip(*(run.trace.keyed() for run in _on_ranks(subject, size, _rank_run)), strict=True):
        for key, call in calls:
            whole = [each for each in alone.get(key, ()) if call.outputs and each.shape == call.outputs[0].shape]
            if any(not relative_error(call.outputs[0], each) <= subject.tolerance.parallel for each in whole):
                return str(key[0])
    return None


def _cause(subject: Subject, culprit: str | None) -> str:
    module = subject.model.get_submodule(culprit) if culprit else None
    if module is not None and any(hasattr(child, "cache_shape") for child in module.children()):
        return "heads on ranks: key-value heads replicated, slopes or sinks of the rank's own heads, fused layouts"
    if type(module).__name__ == "RowParallelLinear":
        return "the sum over ranks (all-reduce): missing, done twice, or a bias added on every rank; the rank's shard"
    return "which dimension is sharded, an all-reduce missing or doubled, KV heads replicated, fused layouts"


def check_processes(subject: Subject, size: int) -> Check:
    """Greedy generation by `size` processes, judged token by token."""
    name, tally = f"tp {size} processes", Tally()
    try:
        run_scenario(subject, Scenario(name, {"tensor_parallel_size": size}), tally)
    except ConfigError as error:
        return Check(name, "skip", detail=str(error))
    share = 1 - tally.wrong / max(tally.tokens, 1)
    return Check(
        name,
        "PASS" if tolerated(subject, tally.wrong, tally.tokens) else "FAIL",
        f"{share:.0%} of {tally.tokens}",
        "100%",
        tally.first,
        {"worst": 1 - share},
    )


def _rank_model(subject: Subject) -> Any:
    return load_port_weights(subject.build(), subject.folder)


def _rank_logits(subject: Subject) -> torch.Tensor:
    return subject.logits(_rank_model(subject))


def _rank_run(subject: Subject) -> PortRun:
    return run_port(_rank_model(subject), subject.prompts, subject.torch_dtype)
