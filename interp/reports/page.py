"""A report: text, tables and figures in one HTML file that opens offline, on any machine with a current browser."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots.style import show_token
from headscope.interp.runs.files import write_atomically

LIMIT = 6_000_000  # bytes
ON_ONE_LINE = ("p", "p_permutation", "p_holm", "95 % of the null")  # columns of numbers as text; so are intervals
LONG = 16  # entries of a list of contents that is read at a glance

# The page may run its own scripts and styles and show its own images; the browser refuses every request to anywhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Report:
    """A page built in reading order: each call adds to its end and returns the report; ``save`` writes it.

    Everything given is shown literally: no string is read as HTML or Markdown. Figures stay interactive; plotly.js
    travels in the file, compressed (2.0 MB instead of 4.8), and the browser unpacks it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._body: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._payloads: list[str] = []
        self._provenance: dict[str, Any] = {}
        self._counts = {"Figure": 0, "Table": 0, "Section": 0}

    def heading(self, text: str) -> Report:
        """Start a section."""
        anchor = self._enter("Section", text)
        self._body.append(f'<h2 id="{anchor}">{_safe(text)}</h2>')
        return self

    def text(self, paragraph: str) -> Report:
        """Add plain text; a blank line starts a new paragraph."""
        parts = [part.strip() for part in paragraph.split("\n\n")]
        self._body += [f"<p>{_safe(part)}</p>" for part in parts if part]
        return self

    def table(self, frame: pd.DataFrame, caption: str, formats: Mapping[str, str] | None = None) -> Report:
        """Add a table of the frame's columns (its index is left out), their names in words (underscores as spaces);
        NaN is shown as a dash.

        ``formats`` gives a column's format specification, such as ``{"score": ".3f", "recall": ".1%"}``; other floats
        are shown with four significant digits.

        Raises:
            HeadscopeError: no columns, a format for a column that does not exist, or one that does not fit its values.
        """
        if frame.shape[1] == 0:
            raise HeadscopeError(f"the table {caption!r} has no columns, so there is nothing to show")
        unknown = set(formats or {}) - set(frame.columns)
        if unknown:
            raise HeadscopeError(f"the table {caption!r} has no column {sorted(unknown, key=str)[0]!r} to format")
        anchor = self._enter("Table", caption)
        label = f"<b>Table {self._counts['Table']}.</b> {_safe(caption)}"
        rows = _table(frame, dict(formats or {}), caption)
        self._body.append(f'<figure id="{anchor}"><figcaption>{label}</figcaption>{rows}</figure>')
        return self

    def tokens(
        self, tokens: Sequence[str], values: Sequence[float | None], caption: str, *, low: float, high: float
    ) -> Report:
        """Add a text token by token, each marked by where its value lies between ``low`` (not at all) and ``high``, and
        with its value where one points at it.

        Raises:
            HeadscopeError: not as many values as tokens.
        """
        if len(tokens) != len(values):
            raise HeadscopeError(f"{len(tokens)} tokens have {len(values)} values; give each its own, or None")
        marked = "".join(_token(*both, low, high) for both in zip(tokens, values, strict=True))
        self._body.append(f'<p class="tokens"><small>{_safe(caption)}</small><br>{marked}</p>')
        return self

    def figure(self, figure: go.Figure, caption: str) -> Report:
        """Add an interactive Plotly figure as it is now."""
        anchor = self._enter("Figure", caption)
        number = self._counts["Figure"]
        height = figure.layout.height or 450
        label = f"<b>Figure {number}.</b> {_safe(caption)}"
        plot = f'<div class="plot" data-from="data-{number}" style="min-height:{height:.0f}px"></div>'
        self._body.append(f'<figure id="{anchor}">{plot}<figcaption>{label}</figcaption></figure>')
        self._payloads.append(_payload(f"data-{number}", figure.to_json()))
        return self

    def provenance(self, facts: Mapping[str, Any]) -> Report:
        """Add facts about where the results came from, shown folded at the end; a later call adds to them."""
        self._provenance.update(facts)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the page to ``path``, whole or not at all, and return the path.

        Raises:
            HeadscopeError: nothing was added, the page would pass 6 MB, or ``path`` cannot be written.
        """
        path = Path(path)
        if not self._body:
            raise HeadscopeError("the report is empty; add text, a table or a figure before saving it")
        page = self._render().encode("utf-8", "backslashreplace")
        if len(page) > LIMIT:
            raise HeadscopeError(
                f"the report would take {len(page) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; "
                "leave out figures or show smaller tiles"
            )
        write_atomically(path, page)
        return path

    def _enter(self, kind: str, text: str) -> str:
        """Number an entry and list it in the contents; returns its anchor."""
        self._counts[kind] += 1
        anchor = f"{kind.lower()}-{self._counts[kind]}"
        self._contents.append((anchor, text if kind == "Section" else f"{kind} {self._counts[kind]}. {text}"))
        return anchor

    def _render(self) -> str:
        title, subtitle = _safe(self.title), f'<p class="subtitle">{_safe(self.subtitle)}</p>' if self.subtitle else ""
        scripts = [_plotly(), *self._payloads, f"<script>{_asset('report.js')}</script>"] if self._payloads else []
        parts = [
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_asset('report.css')}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>{title}</h1>{subtitle}</header>",
            _contents(self._contents),
            *self._body,
            _facts(self._provenance),
            "</main>",
            *scripts,
            "</body>\n</html>\n",
        ]
        return "\n".join(part for part in parts if part)


def _safe(text: object) -> str:
    return html.escape(str(text))


def _token(text: str, value: float | None, low: float, high: float) -> str:
    """A token as a span whose background is as dense as its value is large."""
    if value is None:
        return f"<span>{show_token(text)}</span>"
    dense = 0.85 * min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    return f'<span style="background:rgba(31,111,139,{dense:.2f})" title="{value:.4g}">{show_token(text)}</span>'


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent.parent / "data" / name).read_text(encoding="utf-8")


def _payload(name: str, text: str) -> str:
    """Text as an inert script element of gzip in base64, which no text can break out of."""
    packed = base64.b64encode(gzip.compress(text.encode("utf-8", "backslashreplace"), 9, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{packed}</script>'


@cache
def _plotly() -> str:
    return _payload("plotly", get_plotlyjs())


def _contents(entries: list[tuple[str, str]]) -> str:
    if len(entries) < 2:
        return ""
    if len(entries) > LONG:  # sections are found at once, and what is in them is a click further
        return _folded(entries)
    return _listed("Contents", entries)


def _folded(entries: list[tuple[str, str]]) -> str:
    """The sections, and folded below them every figure and table."""
    sections = [entry for entry in entries if entry[0].startswith("section")]
    every = f"<details><summary>Figures and tables</summary>{_list(entries)}</details>"
    return f'<nav aria-label="Contents"><h2>Contents</h2>{_list(sections)}{every}</nav>'


def _listed(title: str, entries: list[tuple[str, str]]) -> str:
    return f'<nav aria-label="{title}"><h2>{title}</h2>{_list(entries)}</nav>'


def _list(entries: list[tuple[str, str]]) -> str:
    lines = []
    for anchor, text in entries:
        short = text if len(text) <= 110 else text[:109].rstrip() + "…"
        lines.append(f'<li class="{anchor.split("-")[0]}"><a href="#{anchor}">{_safe(short)}</a></li>')
    return f"<ul>{''.join(lines)}</ul>"


def _table(frame: pd.DataFrame, formats: dict[str, str], caption: str) -> str:
    head, columns = [], []
    for at, name in enumerate(frame.columns):
        values = frame.iloc[:, at]
        numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        whole = "interval" in str(name) or name in ON_ONE_LINE
        kind = ' class="number"' if numeric else ' class="whole"' if whole else ""
        head.append(f'<th scope="col"{kind}>{_safe(str(name).replace("_", " "))}</th>')
        try:
            columns.append([f"<td{kind}>{_safe(_cell(value, formats.get(name)))}</td>" for value in values])
        except (ValueError, TypeError) as error:
            raise HeadscopeError(
                f"the table {caption!r}: format {formats.get(name)!r} does not fit column {name!r} ({error})"
            ) from error
    rows = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True))
    rows = rows or f'<tr><td class="none" colspan="{len(head)}">no rows</td></tr>'
    return f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _cell(value: Any, specification: str | None) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if specification is not None:
        return format(value, specification)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = []
    for name, value in facts.items():
        nested = isinstance(value, Mapping | list | tuple)
        shown = json.dumps(value, indent=1, ensure_ascii=False, default=str) if nested else str(value)
        rows.append(f"<dt>{_safe(name)}</dt><dd>{_safe(shown)}</dd>")
    return f"<details><summary>Provenance</summary><dl>{''.join(rows)}</dl></details>"
