"""The vLLM scoreboard: what a row says, and which plugins may share a process."""

import json
from pathlib import Path

from porter.manifest import Port
from porter.verify.subject import Subject
from porter.vllm.engine import Answer
from porter.vllm.scoreboard import Row, _groups, _row, markdown
from porter.vllm.verify import Trial

DOCS = Path(__file__).parents[2] / "docs"


def port(package: str, architecture: str) -> Port:
    return Port(Path(package), {"architecture": architecture, "module": f"{package}/x.py", "module_sha256": ""})


def trial(tmp_path: Path) -> Trial:
    class Config:
        vocab_size = 131

        def get_text_config(self) -> "Config":
            return self

    return Trial("default", Subject(tmp_path, tmp_path, object, Config(), "float32", [[3, 4]]), {})  # type: ignore[arg-type]


def test_plugins_of_one_architecture_or_package_never_share_a_process(tmp_path: Path) -> None:
    made = trial(tmp_path)
    ports = {"a": port("oak", "Oak"), "b": port("elm", "Elm"), "c": port("oak", "OldOak"), "d": port("fir", "Elm")}
    groups = _groups({name: (each, made) for name, each in ports.items()})
    assert groups == [["a", "b"], ["c", "d"]]


def test_a_row_says_what_vllm_said(tmp_path: Path) -> None:
    failed = Answer(error="ValueError: no such layer")
    row = _row("oak", port("oak", "Oak"), trial(tmp_path), {"oak default": failed}, {"oak default": failed})
    assert not row.verified
    assert "no such layer" in row.reason
    assert "no such layer" in row.alone


def test_the_table_counts_what_runs_only_with_the_plugin() -> None:
    rows = [Row("oak", "Oak", True, "KL 0", "64 of 64", alone="fails"), Row("elm", "Elm", True, alone="right")]
    text = markdown([*rows, Row("fir", reason="refused: a mask")], {"vllm": "0.32.0"})
    assert "2 of 3 sources run right" in text
    assert "not without it: oak." in text
    assert "- fir: refused: a mask" in text


def test_the_committed_table_is_that_of_its_figures() -> None:
    data = json.loads((DOCS / "scoreboard_vllm.json").read_text(encoding="utf-8"))
    rows = [Row(**row) for row in data["rows"]]
    assert markdown(rows, data["versions"]) == (DOCS / "scoreboard_vllm.md").read_text(encoding="utf-8")
    assert all(row.verified or row.reason for row in rows)
