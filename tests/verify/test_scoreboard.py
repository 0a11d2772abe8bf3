"""The scoreboard: a row for each source, refusals included, in JSON and in a table."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from porter.errors import Refusal
from porter.manifest import Port
from porter.verify import scoreboard
from porter.verify.request import Request
from porter.verify.result import Case, Check, Verification

CHECKS = (Check("modules", "PASS", "1e-06 over 9", "0.0001"), Check("tp 2", "FAIL", "0.3", "0.0001", "look at: shards"))


def verification(*checks: Check) -> Verification:
    return Verification("A", "p", "s", True, "tiny random", "float32", (Case("default", {}, checks),), (), {}, 1.0)


@pytest.fixture
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: str, folder: Path) -> Port:
        if source == "bad":
            raise Refusal("bad.py", 3, "x", "why", "do this")
        return Port(folder, {"module": f"{source}.py", "source": {"sha256": "abcdef1234"}})

    def verify(request: Request) -> Verification:
        assert request.port is not None
        return verification(*CHECKS[: 1 if request.port.stem == "good" else 2])

    monkeypatch.setattr(scoreboard, "_convert", convert)
    monkeypatch.setattr(scoreboard, "verify", verify)


@pytest.mark.usefixtures("_fakes")
def test_rows_say_what_became_of_each_source(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(scoreboard.main)
    result = CliRunner().invoke(app, ["good", "old=half", "bad", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scoreboard.json").read_text())["rows"]
    assert result.exit_code == 1
    assert [(row["name"], row["converted"], row["verified"]) for row in rows] == [
        ("good", True, True),
        ("old", True, False),
        ("bad", False, False),
    ]
    assert rows[1]["reason"] == "default: tp 2: look at: shards"
    assert rows[2]["reason"] == "refused: bad.py:3: x: why; do this"
    table = [line for line in (tmp_path / "scoreboard.md").read_text().splitlines() if line.startswith("|")]
    assert (len(table), {line.count("|") for line in table}) == (5, {table[0].count("|")})
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert (cells[0], cells[2], cells[4], cells[-1]) == ("good", "abcdef12", "1", "verified")


@pytest.mark.usefixtures("_fakes")
def test_rows_that_were_not_asked_for_stay(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(scoreboard.main)
    for names in (["good", "old=half"], ["old=good"]):
        result = CliRunner().invoke(app, [*names, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "scoreboard.json").read_text())["rows"]
    assert [(row["name"], row["verified"]) for row in rows] == [("good", True), ("old", True)]
    assert result.exit_code == 0


def test_the_default_list_holds_the_fourteen() -> None:
    assert len(scoreboard.default_sources()) == 14
