"""Runs prompts in an installed vLLM, in its own Python, with ports as plugins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from porter.errors import PortError
from porter.manifest import Port

WORKER = Path(__file__).parent / "worker.py"
# The engine in the worker's own process; a cache that suits small models; nothing fetched, nothing sent.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share what processors there are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Job:
    """One checkpoint and what to do with it; `top` log-probabilities are returned for each prompt position."""

    name: str
    model: str
    prompts: list[list[int]]
    max_tokens: int
    top: int
    options: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)  # architecture -> "module:Class" to register imported already


@dataclass(frozen=True)
class Answer:
    """What vLLM made of a job: for each prompt its greedy tokens and its log-probabilities; or why it failed."""

    tokens: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[tuple[Mapping[int, float] | None, ...], ...] = ()
    error: str = ""
    seconds: float = 0.0


def run_jobs(python: Path, ports: Sequence[Port], jobs: Sequence[Job], timeout: float = 900) -> dict[str, Answer]:
    """Each job's answer, by its name. The ports are registered by vLLM itself, through their entry points.

    A process that dies fails the job that it was at; the jobs after it are tried in a new one.
    """
    with tempfile.TemporaryDirectory(prefix="porter-vllm-") as name:
        folder = Path(name)
        for port in ports:
            install(port, folder)
        answers: dict[str, Answer] = {}
        while left := [job for job in jobs if job.name not in answers]:
            problem = _start(python, folder, left, timeout)
            done = _read(folder / "results.jsonl")
            if not set(done) - set(answers):
                done[left[0].name] = Answer(error=problem or "the process gave no answer")
            answers |= done
        return answers


def install(port: Port, folder: Path) -> None:
    """Put a port's package into `folder` as pip would, so that vLLM finds its entry point there."""
    package = port.path.parent
    if package == port.folder:
        raise PortError(f"{port.path} is no vLLM plugin", "convert with --target vllm")
    shutil.copytree(package, folder / package.name, dirs_exist_ok=True)
    info = folder / f"{package.name}-0.1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 0.1.0\n", encoding="utf-8")
    entry = f"[vllm.general_plugins]\n{package.name} = {package.name}:register\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a vLLM that finds the plugins in `folder`."""
    return {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(folder)}


def _start(python: Path, folder: Path, jobs: Sequence[Job], timeout: float) -> str:
    """Run the worker; what it said last if it failed."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    command = [str(python), str(WORKER), str(file), str(folder / "results.jsonl")]
    try:
        result = subprocess.run(
            command, env=environment(folder), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {timeout:.0f} s"
    except OSError as error:
        raise PortError(f"{python} can't be run ({error.strerror})", "give vLLM's Python with --vllm-python") from error
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return "" if result.returncode == 0 else (lines or [f"exit code {result.returncode}"])[-1][:300]


def _read(file: Path) -> dict[str, Answer]:
    if not file.is_file():
        return {}
    return {r["name"]: _answer(r) for r in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def _answer(result: dict[str, Any]) -> Answer:
    if "error" in result:
        return Answer(error=result["error"], seconds=result["seconds"])
    prompts = result["prompts"]
    return Answer(
        tokens=tuple(tuple(p["tokens"]) for p in prompts),
        logprobs=tuple(
            tuple(None if q is None else {int(t): v for t, v in q.items()} for q in p["logprobs"]) for p in prompts
        ),
        seconds=result["seconds"],
    )
