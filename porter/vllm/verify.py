"""Proves a port inside an installed vLLM: log-probabilities of prompts and greedy tokens against the original."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from porter import __version__
from porter.errors import OriginalError
from porter.manifest import Port, record_verification
from porter.runtime.checkpoint import load_config, resolve_model
from porter.verify.checks.logits import tie_margin, wrong_tokens
from porter.verify.prompts import random_prompts, text_prompts
from porter.verify.reference import full_logits, quiet_transformers
from porter.verify.request import Request
from porter.verify.result import Case, Check, Verification
from porter.verify.run import few_threads, smallest_tp
from porter.verify.select import Selected, select_port
from porter.verify.subject import Subject
from porter.verify.tiny import model_type_of, shrink, tiny_config, write_checkpoint
from porter.verify.variants import Variant, of_this_release, unread_fields, variants
from porter.vllm import environment
from porter.vllm.engine import Answer, Job, run_jobs

Told = Callable[[str], None]
NEW_TOKENS = 16
TOP = 256  # log-probabilities asked for: all of a tiny vocabulary
WIDTHS = 2  # heads of 32: the smallest that vLLM's attention on a CPU has
_CPU = {"enforce_eager": True, "seed": 0}


@dataclass(frozen=True)
class Trial:
    """One checkpoint that the port is tried on."""

    name: str
    subject: Subject
    overrides: dict[str, Any]
    tp: tuple[int, ...] = ()

    def jobs(self, prefix: str = "") -> list[Job]:
        """The job of one rank, and one for each other tp_size."""
        length = max(map(len, self.subject.prompts)) + NEW_TOKENS + 1
        top = min(TOP, int(self.subject.config.get_text_config().vocab_size))
        options = {**_CPU, "dtype": self.subject.dtype, "max_model_len": length}
        if self.subject.trust_remote_code:
            options["trust_remote_code"] = True
        one = Job(f"{prefix}{self.name}", str(self.subject.folder), self.subject.prompts, NEW_TOKENS, top, options)
        return [one, *(_parallel(one, size) for size in self.tp)]


def _parallel(job: Job, size: int) -> Job:
    options = {**job.options, "tensor_parallel_size": size, "distributed_executor_backend": "mp"}
    return replace(job, name=f"{job.name}, tp {size}", options=options)


def verify(request: Request, told: Told = lambda step: None) -> Verification:
    """Prove what `request` names in vLLM. A port on disk that passes is marked verified.

    Raises PorterError or EngineError when it can't be tried at all; what is found is in the result.
    """
    started = time.monotonic()
    quiet_transformers()
    python = environment.find(request.vllm_python)
    with few_threads(request.random), select_port(request) as selected, tempfile.TemporaryDirectory() as name:
        skipped: list[Case] = []
        trials = list(_trials(request, selected.port, Path(name), skipped))
        told(f"running {len(trials)} checkpoints in vLLM")
        answers = run_jobs(python, [selected.port], [job for trial in trials for job in trial.jobs()])
        cases = (*(judge(trial, answers) for trial in trials), *skipped)
        result = _result(request, selected, cases, time.monotonic() - started)
        if result.passed and selected.recorded and not selected.converted:
            record_verification(selected.port, result.record())
    return result


def random_trial(port: Port, folder: Path, variant: Variant, dtype: str = "float32", tp: tuple[int, ...] = ()) -> Trial:
    """A tiny random checkpoint of the port's model type in `folder`. Raises OriginalError if there can be none."""
    config = tiny_config(model_type_of(port.architecture), WIDTHS)
    write_checkpoint(shrink(config, WIDTHS, **{**unread_fields(config, port), **variant.overrides}), folder)
    loaded = load_config(folder)
    return Trial(variant.name, _subject(port, folder, loaded, dtype, random_prompts(loaded)), variant.overrides, tp)


def judge(trial: Trial, answers: Mapping[str, Answer], prefix: str = "") -> Case:
    """The checks of one checkpoint."""
    first, *others = trial.jobs(prefix)
    checks = _checks(trial.subject, answers[first.name], "")
    for size, job in zip(trial.tp, others, strict=True):
        checks += _checks(trial.subject, answers[job.name], f"tp {size} ")
    return Case(trial.name, trial.overrides, tuple(checks))


