"""`python -m porter.verify.scoreboard` converts and verifies a list of sources and writes docs/scoreboard.*.

Slow: every source is verified on a tiny random checkpoint for each flag of its config that the port reads.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from porter import __version__, console
from porter.atomic import write_files
from porter.errors import PorterError
from porter.manifest import Port, write_port
from porter.verify.request import Request
from porter.verify.result import Check, Verification
from porter.verify.run import verify

INSTALLED = ("opt", "llama", "gpt2", "gpt_neox", "bloom", "qwen2", "qwen3", "gemma2", "mistral", "mixtral")
OLD_VERSION = "4.36.2"
OLD = ("llama", "opt", "gpt_neox", "falcon")
_OLD_SOURCES = os.environ.get("PORTER_OLD_SOURCES", ".cache/old-sources")
_COLUMNS = {"modules": "module error", "logits": "logits", "greedy": "greedy", "tp 2": "tp 2", "int8": "int8"}
_PREFACE = """# Scoreboard

Made by `python -m porter.verify.scoreboard`; the same figures are in scoreboard.json. Each source is converted with no
hand edit and compared in float32 with the installed transformers on tiny random checkpoints, one case for each config
flag that the port reads. Figures are the worst over all cases.
"""


@dataclass(frozen=True)
class Row:
    """One source: what became of it, and the figures of each check (the worst over all cases)."""

    name: str
    source_sha256: str = ""
    converted: bool = False
    convert_seconds: float = 0.0
    verified: bool = False
    cases: int = 0
    figures: dict[str, str] | None = None
    reason: str = ""


def default_sources() -> dict[str, str]:
    """Name in the table -> what `porter convert` is given."""
    old = {f"{name} ({OLD_VERSION})": f"{_OLD_SOURCES}/{OLD_VERSION}/{name}/modeling_{name}.py" for name in OLD}
    return {**{name: name for name in INSTALLED}, **old}


def score(name: str, source: str) -> Row:
    """Convert and verify one source; a refusal or a failure becomes the row's reason."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="porter-score-") as folder:
        try:
            port = _convert(source, Path(folder))
        except PorterError as error:
            return Row(name, reason=f"refused: {error}")
        seconds = round(time.monotonic() - started, 1)
        row = Row(name, str(port.manifest.get("source", {}).get("sha256", "")), True, seconds)
        try:
            return _scored(row, verify(Request(port=port.path, random=True)))
        except PorterError as error:
            return Row(**{**asdict(row), "reason": f"not verified: {error}"})


def markdown(rows: Iterable[Row]) -> str:
    """The text of docs/scoreboard.md."""
    head = ["source", "sha256", "converted", *_COLUMNS.values(), "cases", "verified"]
    lines = [" | ".join(cells) for cells in [head, ["---"] * len(head), *map(_cells, rows)]]
    versions = f"porter {__version__}, torch {version('torch')}, transformers {version('transformers')}"
    return "\n".join([_PREFACE, versions, "", *(f"| {line} |" for line in lines), ""])


def main(
    sources: Annotated[
        list[str] | None, typer.Argument(help="NAME=SOURCE or SOURCE; default: the committed list.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where scoreboard.json and scoreboard.md go.")] = Path("docs"),
) -> None:
    """Convert and verify sources, and write the table."""
    given = {each.partition("=")[0]: each.rpartition("=")[2] for each in sources or []}
    named = given or default_sources()
    rows = []
    for name, source in named.items():
        rows.append(score(name, source))
        console.say(f"{name}: {'verified' if rows[-1].verified else rows[-1].reason}")
    versions = {"porter": __version__, "torch": version("torch"), "transformers": version("transformers")}
    table = {"versions": versions, "rows": [asdict(row) for row in rows]}
    write_files(out, {"scoreboard.json": json.dumps(table, indent=2) + "\n", "scoreboard.md": markdown(rows)})
    raise typer.Exit(0 if all(row.verified for row in rows) else 1)


def _convert(source: str, folder: Path) -> Port:
    from porter.convert import convert
    from porter.source import load

    conversion = convert(load(source))
    return write_port(folder, conversion.code, conversion.manifest)


def _scored(row: Row, result: Verification) -> Row:
    figures = {check.name: _figure(check) for check in result.summary()}
    failure = result.failure
    reason = f"{failure[0].name}: {failure[1].name}: {failure[1].detail or failure[1].figure}" if failure else ""
    found = {"verified": result.passed, "cases": len(result.tried), "figures": figures, "reason": reason}
    return Row(**{**asdict(row), **found})


def _figure(check: Check) -> str:
    return check.figure if check.status == "PASS" else f"{check.status} {check.figure}".strip()


def _cells(row: Row) -> list[str]:
    figures = row.figures or {}
    converted = f"{row.convert_seconds} s" if row.converted else "no"
    verified = "yes" if row.verified else row.reason.replace("|", "/")
    return [
        row.name,
        row.source_sha256[:8],
        converted,
        *(figures.get(name, "-") for name in _COLUMNS),
        str(row.cases),
        verified,
    ]


if __name__ == "__main__":
    typer.run(main)
