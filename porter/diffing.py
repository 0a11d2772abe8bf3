"""Unified diffs of a conversion, with porter's reason above each hunk."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? ")


def text_diff(before: str, after: str, before_name: str, after_name: str) -> list[str]:
    """The lines of a unified diff; empty when the texts are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
    return list(lines)


def port_diff(source: tuple[str, str], port: tuple[str, str], edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """source -> port, each as (name, text), with `# line N pass: reason` after the header of the hunk they made."""
    return list(_with_reasons(text_diff(source[1], port[1], source[0], port[0]), edits))


def _with_reasons(lines: Iterable[str], edits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for line in lines:
        yield line
        hunk = _HUNK.match(line)
        if hunk:
            start, length = int(hunk[1]), int(hunk[2] or 1)
            yield from _reasons(edits, range(start, start + length))


def _reasons(edits: Sequence[Mapping[str, Any]], lines: range) -> list[str]:
    inside = [edit for edit in edits if edit.get("line") in lines]
    told = [f"# line {edit['line']} {edit['pass']}: {edit['reason']}" for edit in inside]
    return list(dict.fromkeys(told))
