"""A verification as one HTML page that needs nothing else: the checks, a picture of the modules, the cases, limits."""

import math
from typing import Any

from porter.verify.result import Case, Check, Verification

_WIDTH, _HEIGHT, _LEFT = 900, 260, 46
_LEAST = 1e-9  # errors below it are drawn at the bottom


def page(result: Verification) -> str:
    """The page's text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("porter.verify", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    failure = (result.failure[0].name, result.failure[1]) if result.failure else None
    summary = result.summary()
    return environment.get_template("report.html.j2").render(
        found=result.to_json(),
        tried=result.tried,
        failure=failure,
        unproved=result.unproved,
        summary=summary,
        names=[check.name for check in summary],
        cases=[(case, {check.name: check for check in case.checks}) for case in result.cases],
        chart=_chart(result),
    )


def _chart(result: Verification) -> dict[str, Any] | None:
    """Where everything goes in the picture of the case that failed in its modules, else of the first."""
    found = [(case, check) for case in result.tried for check in case.checks if check.data.get("modules")]
    if not found:
        return None
    case, check = next((pair for pair in found if pair[1].status == "FAIL"), found[0])
    return _drawn(case, check)


def _drawn(case: Case, check: Check) -> dict[str, Any]:
    limit = float(check.limit)
    rows = [{**row, "wrong": not row["error"] <= limit} for row in check.data["modules"]]
    values = [row["error"] for row in rows]
    rounded = [row["rounded"] for row in rows if row["rounded"]]
    top, bottom = _range([*values, limit])
    x = [_LEFT + (i + 0.5) * (_WIDTH - _LEFT) / len(rows) for i in range(len(rows))]

    def y(value: float) -> float:
        share = (math.log10(min(max(value, bottom), top)) - math.log10(bottom)) / math.log10(top / bottom)
        return round(_HEIGHT - 8 - share * (_HEIGHT - 16), 1)

    dots = [
        {"x": round(at, 1), "y": y(row["error"]), "wrong": row["wrong"], "title": _title(row)}
        for at, row in zip(x, rows, strict=True)
    ]
    edge = " ".join(f"{dot['x']},{y(1.0)}" for dot in dots) if rounded else ""
    return {
        "case": case.name,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "limit": y(limit),
        "ticks": [{"y": y(10.0**k), "label": f"1e{k}"} for k in _decades(bottom, top)],
        "line": " ".join(f"{dot['x']},{dot['y']}" for dot in dots),
        "band": f"{edge} {_WIDTH},{_HEIGHT} {_LEFT},{_HEIGHT}" if edge else "",
        "dots": dots,
        "rows": rows,
    }


def _range(values: list[float]) -> tuple[float, float]:
    """The decades around all values that can be drawn: top and bottom."""
    drawn = [min(max(value, _LEAST), 1e3) for value in values]
    return 10.0 ** math.ceil(math.log10(max(drawn)) + 0.1), 10.0 ** math.floor(math.log10(min(drawn)) - 0.1)


def _decades(bottom: float, top: float) -> range:
    first, last = round(math.log10(bottom)), round(math.log10(top))
    return range(first, last + 1, 1 if last - first < 9 else 2)


def _title(row: dict[str, Any]) -> str:
    rounding = f", rounding alone {row['rounded']:.1e}" if row["rounded"] else ""
    return f"{row['module']} ({row['kind']}): {row['error']:.1e}{rounding}"
