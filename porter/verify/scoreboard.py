"""What became of each source of a sweep: one row each, as JSON and as the tables of docs/scoreboard.md."""

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from porter import __version__
from porter.atomic import write_files
from porter.verify.result import Check, Verification

COMMAND = "porter sweep"
Result = Literal["verified", "refused", "wrong", "unproved", "crashed"]
RESULTS: tuple[Result, ...] = ("verified", "refused", "wrong", "unproved", "crashed")
COLUMNS = {"modules": "module error", "logits": "KL", "greedy": "greedy", "tp": "tp", "int8": "int8"}
_PREFACE = """# Scoreboard

Made by `porter sweep`; scoreboard.json has the same figures and more. Each source is converted with no hand edit and
compared in float32, on the CPU, with the installed transformers: on a tiny random checkpoint of its config class, and
on one more for each other value of a config field that the port reads (the cases). Figures are the worst over all
cases: relative error of a module, mean KL divergence of the next token in nats, greedy tokens through the engine that
are the original's, relative error of the logits of two or more ranks against one, and of int8 layers against their own
dequantised weights. *kept* is the share of the port's lines that are lines of the source, *length* the port's lines
over the source's, *seconds* the processor time of the conversion. Reproduce a row with the command below its table.

A source is **verified** (every check passed), **refused** (no port was made, with the code that `porter explain`
knows), **wrong** (a port was made and a check failed), **unproved** (a port was made and the original can't be run
with the installed transformers, or the machine did not let a check be made), or **crashed** (a mistake of porter).
"""


@dataclass(frozen=True)
class Row:
    """One source: what became of it, what the port is like, and the figures of each check (worst over all cases)."""

    name: str
    source: str
    result: Result
    source_sha256: str = ""
    architecture: str = ""
    code: str = ""
    reason: str = ""
    edits: int = 0
    kept: float = 0.0
    length: float = 0.0
    convert_seconds: float = 0.0
    seconds: float = 0.0
    cases: int = 0
    tp: tuple[int, ...] = ()
    figures: dict[str, str] | None = None

    @property
    def group(self) -> str:
        """The table that the row is in: the folder of a path's name, or the library."""
        return self.name.rpartition("/")[0]


def compared(row: Row, source: str, port: str) -> Row:
    """The row with how the port's text compares with the source's; blank lines don't count."""
    before, after = ([line.strip() for line in text.splitlines() if line.strip()] for text in (source, port))
    same = sum((Counter(before) & Counter(after)).values())
    return replace(row, kept=round(same / max(len(after), 1), 2), length=round(len(after) / max(len(before), 1), 2))


def proved(row: Row, found: Verification) -> Row:
    """The row with what verification found."""
    figures = {check.name: _figure(check) for check in found.summary()}
    sizes = tuple(sorted({int(name.split()[1]) for name in figures if name.split()[0] == "tp"}))
    failure = found.failure
    reason = f"{failure[0].name}: {failure[1].name}: {failure[1].detail or failure[1].figure}" if failure else ""
    skipped = next((case.skipped for case in found.cases if case.skipped), "no case could be compared")
    unproved = found.unproved[1].detail if found.unproved else skipped
    result: Result = "verified" if found.passed else "wrong" if failure else "unproved"
    reason = reason or ("" if found.passed else unproved)
    return replace(row, result=result, reason=reason, cases=len(found.tried), tp=sizes, figures=figures)


def read(out: Path) -> dict[str, Row]:
    """The rows in `out`/scoreboard.json by name, none if other versions made them."""
    file = out / "scoreboard.json"
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same = (table.get("command"), table.get("versions")) == (COMMAND, versions())
    rows = table.get("rows", []) if same else []
    return {row["name"]: Row(**{**row, "tp": tuple(row["tp"])}) for row in rows}


def write(out: Path, rows: Sequence[Row]) -> None:
    """scoreboard.json and scoreboard.md in `out`."""
    text = json.dumps(as_json(rows), indent=1)
    write_files(out, {"scoreboard.json": text + "\n", "scoreboard.md": markdown(rows)})


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """What scoreboard.json holds."""
    made = {"command": COMMAND, "device": "cpu", "versions": versions(), "counts": counts(rows)}
    return {**made, "rows": [asdict(row) for row in rows]}


def counts(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Group -> result -> how many."""
    rows = list(rows)
    groups = dict.fromkeys(row.group for row in rows)
    return {
        group or "transformers": {r: n for r in RESULTS if (n := _count(rows, group, r))} for group in sorted(groups)
    }


def markdown(rows: Iterable[Row]) -> str:
    """The text of docs/scoreboard.md."""
    rows = list(rows)
    parts = [_PREFACE, f"{', '.join(f'{name} {release}' for name, release in versions().items())}.", ""]
    parts += [_summary(rows), ""]
    for group in sorted(dict.fromkeys(row.group for row in rows)):
        parts += _section(group, [row for row in rows if row.group == group])
    return "\n".join(parts).rstrip() + "\n"


def versions() -> dict[str, str]:
    """What made the figures."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"porter": __version__, **others, "python": platform.python_version()}


def _count(rows: Iterable[Row], group: str, result: Result) -> int:
    return sum(row.group == group and row.result == result for row in rows)


def _summary(rows: Sequence[Row]) -> str:
    lines = [["source", "all", *RESULTS]]
    for group, each in counts(rows).items():
        lines.append([group, str(sum(each.values())), *(str(each.get(r, 0)) for r in RESULTS)])
    return _table(lines)


def _section(group: str, rows: Sequence[Row]) -> list[str]:
    title = f"## {group}" if group else f"## transformers {version('transformers')}"
    ported = [row for row in rows if row.result not in ("refused", "crashed")]
    others = [f"- {row.name}: {row.result}: {row.reason}" for row in rows if row.result != "verified"]
    head = ["source", "cases", *COLUMNS.values(), "edits", "kept", "length", "seconds", "result"]
    table = [_table([head, *map(_cells, ported)]), ""] if ported else []
    command = f"porter sweep {rows[0].source}" if rows else ""
    return [title, "", *table, f"`{command}` makes the first row.", "", *others, ""]


def _table(lines: Sequence[Sequence[str]]) -> str:
    marked = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in marked)


def _cells(row: Row) -> list[str]:
    figures = row.figures or {}
    sizes = " ".join(map(str, row.tp))
    worst = [figures[f"tp {size}"] for size in row.tp if f"tp {size}" in figures]
    shown = {**figures, "tp": f"{sizes}: {max(worst)}" if worst else "-"}
    measured = [shown.get(name, "-") for name in COLUMNS]
    look = [str(row.edits), f"{row.kept:.0%}", f"{row.length:.2f}", f"{row.convert_seconds:.1f}"]
    return [row.name.rpartition("/")[2], str(row.cases), *measured, *look, row.result]


def _figure(check: Check) -> str:
    figure = check.figure if check.name == "greedy" or "worst" not in check.data else f"{check.data['worst']:.1e}"
    return figure if check.status == "PASS" else f"{check.status} {figure}".strip()
