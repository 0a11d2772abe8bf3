"""`python -m porter.verify.scoreboard` converts and verifies a list of sources and writes docs/scoreboard.*.

Slow: every source is verified on a tiny random checkpoint for each flag of its config that the port reads.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable
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
from porter.verify.request import Request
from porter.verify.result import Check, Verification
from porter.verify.run import verify

INSTALLED = ("opt", "llama", "gpt2", "gpt_neox", "bloom", "qwen2", "qwen3", "gemma2", "mistral", "mixtral")
OLD_VERSION = "4.36.2"
OLD = ("llama", "opt", "gpt_neox", "falcon")
_OLD_SOURCES = os.environ.get("PORTER_OLD_SOURCES", ".cache/old-sources")
_COMMAND = "python -m porter.verify.scoreboard"
_COLUMNS = {"modules": "module error", "logits": "KL", "greedy": "greedy", "tp 2": "tp 2", "int8": "int8"}
_PREFACE = f"""# Scoreboard

Made by `{_COMMAND}`; scoreboard.json has the same figures and more. Each source is converted with no hand edit and
compared in float32, on the CPU, with the installed transformers: on a tiny random checkpoint of its config class, and
on one more for each other value of a config field that the port reads (the cases). Figures are the worst over all
cases: relative error of a module, mean KL divergence of the next token in nats, greedy tokens through the engine that
are the original's, relative error of the logits of two ranks against one, and of int8 layers against their own
dequantised weights. `convert` is processor time.
"""


@dataclass(frozen=True)
class Row:
    """One source: what became of it, and the figures of each check (the worst over all cases)."""

    name: str
    transformers: str = ""
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
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="porter-score-") as folder:
        try:
            port = _convert(source, Path(folder))
        except PorterError as error:
            return Row(name, _release(name), reason=f"refused: {error}")
        seconds = round(time.process_time() - started, 1)
        row = Row(name, _release(name), str(port.manifest.get("source", {}).get("sha256", "")), True, seconds)
        try:
            return _scored(row, verify(Request(port=port.path, random=True)))
        except (PorterError, EngineError) as error:
            return replace(row, reason=f"not verified: {error}")


def _release(name: str) -> str:
    """The transformers that a source of the list is from."""
    return OLD_VERSION if name.endswith(f"({OLD_VERSION})") else version("transformers")


def markdown(rows: Iterable[Row]) -> str:
    """The text of docs/scoreboard.md."""
    rows = list(rows)
    head = ["model", "transformers", "sha256", "convert", "cases", *_COLUMNS.values(), "state"]
    lines = [" | ".join(cells) for cells in [head, ["---"] * len(head), *map(_cells, rows)]]
    versions = ", ".join(f"{name} {release}" for name, release in _versions().items())
    reasons = [f"- {row.name}: {row.reason}" for row in rows if row.reason]
    return "\n".join([_PREFACE, f"{versions}.", "", *(f"| {line} |" for line in lines), "", *reasons]).rstrip() + "\n"


def main(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Names in the committed list, or NAME=SOURCE; other rows stay. Default: the whole list."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where scoreboard.json and scoreboard.md go.")] = Path("docs"),
) -> None:
    """Convert and verify sources, and write the table after each."""
    listed = default_sources()
    given = {
        name: source or listed.get(name, name) for name, _, source in (each.partition("=") for each in sources or [])
    }
    rows = _kept(out) if given else {}
    for name, source in (given or listed).items():
        rows[name] = score(name, source)
        console.say(f"{name}: {'verified' if rows[name].verified else rows[name].reason}")
        _write(out, [rows[each] for each in sorted(rows, key=[*listed, *rows].index)])
    raise typer.Exit(0 if all(row.verified for row in rows.values()) else 1)


def _kept(out: Path) -> dict[str, Row]:
    """The rows that are there already, if the same versions made them."""
    file = out / "scoreboard.json"
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = table.get("rows", []) if table.get("versions") == _versions() else []
    return {row["name"]: Row(**row) for row in rows}


def _write(out: Path, rows: list[Row]) -> None:
    table = {"command": _COMMAND, "device": "cpu", "versions": _versions(), "rows": [asdict(row) for row in rows]}
    write_files(out, {"scoreboard.json": json.dumps(table, indent=2) + "\n", "scoreboard.md": markdown(rows)})


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"porter": __version__, **others, "python": platform.python_version()}


def _convert(source: str, folder: Path) -> Port:
    from porter.convert import convert
    from porter.source import load

    conversion = convert(load(source))
    return write_port(folder, conversion.code, conversion.manifest)


def _scored(row: Row, result: Verification) -> Row:
    figures = {check.name: _figure(check) for check in result.summary()}
    failure = result.failure
    reason = f"{failure[0].name}: {failure[1].name}: {failure[1].detail or failure[1].figure}" if failure else ""
    return replace(row, verified=result.passed, cases=len(result.tried), figures=figures, reason=reason)


def _figure(check: Check) -> str:
    figure = check.figure if check.name == "greedy" or "worst" not in check.data else f"{check.data['worst']:.1e}"
    return figure if check.status == "PASS" else f"{check.status} {figure}".strip()


def _cells(row: Row) -> list[str]:
    figures = row.figures or {}
    return [
        row.name.partition(" ")[0],
        row.transformers,
        row.source_sha256[:8],
        f"{row.convert_seconds} s" if row.converted else "refused",
        str(row.cases),
        *(figures.get(name, "-") for name in _COLUMNS),
        "verified" if row.verified else "not verified",
    ]


if __name__ == "__main__":
    typer.run(main)
