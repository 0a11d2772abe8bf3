"""tp_size n against 1: the same logits from shards, on threads of one process and through processes of their own."""

from typing import Any

import torch

from porter.runtime.errors import ConfigError
from porter.runtime.model_runner import torch_defaults
from porter.runtime.parallel import run_ranks
from porter.verify.checks.generation import Scenario, Tally, run_scenario
from porter.verify.compare import relative_error
from porter.verify.port_run import load_port_weights, port_logits
from porter.verify.result import Check
from porter.verify.subject import Subject


def check(subject: Subject, size: int) -> Check:
    """PASS if all ranks return the logits of tp_size 1; skip if the model's sizes don't divide."""
    name = f"tp {size}"
    try:
        with torch_defaults(subject.torch_dtype, torch.device("cpu")):  # the default is shared by the threads
            ranks = run_ranks(size, lambda rank: _rank_logits(subject))
    except ConfigError as error:
        return Check(name, "skip", detail=str(error))
    worst = max(relative_error(logits, subject.port_run.logits) for logits in ranks)
    limit = subject.tolerance.parallel
    passed = worst <= limit
    detail = (
        "" if passed else "look at: which dimension is sharded, biases added once, KV heads replicated, fused layouts"
    )
    return Check(name, "PASS" if passed else "FAIL", f"{worst:.1e}", f"{limit:g}", detail, {"worst": worst})


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
        "FAIL" if tally.wrong else "PASS",
        f"{share:.0%} of {tally.tokens}",
        "100%",
        tally.first,
        {"worst": 1 - share},
    )


def _rank_logits(subject: Subject) -> torch.Tensor:
    model: Any = load_port_weights(subject.build(), subject.folder)
    return port_logits(model, subject.prompts)
