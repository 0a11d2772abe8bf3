"""`python -m porter.vllm.scoreboard` proves many ports in vLLM on tiny checkpoints, for docs/scoreboard_vllm.*.

Slow: an engine is started for each checkpoint and each tp_size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from porter import __version__, console
from porter.atomic import write_files
from porter.errors import PorterError
from porter.manifest import Port, write_port
from porter.runtime.errors import EngineError
from porter.vllm import environment
from porter.vllm.engine import Answer, Job, run_jobs
from porter.vllm.verify import Trial, judge, random_trial
from porter.vllm.versions import read_release

BATCH = 8  # checkpoints a vLLM process
_COMMAND = "python -m porter.vllm.scoreboard"
_PREFACE = f"""# Scoreboard of the vLLM target

Made by `{_COMMAND} SOURCE ...`; scoreboard_vllm.json has the same figures. Each source is converted with no hand edit
and run as a plugin by an installed vLLM on the CPU, in float32, eagerly, on a tiny random checkpoint of its config
class: mean KL divergence of the next token at every prompt position against transformers (eager attention, no cache),
and how many of 64 greedy tokens are the original's best, with one rank and, where asked for, with two. `vLLM alone` is
what the same vLLM makes of the same checkpoint without the plugin, where that was tried: "right" means the same two
measures. Rows with the note "a" are from a run of an earlier commit, which measured the largest difference of any
log-probability of the prompts (all of the vocabulary), and 32 greedy tokens that are all the original's own.
"""


@dataclass(frozen=True)
class Row:
    """One source: what became of it in vLLM."""

    name: str
    architecture: str = ""
    verified: bool = False
    kl: str = ""
    greedy: str = ""
    tp2: str = ""
    alone: str = ""
    reason: str = ""
    note: str = ""


def main(
    sources: Annotated[list[str], typer.Argument(help="Model types, or NAME=SOURCE.")],
    vllm_python: Annotated[Path | None, typer.Option(help="A Python that has vLLM.")] = None,
    tp: Annotated[bool, typer.Option(help="Also run with two ranks.")] = False,
    alone: Annotated[bool, typer.Option(help="Also try vLLM without the plugin.")] = False,
    out: Annotated[Path, typer.Option(help="Where the table goes; other rows there stay.")] = Path("docs"),
) -> None:
    """Convert and run sources, and write the table after each batch."""
    python = environment.find(vllm_python)
    given = {name: source or name for name, _, source in (each.partition("=") for each in sources)}
    names = list(given)
    for start in range(0, len(names), BATCH):
        batch = {name: given[name] for name in names[start : start + BATCH]}
        for row in score(batch, python, tp, alone):
            console.say(f"{row.name}: {'right' if row.verified else row.reason}")
            _write(out, python, row)


def score(sources: Mapping[str, str], python: Path, tp: bool, alone: bool) -> list[Row]:
    """A row for each source. Sources of one architecture run in processes of their own: one plugin at a time has it."""
    with tempfile.TemporaryDirectory(prefix="porter-score-") as name:
        tried = [_prepared(each, source, Path(name) / str(i), tp) for i, (each, source) in enumerate(sources.items())]
        rows = {each: row for each, row in tried if isinstance(row, Row)}
        ready = {each: made for each, made in tried if not isinstance(made, Row)}
        answers: dict[str, Answer] = {}
        for group in _groups(ready):
            jobs = [job for each in group for job in _jobs(each, *ready[each])]
            answers |= run_jobs(python, [ready[each][0] for each in group], jobs)
        single = [ready[each][1].jobs(f"{each} ")[0] for each in ready] if alone else []
        by_itself = run_jobs(python, [], single) if single else {}
        rows |= {each: _row(each, *ready[each], answers, by_itself) for each in ready}
        return [rows[each] for each in sources]


def _jobs(name: str, port: Port, trial: Trial) -> list[Job]:
    """With one rank the class is registered imported, which saves a process each; with two, by name as users do."""
    one, *others = trial.jobs(f"{name} ")
    place = f"{port.path.parent.name}.{port.path.stem}:{port.architecture}"
    return [replace(one, classes={port.architecture: place}), *others]


def _prepared(name: str, source: str, folder: Path, tp: bool) -> tuple[str, Row | tuple[Port, Trial]]:
    from porter.convert import convert
    from porter.source import load
    from porter.verify.variants import Variant

    try:
        made = convert(load(source), "vllm")
        port = write_port(folder / "port", made.code, made.manifest, others=made.others)
        return name, (port, random_trial(port, folder / "model", Variant("default"), tp=(2,) if tp else ()))
    except (PorterError, EngineError) as error:
        return name, Row(name, reason=str(error))
    except Exception as error:  # a bug of porter is a row too, or hours of work would be lost
        return name, Row(name, reason=f"porter raised {type(error).__name__}: {error}")


def _groups(ready: Mapping[str, tuple[Port, Trial]]) -> list[list[str]]:
    """Names whose plugins can be installed together: no architecture or package twice."""
    groups: list[dict[str, str]] = []
    for name, (port, _) in ready.items():
        place = next((g for g in groups if not {port.architecture, port.path.parent.name} & set(g.values())), None)
        if place is None:
            groups.append(place := {})
        place[name] = port.architecture
        place[f"{name} package"] = port.path.parent.name
    return [[name for name in group if name in ready] for group in groups]


def _row(name: str, port: Port, trial: Trial, answers: Mapping[str, Answer], by_itself: Mapping[str, Answer]) -> Row:
    case = judge(trial, answers, f"{name} ")
    figures = {check.name: check.figure if check.status == "PASS" else "FAIL" for check in case.checks}
    failure = case.failure
    row = Row(
        name,
        port.architecture,
        failure is None,
        figures.get("prompt logprobs", ""),
        figures.get("greedy", ""),
        figures.get("tp 2 greedy", figures.get("tp 2 prompt logprobs", "")),
        reason=f"{failure.name}: {failure.figure} {failure.detail}" if failure else "",
    )
    lone = replace(trial, tp=())
    if lone.jobs(f"{name} ")[0].name not in by_itself:
        return row
    failed = judge(lone, by_itself, f"{name} ").failure
    return replace(row, alone="right" if failed is None else f"{failed.figure} {failed.detail}".strip()[:160])


def markdown(rows: Iterable[Row], versions: Mapping[str, str]) -> str:
    """The text of docs/scoreboard_vllm.md."""
    rows = list(rows)
    head = ["source", "architecture", "state", "log-probabilities", "greedy", "tp 2 greedy", "vLLM alone", "note"]
    state = {True: "right", False: "-"}
    cells = [
        [r.name, r.architecture, state[r.verified], r.kl, r.greedy, r.tp2, r.alone.partition(";")[0], r.note]
        for r in rows
    ]
    table = [" | ".join(each).replace("\n", " ") for each in [head, ["---"] * len(head), *cells]]
    right, both = [r for r in rows if r.verified], [r for r in rows if r.verified and r.tp2]
    revived = [r.name for r in right if r.alone and r.alone != "right"]
    summary = [
        f"{', '.join(f'{name} {release}' for name, release in versions.items())}.",
        f"{len(right)} of {len(rows)} sources run right, {len(both)} of them with two ranks.",
        f"Right with the plugin and not without it: {', '.join(revived) or 'none tried'}.",
    ]
    reasons = [f"- {row.name}: {row.reason}" for row in rows if row.reason]
    return (
        "\n\n".join([_PREFACE.strip(), *summary, "\n".join(f"| {each} |" for each in table), "\n".join(reasons)]) + "\n"
    )


def _write(out: Path, python: Path, row: Row) -> None:
    """The table with one row more, or another in its place."""
    file = out / "scoreboard_vllm.json"
    known = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    rows = {each["name"]: Row(**each) for each in known} | {row.name: row}
    ordered = [rows[name] for name in sorted(rows)]
    versions = _versions(python)
    data = {
        "command": f"{_COMMAND} SOURCE ...",
        "device": "cpu",
        "versions": versions,
        "rows": list(map(asdict, ordered)),
    }
    texts = {
        "scoreboard_vllm.json": json.dumps(data, indent=1) + "\n",
        "scoreboard_vllm.md": markdown(ordered, versions),
    }
    write_files(out, texts)


def _versions(python: Path) -> dict[str, str]:
    ours: Sequence[str] = ("torch", "transformers")
    return {"porter": __version__, "vllm": read_release(str(python.parent.parent), [])[0]} | {
        n: version(n) for n in ours
    }


if __name__ == "__main__":
    typer.run(main)
