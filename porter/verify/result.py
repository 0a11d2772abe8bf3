"""What verification found: frozen, JSON-able; every view of it is made from this."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["PASS", "FAIL", "unproved", "skip"]


@dataclass(frozen=True)
class Check:
    """One check of one case: the figure that decided, its limit, and, on a failure, what to look at.

    It is `unproved` where the machine did not let it be made.
    """

    name: str
    status: Status
    figure: str = ""
    limit: str = ""
    detail: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """The checks of one checkpoint, in order; `overrides` are the config fields that make it differ.

    `skipped` says why there is nothing to compare with; such a case has no checks and proves nothing.
    """

    name: str
    overrides: dict[str, Any]
    checks: tuple[Check, ...]
    skipped: str = ""

    @property
    def failure(self) -> Check | None:
        return next((check for check in self.checks if check.status == "FAIL"), None)


@dataclass(frozen=True)
class Verification:
    """All cases of one port; `limits` says what was not tested, `command` how to do it again.

    `hashes` are of the port, the config and the checkpoint, `tp_sizes` the legal tensor-parallel sizes of the real
    config and the reasons against the others.
    """

    architecture: str
    port: str
    port_sha256: str
    converted: bool
    checkpoint: str
    dtype: str
    cases: tuple[Case, ...]
    limits: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    command: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    tp_sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def tried(self) -> tuple[Case, ...]:
        """The cases that were compared, those whose original can't run left out."""
        return tuple(case for case in self.cases if not case.skipped)

    @property
    def passed(self) -> bool:
        return bool(self.tried) and not self.failure and not self.unproved

    @property
    def unproved(self) -> tuple[Case, Check] | None:
        """The first check that the machine did not let be made, and its case."""
        checks = ((case, check) for case in self.cases for check in case.checks)
        return next(((case, check) for case, check in checks if check.status == "unproved"), None)

    @property
    def failure(self) -> tuple[Case, Check] | None:
        """The first case that failed, and its first failing check."""
        return next(((case, case.failure) for case in self.cases if case.failure), None)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: enough to know what was proved, by what and how well."""
        kept = ("checkpoint", "dtype", "limits", "versions", "seconds", "command", "hashes", "tp_sizes")
        figures = {check.name: check.figure for check in self.summary()}
        cases = [case.name for case in self.tried]
        return {**{name: getattr(self, name) for name in kept}, "cases": cases, "figures": figures}

    def summary(self) -> tuple[Check, ...]:
        """One row a check over all cases: the first failure, else the worst figure, else why it was skipped."""
        names = dict.fromkeys(check.name for case in self.cases for check in case.checks)
        return tuple(
            _worst([check for case in self.cases for check in case.checks if check.name == name]) for name in names
        )


def _worst(checks: list[Check]) -> Check:
    rank = {"FAIL": 3, "unproved": 2, "PASS": 1, "skip": 0}
    return max(checks, key=lambda check: (rank[check.status], float(check.data.get("worst", 0.0))))
