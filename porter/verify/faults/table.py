"""What the seeded faults show, as JSON and as docs/faults.md."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from porter import __version__
from porter.verify.faults.suite import RightPort, Trial

COMMAND = "porter faults --out docs"
_PREFACE = f"""# Seeded faults

Made by `{COMMAND}`; faults.json has every trial with what the report said. Ports that are right are made wrong in one
known place, by an edit of the emitted file or of the weights on their way into it, and verified as `porter verify
--random` does (without the check that starts processes). A fault is *caught* if a check fails, *located* if the
module that the report names is the broken one (or the nearest around it that the original has too; the ledger names
tensors and isn't counted), and *explained* if the suggested cause has a word that the fault was written down with. A
check that fails on a port without a fault is a false alarm.
"""


@dataclass(frozen=True)
class Rates:
    """How many trials there are, and how many of them were caught, located and explained."""

    faults: int
    families: int
    trials: int
    caught: int
    locatable: int
    located: int
    explained: int
    right_ports: int
    false_alarms: int


def rates(trials: Sequence[Trial], right: Sequence[RightPort]) -> Rates:
    """The figures of a run."""
    caught = [trial for trial in trials if trial.caught]
    return Rates(
        faults=len({trial.fault for trial in trials}),
        families=len({trial.family for trial in trials}),
        trials=len(trials),
        caught=len(caught),
        locatable=sum(trial.located is not None for trial in caught),
        located=sum(trial.located is True for trial in caught),
        explained=sum(trial.explained is True for trial in caught),
        right_ports=len(right),
        false_alarms=sum(bool(port.alarm) for port in right),
    )


def as_json(trials: Sequence[Trial], right: Sequence[RightPort]) -> dict[str, Any]:
    """What faults.json holds."""
    return {
        "command": COMMAND,
        "device": "cpu",
        "versions": versions(),
        "rates": asdict(rates(trials, right)),
        "trials": [asdict(trial) for trial in trials],
        "right_ports": [asdict(port) for port in right],
    }


def versions() -> dict[str, str]:
    """What made the figures."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"porter": __version__, **others, "python": platform.python_version()}


def markdown(trials: Sequence[Trial], right: Sequence[RightPort]) -> str:
    """The text of docs/faults.md."""
    made = ", ".join(f"{name} {release}" for name, release in versions().items())
    rows = [["family", "fault", "ports", "caught", "located", "explained", "caught by"]]
    rows += [
        _row([trial for trial in trials if trial.fault == name]) for name in dict.fromkeys(t.fault for t in trials)
    ]
    head, rest = rows[0], sorted(rows[1:])
    lines = [head, ["---"] * len(head), *rest]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        "\n".join([_PREFACE, f"{made}.", "", *summary(trials, right), "", table, "", *_open(trials, right)]).rstrip()
        + "\n"
    )


def summary(trials: Sequence[Trial], right: Sequence[RightPort]) -> list[str]:
    """The rates, one line each."""
    found = rates(trials, right)
    return [
        f"- **{found.trials}** trials of {found.faults} faults in {found.families} families",
        f"- caught: **{_share(found.caught, found.trials)}**",
        f"- located: **{_share(found.located, found.locatable)}**",
        f"- explained: **{_share(found.explained, found.caught)}**",
        f"- false alarms: **{found.false_alarms}** of {found.right_ports} runs on right ports, in float32 and bfloat16",
    ]


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}, {part / max(whole, 1):.1%}"


def _row(trials: Sequence[Trial]) -> list[str]:
    first, total = trials[0], len(trials)
    placed = [trial for trial in trials if trial.located is not None]
    checks = ", ".join(dict.fromkeys(trial.caught_by for trial in trials if trial.caught))
    return [
        first.family,
        first.fault,
        ", ".join(trial.model for trial in trials),
        f"{sum(trial.caught for trial in trials)}/{total}",
        f"{sum(trial.located is True for trial in placed)}/{len(placed)}" if placed else "-",
        f"{sum(trial.explained is True for trial in trials)}/{total}",
        checks or "-",
    ]


def _open(trials: Iterable[Trial], right: Iterable[RightPort]) -> list[str]:
    """What went wrong, one line each."""
    missed = [f"- not caught: {t.fault} in {t.model} ({t.broken})" for t in trials if not t.caught]
    lost = [
        f"- not located: {t.fault} in {t.model}: {t.broken}, named {t.named or '-'}"
        for t in trials
        if t.located is False
    ]
    alarms = [f"- false alarm: {port.model}, {port.dtype}: {port.alarm}" for port in right if port.alarm]
    return [*missed, *lost, *alarms]
