"""Unified diffs of a conversion, with porter's reasons right above the lines that they are about."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

Edits = Sequence[Mapping[str, Any]]
_CONTEXT = 2


def text_diff(before: str, after: str, before_name: str, after_name: str) -> list[str]:
    """The lines of a unified diff; empty when the texts are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
    return list(lines)


def port_diff(source: tuple[str, str], port: tuple[str, str], edits: Edits) -> list[str]:
    """source -> port, each as (name, text), with `# PASS, lines N: reason` above each change; empty when equal."""
    before, after = source[1].splitlines(), port[1].splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    lines = []
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        (_, a, _, c, _), (_, _, b, _, d) = group[0], group[-1]
        lines.append(f"@@ -{a + 1},{b - a} +{c + 1},{d - c} @@")
        for kind, *bounds in group:
            lines += _change(kind, bounds, before, after, edits)
    return [f"--- {source[0]}", f"+++ {port[0]}", *lines] if lines else []


def _change(kind: str, bounds: list[int], before: list[str], after: list[str], edits: Edits) -> Iterator[str]:
    a, b, c, d = bounds
    if kind == "equal":
        yield from (f" {line}" for line in before[a:b])
        return
    for start, end in _chunks(before, a, b):
        yield from _reasons(edits, range(start + 1, max(end, start + 1) + 1))
        yield from (f"-{line}" for line in before[start:end])
    yield from (f"+{line}" for line in after[c:d])


def _chunks(lines: list[str], start: int, end: int) -> list[tuple[int, int]]:
    """What is removed, cut before each top-level statement that follows an empty line."""
    cuts = [i for i in range(start + 1, end) if not lines[i - 1].strip() and lines[i][:1].strip()]
    return list(pairwise([start, *cuts, end]))


def _reasons(edits: Edits, lines: range) -> list[str]:
    """One line for each pass that worked there, in the order in which they did."""
    found: dict[tuple[str, str], list[int]] = {}
    for edit in edits:
        if edit.get("line") in lines:
            found.setdefault((str(edit["pass"]).replace("_", "-"), str(edit["reason"])), []).append(edit["line"])
    return [f"# {name}, {_places(at)}: {reason}" for (name, reason), at in found.items()]


def _places(lines: list[int]) -> str:
    known = sorted(set(lines))
    starts = [line for before, line in pairwise([known[0] - 2, *known]) if line != before + 1]
    ends = [line for line, after in pairwise([*known, known[-1] + 2]) if after != line + 1]
    spans = [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return f"line {spans[0]}" if len(known) == 1 else f"lines {', '.join(spans)}"
