"""The scoreboard: a row for each source, refusals included, in JSON and in a table."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porter.cli import app
from porter.errors import OriginalError, PortError
from porter.verify import scoreboard, sweep
from porter.verify.request import Request
from porter.verify.result import Case, Check, Verification

MODELS = Path(__file__).parent.parent / "models"
CHECKS = (Check("modules", "PASS", "1e-06 over 9", "0.0001"), Check("tp 2", "FAIL", "0.3", "0.0001", "look at: shards"))


def verification(*checks: Check, skipped: str = "") -> Verification:
    case = Case("default", {}, checks, skipped)
    return Verification("A", "p", "s", True, "tiny random", "float32", (case,), (), {}, 1.0)


def row(name: str, result: scoreboard.Result = "verified") -> scoreboard.Row:
    return scoreboard.Row(name, name, result, figures={"modules": "1e-07"} if result == "verified" else None)


def test_a_verified_row_needs_every_check() -> None:
    good = scoreboard.proved(row("a", "crashed"), verification(CHECKS[0]))
    assert (good.result, good.reason, good.cases, good.tp) == ("verified", "", 1, ())
    bad = scoreboard.proved(row("a", "crashed"), verification(*CHECKS))
    assert (bad.result, bad.reason, bad.tp) == ("wrong", "default: tp 2: look at: shards", (2,))


def test_nothing_to_compare_with_proves_nothing() -> None:
    found = scoreboard.proved(row("a", "crashed"), verification(skipped="can't run"))
    assert (found.result, found.reason) == ("unproved", "can't run")


def test_kept_and_length_count_lines_with_something_on_them() -> None:
    found = scoreboard.compared(row("a"), "x = 1\n\ny = 2\nz = 3\nz = 3\n", "x = 1\n    z = 3\nnew\n")
    assert (found.kept, found.length) == (0.67, 0.75)


def test_rows_survive_the_file_and_other_versions_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("4.36.2/opt", "refused"), row("llama")]
    scoreboard.write(tmp_path, rows)
    assert list(scoreboard.read(tmp_path).values()) == rows
    monkeypatch.setattr(scoreboard, "versions", lambda: {"porter": "another"})
    assert scoreboard.read(tmp_path) == {}


def test_the_tables_count_by_group_and_line_up() -> None:
    text = scoreboard.markdown([row("llama"), row("bamba", "refused"), row("4.36.2/opt"), row("4.36.2/phi", "wrong")])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| transformers | 2 | 1 | 1 | 0 | 0 | 0 |" in lines
    assert "| 4.36.2 | 2 | 1 | 0 | 1 | 0 | 0 |" in lines
    tables = [line.count("|") for line in lines]
    assert tables == [8] * 4 + [13] * 3 + [13] * 4
    assert "- bamba: refused: " in text


def test_a_folder_stands_for_the_files_below_it(tmp_path: Path) -> None:
    file = tmp_path / "4.36.2" / "opt" / "modeling_opt.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert sweep.sources([str(tmp_path)]) == {"4.36.2/opt": str(file)}
    assert sweep.sources(["mine=modeling_x.py", "llama"]) == {"mine": "modeling_x.py", "llama": "llama"}
    assert len(sweep.sources([])) > 100


def test_each_source_ends_in_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(request: Request) -> Verification:
        raise errors.pop()

    errors: list[Exception] = [KeyError("oops"), PortError("it can't be built"), OriginalError("can't run")]
    monkeypatch.setattr("porter.verify.run.verify", verify)
    acorn = str(MODELS / "acorn" / "modeling_acorn.py")
    found = [sweep.score("acorn", acorn) for _ in range(3)]
    assert [each.result for each in found] == ["unproved", "wrong", "crashed"]
    assert (found[0].architecture, found[0].edits > 20, 0 < found[0].kept < 1) == ("AcornForCausalLM", True, True)
    assert found[2].reason == "KeyError: 'oops'"


def test_the_command_keeps_rows_resumes_and_exits_1_for_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake(listed: dict[str, str], jobs: int) -> list[scoreboard.Row]:
        asked.extend(listed)
        return [row(name, "wrong" if name == "bad" else "verified") for name in listed]

    monkeypatch.setattr(sweep, "sweep", fake)
    codes = [
        CliRunner().invoke(app, ["sweep", *args, "-o", str(tmp_path)]).exit_code
        for args in (["a"], ["a", "b", "--resume"], ["bad"])
    ]
    assert (codes, asked) == ([0, 0, 1], ["a", "b", "bad"])
    rows = json.loads((tmp_path / "scoreboard.json").read_text())["rows"]
    assert [each["name"] for each in rows] == ["a", "b", "bad"]


def test_processes_side_by_side_report_refusals() -> None:
    bad = str(MODELS / "fir" / "modeling_fir.py")
    rows = list(sweep.sweep({"one": bad, "two": "no_such_model"}, jobs=2))
    assert {each.name: each.result for each in rows} == {"one": "refused", "two": "refused"}
