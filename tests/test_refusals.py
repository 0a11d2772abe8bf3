"""Refusals carry a code that `porter explain` knows."""

import pickle
import re
from pathlib import Path

from typer.testing import CliRunner

from porter.cli import app
from porter.errors import Refusal
from porter.refusals import KINDS

PACKAGE = Path(__file__).parent.parent / "porter"


def test_each_code_that_is_raised_is_explained_and_each_explained_is_raised() -> None:
    text = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "refusals.py")
    assert set(re.findall(r'"(P\d{3})"', text)) == set(KINDS)
    assert list(KINDS) == sorted(KINDS)


def test_the_line_shows_the_code_and_the_code_survives_pickling() -> None:
    refusal = pickle.loads(pickle.dumps(Refusal("modeling_x.py", 7, "x @ y", "it mixes tokens", "don't", "P300")))
    assert str(refusal) == "modeling_x.py:7: P300 x @ y: it mixes tokens; don't"
    assert refusal.code == "P300"


def test_explain_shows_a_code() -> None:
    shown = CliRunner().invoke(app, ["explain", "p300"])
    assert shown.exit_code == 0
    assert shown.stdout.startswith("P300: an operation that mixes tokens")
    assert CliRunner().invoke(app, ["explain", "P999"]).exit_code == 2
