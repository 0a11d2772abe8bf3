"""Seeded faults: one edit at one place of a port, everything else kept; and what the figures are made of."""

import ast
from pathlib import Path

import pytest

from porter.verify.faults import suite, table
from porter.verify.faults.fault import ATTENTION, Fault, edited
from porter.verify.faults.mutate import keyword, one_of, positional, result
from porter.verify.faults.suite import FAULTS, RightPort, Trial

GOLDEN = Path(__file__).parents[1] / "golden"
ACORN = (GOLDEN / "acorn.py").read_text()


def only_change(before: str, after: str) -> tuple[str, str]:
    """The lines that an edit took away and put in, black's line breaks left aside."""
    old, new = (ast.unparse(ast.parse(text)).splitlines() for text in (before, after))
    return ("\n".join(x for x in old if x not in new), "\n".join(x for x in new if x not in old))


def test_an_argument_is_changed_where_a_layer_is_built() -> None:
    (site,) = edited(positional(ATTENTION, 2, "2 * ({})"))(ACORN)
    assert (site.owner, site.attribute, site.built) == ("AcornAttention", "attn", True)
    before, after = only_change(ACORN, site.text)
    assert after == before.replace("self.scaling,", "2 * self.scaling,")


def test_an_argument_is_dropped_or_added() -> None:
    (dropped,) = edited(keyword(ATTENTION, "sliding_window", None))(ACORN)
    assert "sliding_window=self.sliding_window" not in dropped.text
    (added,) = edited(keyword(ATTENTION, "interleaved", "not {}", absent="True"))(ACORN)
    assert "interleaved=True" in added.text


def test_what_a_layer_gives_is_changed_where_it_is_called() -> None:
    sites = list(edited(result(one_of("RMSNorm"), "{arg}"))(ACORN))
    assert [site.owner for site in sites] == ["AcornDecoderLayer", "AcornDecoderLayer", "AcornModel"]
    assert not any(site.built for site in sites)
    assert only_change(ACORN, sites[2].text)[0].strip() == "hidden_states = self.norm(hidden_states)"


def test_there_are_enough_faults_of_enough_families() -> None:
    assert len(FAULTS) >= 60
    assert len({fault.family for fault in FAULTS}) >= 20
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_faulty_port_is_python_and_differs(fault: Fault) -> None:
    for file in sorted(GOLDEN.glob("*.py")):
        text = file.read_text()
        for site in fault.mutate(text):
            compile(site.text, file.name, "exec")
            assert ast.dump(ast.parse(site.text)) != ast.dump(ast.parse(text))


def test_rates_leave_out_what_names_no_module() -> None:
    caught = Trial("a", "f", "m", "x", "default", "modules", "x", True, True)
    by_ledger = Trial("b", "f", "m", "x", "default", "ledger", "", None, True)
    lost, missed = Trial("c", "g", "m", "x", "default", "tp 2", "y", False, False), Trial("d", "g", "m", "x")
    right = [RightPort("m", "float32", 3), RightPort("m", "bfloat16", 3, "default: modules: 2.0")]
    found = table.rates([caught, by_ledger, lost, missed], right)
    assert (found.trials, found.families, found.caught, found.locatable, found.located) == (4, 2, 3, 2, 1)
    assert (found.explained, found.right_ports, found.false_alarms) == (2, 2, 1)
    text = table.markdown([caught, by_ledger, lost, missed], right)
    assert "- not caught: d in m (x)" in text
    assert "- false alarm: m, bfloat16: default: modules: 2.0" in text


@pytest.mark.slow
def test_a_fault_is_put_in_and_caught() -> None:
    chosen = tuple(fault for fault in FAULTS if fault.name in ("scale of scores doubled", "stale block"))
    trials, right = suite.run(("llama",), chosen, lambda step: None)
    assert [trial.caught_by for trial in trials] == ["modules", "matrix"]
    assert all(trial.located and trial.explained for trial in trials)
    assert [port.alarm for port in right] == ["", ""]
