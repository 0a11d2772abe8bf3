"""The terminal's view of a verification."""

from collections.abc import Iterator

from porter import console
from porter.verify.result import Verification

_SHOWN = 6


def _sizes(result: Verification) -> Iterator[str]:
    """The legal tensor-parallel sizes of the real config, and why not the others: sizes with one reason together."""
    legal, reasons = result.tp_sizes.get("legal"), dict[str, list[str]]()
    for size, reason in result.tp_sizes.get("illegal", {}).items():
        reasons.setdefault(reason.replace(f"tp_size = {size}", "tp_size"), []).append(str(size))
    if legal:
        yield f"tp sizes of the real config: {', '.join(map(str, legal))}"
    for reason, sizes in reasons.items():
        shown = [*sizes[:_SHOWN], f"{len(sizes) - _SHOWN} more"] if len(sizes) > _SHOWN else sizes
        yield f"not {', '.join(shown)}: {reason}"


def print_verification(result: Verification) -> None:
    """One row a check, worst case first; then what was not tested and, last, the outcome."""
    cases = f"{len(result.tried)} cases" if len(result.tried) != 1 else "1 case"
    console.table(
        f"{result.architecture}, {result.checkpoint}, {result.dtype}, {cases}, {result.seconds:.0f} s",
        ("check", "result", "figure", "limit", "detail"),
        [(check.name, check.status, check.figure, check.limit, check.detail) for check in result.summary()],
    )
    console.say(f"port: {result.port}")
    for line in _sizes(result):
        console.say(line)
    for limit in result.limits:
        console.say(f"not tested: {limit}")
    if result.failure:
        case, check = result.failure
        console.error(f"{case.name}: {check.name} failed: {check.detail or check.figure}")
    elif result.unproved:
        case, check = result.unproved
        console.error(f"{case.name}: {check.name} is unproved: {check.detail}; nothing was found wrong; verify again")
    else:
        console.say(f"{result.architecture}: every check passed")