def _trials(request: Request, port: Port, folder: Path, skipped: list[Case]) -> Iterator[Trial]:
    """The real checkpoint, or the tiny default, which has to run, and its variants."""
    if request.model is not None:
        place = resolve_model(request.model)
        config = load_config(place, request.trust_remote_code)
        prompts = text_prompts(place, config, request.trust_remote_code)
        subject = _subject(port, place, config, request.dtype, prompts, request.trust_remote_code)
        yield Trial("real weights", subject, {}, request.tp)
        return
    config = tiny_config(model_type_of(port.architecture), WIDTHS)
    default, *others = variants(config, port.path, of_this_release(port))
    yield random_trial(port, folder / "default", default, request.dtype, request.tp or (smallest_tp(config),))
    for i, variant in enumerate(v for v in others if "head_dim" not in v.overrides):
        try:
            yield random_trial(port, folder / str(i), variant, request.dtype)
        except OriginalError as error:
            skipped.append(Case(variant.name, variant.overrides, (), skipped=error.message))


def _subject(
    port: Port, folder: Path, config: Any, dtype: str, prompts: list[list[int]], trust_remote_code: bool = False
) -> Subject:
    return Subject(folder, port.path, torch.nn.Module, config, dtype, prompts, (), trust_remote_code)


# -- what vLLM answered, against the original ------------------------------------------------------


def _checks(subject: Subject, answer: Answer, prefix: str) -> list[Check]:
    if answer.error:
        return [Check(f"{prefix}prompt logprobs", "FAIL", detail=f"vLLM: {answer.error}")]
    return [_logprobs(subject, answer, f"{prefix}prompt logprobs"), _greedy(subject, answer, f"{prefix}greedy")]


def _logprobs(subject: Subject, answer: Answer, name: str) -> Check:
    """The next-token distribution at every position of every prompt."""
    divergences, shifts, best, rows = [], [], [], []
    for prompt, found in zip(subject.prompts, answer.logprobs, strict=True):
        theirs = full_logits(subject.reference, prompt)
        for position, entries in enumerate(found):
            if entries is None:
                continue
            expected = theirs[position - 1].double().log_softmax(-1)
            tokens = torch.tensor(list(entries))
            ours = torch.tensor(list(entries.values()), dtype=torch.float64)
            divergences.append(_divergence(expected[tokens], ours))
            shifts.append(float((expected[tokens] - ours).abs().max()))
            best.append(max(entries, key=lambda token: entries[token]))
            rows.append(theirs[position - 1])
    wrong = wrong_tokens(torch.tensor(best), torch.stack(rows), tie_margin(subject))
    kl, limit = abs(sum(divergences) / len(divergences)), subject.tolerance.kl
    passed = not wrong and (limit is None or kl <= limit)
    figure = f"KL {kl:.1e}, top-1 {1 - len(wrong) / len(best):.0%}"
    detail = f"largest shift {max(shifts):.1e} nats"
    data = {"worst": kl, "wrong": wrong, "max_logprob_shift": max(shifts)}
    return Check(name, "PASS" if passed else "FAIL", figure, "-" if limit is None else f"{limit:g}", detail, data)


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Kullback-Leibler divergence in nats, from log-probabilities of some tokens; all others count as one."""
    found = float((theirs.exp() * (theirs - ours)).sum())
    rest, our_rest = (max(1.0 - float(each.exp().sum()), 1e-9) for each in (theirs, ours))
    return found + rest * math.log(rest / our_rest)


def _greedy(subject: Subject, answer: Answer, name: str) -> Check:
    """Every token that vLLM chose is the best of the original after the same tokens, ties aside."""
    total = wrong = same = 0
    for prompt, tokens in zip(subject.prompts, answer.tokens, strict=True):
        logits = full_logits(subject.reference, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        total += len(tokens)
        wrong += len(wrong_tokens(torch.tensor(tokens), logits, tie_margin(subject)))
        same += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
    figure = f"{same} of {total} tokens"
    return Check(
        name, "FAIL" if wrong else "PASS", figure, "all", f"{wrong} beyond ties" if wrong else "", {"worst": wrong}
    )


def _result(request: Request, selected: Selected, cases: tuple[Case, ...], seconds: float) -> Verification:
    return Verification(
        architecture=selected.port.architecture,
        port=selected.note,
        port_sha256=selected.port.sha256,
        converted=selected.converted,
        checkpoint="tiny random" if request.random else str(request.model),
        dtype=request.dtype,
        cases=cases,
        limits=_untested(request, cases),
        versions={"porter": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        seconds=round(seconds, 1),
    )


def _untested(request: Request, cases: tuple[Case, ...]) -> tuple[str, ...]:
    found = [
        "other versions of vLLM: `porter conform` reads their source, and runs nothing",
        "kernels of other devices than the one that vLLM ran on",
        "compiled graphs: vLLM ran eagerly",
        "quantization, LoRA and long contexts",
    ]
    return (*found, *(f"{case.name}: {case.skipped}" for case in cases if case.skipped))
