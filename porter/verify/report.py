"""The terminal's view of a verification."""

from porter import console
from porter.verify.result import Verification


def print_verification(result: Verification) -> None:
    """One row a check, worst case first; then what was not tested and, last, the outcome."""
    cases = f"{len(result.tried)} cases" if len(result.tried) != 1 else "1 case"
    console.table(
        f"{result.architecture}, {result.checkpoint}, {result.dtype}, {cases}, {result.seconds:.0f} s",
        ("check", "result", "figure", "limit", "detail"),
        [(check.name, check.status, check.figure, check.limit, check.detail) for check in result.summary()],
    )
    console.say(f"port: {result.port}")
    for limit in result.limits:
        console.say(f"not tested: {limit}")
    if result.failure:
        case, check = result.failure
        console.error(f"{case.name}: {check.name} failed: {check.detail or check.figure}")
    else:
        console.say(f"{result.architecture}: every check passed")
