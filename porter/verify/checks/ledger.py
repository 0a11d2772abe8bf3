"""Every checkpoint tensor used once or excused, every parameter filled, from headers alone."""

from porter.verify.result import Check
from porter.verify.subject import Subject
from porter.weights import checkpoint_hashes, make_ledger

NAME = "ledger"
_SHOWN = 3


def check(subject: Subject) -> Check:
    """PASS if nothing is left over on either side."""
    ledger = make_ledger(subject.port, subject.config, subject.folder)
    used = sum(line.status == "used" for line in ledger.lines)
    problems = ledger.problems
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    detail = "; ".join(problems[:_SHOWN]) + more if problems else ledger.tie
    data = {"worst": len(problems), "problems": list(problems), "tie": ledger.tie}
    data["hashes"] = checkpoint_hashes(subject.folder)
    return Check(NAME, "FAIL" if problems else "PASS", f"{used} of {len(ledger.lines)} used", "0 left", detail, data)
