"""What is compared with vLLM's answers, and how its process is run; a made-up `vllm` stands in for the engine."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from porter.errors import PortError, UsageError
from porter.manifest import Port
from porter.runtime.checkpoint import load_config
from porter.verify.prompts import random_prompts
from porter.verify.reference import full_logits
from porter.verify.subject import Subject
from porter.verify.tiny import tiny_config, write_checkpoint
from porter.vllm import engine, environment
from porter.vllm.engine import Answer, Job, run_jobs
from porter.vllm.verify import NEW_TOKENS, Trial, judge

FAKE = """\
import os
from types import SimpleNamespace as Record

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class ModelRegistry: ...

class LLM:
    def __init__(self, model, **options):
        if model == "bad":
            raise RuntimeError("engine failed") from ValueError("no such model\\nmore")
        if model == "dies":
            os._exit(3)

    def generate(self, prompts, params, use_tqdm):
        entry = {7: Record(logprob=-0.5)}
        tokens = [7] * params.options["max_tokens"]
        return [Record(outputs=[Record(token_ids=tokens)], prompt_logprobs=[None, entry]) for _ in prompts]
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Answer]]:
    """Runs jobs on models of these names with the made-up vLLM."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(FAKE)
    (tmp_path / "vllm" / "plugins.py").write_text("def load_general_plugins(): ...\n")
    (tmp_path / "vllm" / "distributed.py").write_text("def cleanup_dist_env_and_memory(): ...\n")
    monkeypatch.setattr(engine, "environment", lambda folder: {"PYTHONPATH": str(tmp_path)})

    def run(*models: str) -> dict[str, Answer]:
        jobs = [Job(model, model, [[1, 2]], 3, 1) for model in models]
        return run_jobs(Path(sys.executable), [], jobs)

    return run


def test_answers_come_back_by_name(fake: Callable[..., dict[str, Answer]]) -> None:
    answer = fake("fine")["fine"]
    assert answer.tokens == ((7, 7, 7),)
    assert answer.logprobs == ((None, {7: -0.5}),)
    assert answer.error == ""


def test_a_job_that_raises_says_the_last_cause_on_one_line(fake: Callable[..., dict[str, Answer]]) -> None:
    answers = fake("bad", "fine")
    assert answers["bad"].error == "ValueError: no such model more"
    assert answers["fine"].error == ""


def test_a_process_that_dies_fails_its_job_alone(fake: Callable[..., dict[str, Answer]]) -> None:
    answers = fake("fine", "dies", "last")
    assert "exit code 3" in answers["dies"].error
    assert answers["fine"].error == answers["last"].error == ""


def test_a_port_for_another_engine_is_no_plugin(tmp_path: Path) -> None:
    port = Port(tmp_path, {"architecture": "Oak", "module": "oak.py", "module_sha256": ""})
    with pytest.raises(PortError, match="--target vllm"):
        engine.install(port, tmp_path / "site")


def test_a_python_without_vllm_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no vLLM"):
        environment.find(tmp_path / "python")


# -- judging ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(tiny_config("llama"), folder)
    config = load_config(folder)
    prompts = random_prompts(config)[:2]
    return Trial("default", Subject(folder, folder, torch.nn.Module, config, "float32", prompts), {})


@pytest.fixture(scope="module")
def perfect(trial: Trial) -> Answer:
    """What an engine that computes exactly the original would answer."""
    tokens, logprobs = [], []
    for prompt in trial.subject.prompts:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(full_logits(trial.subject.reference, ids)[-1].argmax()))
        rows = full_logits(trial.subject.reference, prompt).log_softmax(-1)
        tokens.append(tuple(ids[len(prompt) :]))
        logprobs.append((None, *(dict(enumerate(row.tolist())) for row in rows[:-1])))
    return Answer(tuple(tokens), tuple(logprobs))


def failed(trial: Trial, answer: Answer) -> str:
    case = judge(trial, {trial.jobs()[0].name: answer})
    return "" if case.failure is None else case.failure.name


def test_the_original_itself_passes(trial: Trial, perfect: Answer) -> None:
    assert failed(trial, perfect) == ""


def test_another_distribution_fails(trial: Trial, perfect: Answer) -> None:
    """A temperature of 1.05 keeps every best token, and still is another model."""
    flat = tuple(tuple(row and _flattened(row) for row in rows) for rows in perfect.logprobs)
    assert failed(trial, replace(perfect, logprobs=flat)) == "prompt logprobs"


def _flattened(row: Mapping[int, float]) -> dict[int, float]:
    return dict(enumerate((torch.tensor(list(row.values())) / 1.05).log_softmax(-1).tolist()))


def test_a_part_of_a_vocabulary_is_compared_as_well(trial: Trial, perfect: Answer) -> None:
    """Of a large vocabulary vLLM gives the best tokens; a distribution that is the original's has no divergence."""

    def best(answer: Answer) -> Answer:
        rows = (tuple(row and _best(row) for row in rows) for rows in answer.logprobs)
        return replace(answer, logprobs=tuple(rows))

    flat = tuple(tuple(row and _flattened(row) for row in rows) for rows in perfect.logprobs)
    shifted = replace(
        perfect, logprobs=tuple(tuple(row and _shifted(row) for row in rows) for rows in perfect.logprobs)
    )
    assert failed(trial, best(perfect)) == failed(trial, best(shifted)) == ""
    assert failed(trial, best(replace(perfect, logprobs=flat))) == "prompt logprobs"


def _best(row: Mapping[int, float]) -> dict[int, float]:
    return {token: row[token] for token in sorted(row, key=lambda token: -row[token])[:20]}


def _shifted(row: Mapping[int, float]) -> dict[int, float]:
    """As rounding leaves it: every probability a little higher."""
    return {token: value + 2e-5 for token, value in row.items()}


def test_a_wrong_token_fails(trial: Trial, perfect: Answer) -> None:
    wrong = ((*perfect.tokens[0][:-1], (perfect.tokens[0][-1] + 1) % 131), *perfect.tokens[1:])
    assert failed(trial, replace(perfect, tokens=wrong)) == "greedy"


def test_an_error_of_vllm_fails(trial: Trial) -> None:
    assert failed(trial, Answer(error="ValueError: no such layer")) == "prompt logprobs"


def test_each_tp_size_is_judged_apart(trial: Trial, perfect: Answer) -> None:
    both = replace(trial, tp=(2,))
    one, two = (job.name for job in both.jobs())
    case = judge(both, {one: perfect, two: Answer(error="ranks differ")})
    assert case.failure is not None
    assert case.failure.name == "tp 2 prompt logprobs"
