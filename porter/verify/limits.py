"""Says what a verification did not test, so that a pass is not taken for more than it is."""

from porter.verify.request import Request
from porter.verify.result import Case


def untested(request: Request, cases: tuple[Case, ...], unread: tuple[str, ...] = ()) -> tuple[str, ...]:
    """One line for each thing that was not tested; `unread` are config fields that the port ignores."""
    ignored = [f"values of {name} but the config class's own: the port doesn't read it" for name in unread]
    found = [*_always(request), *_weights(request), *ignored, *_skipped(cases), *_windows(cases), *_states(cases)]
    return tuple(dict.fromkeys([*found, *_not_compared(cases)]))


def _always(request: Request) -> list[str]:
    other = "half precision" if request.dtype == "float32" else "float32"
    longest = "one prompt has 307 tokens" if request.random else "prompts and output stay under 100 tokens"
    return [
        f"{other}: verify again with --dtype",
        "GPU kernels: all checks ran on the CPU",
        f"long contexts: {longest}",
        "sampling: only greedy is compared; seeds and penalties are the runtime's own tests",
    ]


def _weights(request: Request) -> list[str]:
    if request.random:
        return ["real weights: verify with --model on the checkpoint that you mean to serve"]
    return ["other values of the config: --random varies the fields that the port reads"]


def _skipped(cases: tuple[Case, ...]) -> list[str]:
    checks = [(case, check) for case in cases if not case.failure for check in case.checks]
    without_original = [f"{case.name}: {case.skipped}" for case in cases if case.skipped]
    skipped = [f"{case.name}, {check.name}: {check.detail}" for case, check in checks if check.status == "skip"]
    return without_original + skipped


def _windows(cases: tuple[Case, ...]) -> list[str]:
    data = [check.data for case in cases for check in case.checks]
    windows = {int(each["window_not_reached"]) for each in data if "window_not_reached" in each}
    return [f"the sliding window of {window} tokens: no prompt was longer" for window in sorted(windows)]


def _states(cases: tuple[Case, ...]) -> list[str]:
    kept = any(check.data.get("keeps_states") for case in cases for check in case.checks)
    return ["shared prefixes: sequences can't share states, and the engine shares no prefix of this port"] * kept


def _not_compared(cases: tuple[Case, ...]) -> list[str]:
    names = {name for case in cases for check in case.checks for name in check.data.get("not_compared", ())}
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return (
        [f"outputs of modules that the original doesn't have, or not in that form: {', '.join(kinds)}"] if kinds else []
    )
