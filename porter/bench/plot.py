"""A bar chart of one figure as SVG: a bar for each engine, a whisker from its least to its largest value."""

from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _BAR, _GAP, _LEFT = 640, 28, 14, 90


def bar_chart(title: str, rows: list[dict[str, Any]], figure: str) -> str:
    """rows as `compare` makes them -> the text of an SVG file."""
    figures = [row["figures"][figure] for row in rows]
    scale = (_WIDTH - _LEFT - 90) / max(max(each["values"]) for each in figures)
    body = [f'<text x="10" y="22" font-weight="bold">{escape(title)}: {escape(figure)}</text>']
    for i, (row, each) in enumerate(zip(rows, figures, strict=True)):
        top = 40 + i * (_BAR + _GAP)
        middle = top + _BAR / 2
        low, high, end = (_LEFT + scale * x for x in (min(each["values"]), max(each["values"]), each["median"]))
        fill = "#36c" if i == 0 else "#999"
        body += [
            f'<text x="10" y="{middle + 5}">{escape(row["side"])}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{end - _LEFT:.1f}" height="{_BAR}" fill="{fill}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="black"/>',
            f'<text x="{max(end, high) + 6:.1f}" y="{middle + 5}">{each["median"]:,.4g}</text>',
        ]
    height = 40 + len(rows) * (_BAR + _GAP)
    style = 'font-family="sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" {style}>'
    return "\n".join([head, *body, "</svg>", ""])
