"""Runs a workload on several engines in alternation and says how they compare."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from porter import __version__
from porter.bench.workload import Workload
from porter.errors import CheckFailed, UsageError

SIDES = ("hf", "vllm")


@dataclass(frozen=True)
class Setup:
    """How every engine is started. `engine` goes to the engines' own constructors."""

    model: str
    port: str | None
    dtype: str
    device: str
    load_format: str
    engine: dict[str, Any]
    vllm_python: str | None = None

    def options(self) -> str:
        names = ("model", "port", "dtype", "device", "load_format", "engine")
        return json.dumps({name: getattr(self, name) for name in names})


class Side:
    """An engine in its own process."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        python = setup.vllm_python if name == "vllm" and setup.vllm_python else sys.executable
        script = Path(__file__).with_name("side.py")
        try:
            self.process = subprocess.Popen(
                [python, str(script), name, setup.options()],
                # or this folder's modules would hide the standard library's of the same name
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise UsageError(f"{python} does not start: {error.strerror}", "give --vllm-python another one") from None
        self.start = self._answer()

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds and facts of one run."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says how it ended
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise CheckFailed(f"{self.name} ended with exit code {code}", "its own output above says why")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise UsageError(f"{self.name} does not start: {answer['failed']}", "see its options and its installation")
        return answer


@contextmanager
def started(names: Sequence[str], setup: Setup) -> Iterator[list[Side]]:
    """The sides, one after the other; all stopped in the end."""
    with ExitStack() as stack:
        sides = []
        for name in names:
            sides.append(Side(name, setup))
            stack.callback(sides[-1].stop)
        yield sides


Measure = Callable[[Side], tuple[dict[str, float], dict[str, Any]]]


def throughput(workload: Workload) -> Measure:
    """Output tokens and all tokens a second; tokens are those asked for, whatever an engine computes besides."""
    lengths = workload.lengths()
    num_in, num_out = (sum(column) for column in zip(*lengths, strict=True))

    def measure(side: Side) -> tuple[dict[str, float], dict[str, Any]]:
        facts = side.run(workload.order())
        seconds = facts.pop("seconds")
        figures = {"output_tokens_per_s": num_out / seconds, "tokens_per_s": (num_in + num_out) / seconds}
        return figures | {"prompt_tokens_per_s": num_in / seconds, "seconds": seconds}, facts

    return measure


def latency(workload: Workload) -> Measure:
    """ms to the first tokens of a batch, and ms a token after that."""
    longest = workload.output_len[1]

    def measure(side: Side) -> tuple[dict[str, float], dict[str, Any]]:
        first = side.run(workload.order(outputs=[1] * workload.num_prompts))["seconds"]
        facts = side.run(workload.order(outputs=[longest] * workload.num_prompts))
        per_token = (facts.pop("seconds") - first) / (longest - 1)
        return {"first_token_ms": first * 1e3, "ms_per_token": per_token * 1e3}, facts

    return measure


def compare(
    sides: Sequence[Side], measure: Measure, repeats: int, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each side: medians, spreads and values of its figures over `repeats` runs in alternation, after one run
    that is not counted; for others than the first, the first one's medians over theirs."""
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    facts: dict[str, Any] = {}
    for repeat in range(-1, repeats):
        for side in sides:
            advance(f"{side.name}, {'warming up' if repeat < 0 else f'run {repeat + 1} of {repeats}'}")
            figures, facts[side.name] = measure(side)
            if repeat >= 0:
                runs[side.name].append(figures)
    rows = [{**facts[side.name], **side.start, "figures": _summary(runs[side.name])} for side in sides]
    for row in rows[1:]:
        row["ratio_of_first"] = {
            name: rows[0]["figures"][name]["median"] / figure["median"] for name, figure in row["figures"].items()
        }
    return rows


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        median = statistics.median(values)
        summary[name] = {"median": median, "spread": (max(values) - min(values)) / median, "values": values}
    return summary


def report(kind: str, setup: Setup, workload: Workload, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written to a file: enough to run it again."""
    return {
        "benchmark": kind,
        "command": " ".join(["porter", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "porter": __version__,
        "model": Path(setup.model).name,
        "dtype": setup.dtype,
        "load_format": setup.load_format,
        "engine": setup.engine,
        "workload": workload.to_json(),
        "sides": rows,
    }
