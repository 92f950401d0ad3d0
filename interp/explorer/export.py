"""A saved explorer: one HTML file with the answers that fit a budget, and a list of what was left out."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from headscope.interp.explorer.answers import DIFFERENCE, STRIP, Answer, Answers
from headscope.interp.explorer.assets import script, style
from headscope.interp.explorer.overview import edges
from headscope.interp.explorer.tiles import SIDE, top_level

KEPT_BITS = 0xFFF0  # of a half: 6 of its 10 bits of mantissa, an error of at most 0.8 % [OURS]
EDGES = ("entropy", "sink_mass", "key_mass")  # that the page draws beside a map
# The page may run its own script and style and show its own pictures; the browser refuses every request to anywhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Packed:
    """Answers one after the other, each compressed by itself, up to ``budget`` bytes of the page."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size, self._end = budget, 0, 0
        self.index: dict[str, Any] = {}
        self.parts: list[bytes] = []

    def add(self, question: str, answer: Answer) -> bool:
        """Whether it fitted."""
        data = b"" if not answer.data else gzip.compress(_shortened(answer), 9, mtime=0)
        line = len(json.dumps([question, answer.facts], ensure_ascii=False).encode()) + 16
        cost = -(-len(data) // 3) * 4 + line // 3  # base64, and the index, which is compressed to about a third
        if self.size + cost > self.budget:
            return False
        if question not in self.index:
            self.parts.append(data)
            self.index[question] = [answer.facts, self._end, len(data)]
            self._end += len(data)
            self.size += cost
        return True


def _shortened(answer: Answer) -> bytes:
    """Halves, rounded, by their low bytes, then their high ones, which compresses better; other numbers as they are."""
    if answer.facts["type"] != "f16":
        return answer.data
    short = (np.frombuffer(answer.data, "<u2") + np.uint16(8)) & np.uint16(KEPT_BITS)
    return short.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()


def wanted(answers: Answers, chosen: Sequence[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """What a page should hold, the most useful first: groups of questions, each by what a reader would call it."""
    tokens = len(answers.runs[0].tokens)
    top, last = top_level(tokens), tokens - 1
    others = [head for head in answers.heads if head not in set(chosen)]
    alone = range(len(answers.runs))
    runs = [*alone, *([DIFFERENCE] if answers.compared else [])]
    said = [run for run in alone if answers.runs[run].prompt_length is not None]
    ends = {run: last if run == DIFFERENCE else len(answers.runs[run].tokens) - 1 for run in runs}
    yield "the last token's view of every head", [f"query/{run}/{end}" for run, end in ends.items()]
    for what, heads in (("chosen heads", chosen), ("other heads", others)):
        for layer, head in heads:
            yield f"whole maps of {what}", [q for run in runs for q in _level(answers, run, layer, head, top)]
        for layer, head in heads if said else ():
            yield f"time lines of {what}", [f"answer/{run}/{layer}/{head}" for run in said]
        for layer, head in heads if answers.runs[0].grids else ():
            first = answers.runs[0].prompt_length or last
            asked = [f"picture/{run}/{layer}/{head}/{at}" for run in runs for at in range(first, tokens)]
            yield f"answer's (or last) tokens over the picture, {what}", asked
    for what, heads in (("chosen heads", chosen), ("other heads", others)):
        for level in range(top - 1, -1, -1):
            cell = f"{1 << level} x {1 << level} tokens a cell" if level else "single weights"
            for layer, head in heads:
                yield f"{what}, {cell}", [q for run in runs for q in _level(answers, run, layer, head, level)]
    for position in range(last - 1, -1, -max(1, tokens // 64)):
        yield "single tokens' views of every head", [f"query/0/{position}", f"key/0/{position}"]


def _level(answers: Answers, run: int, layer: int, head: int, level: int) -> list[str]:
    """One level of one head's map, with the statistics along its edges."""
    one = answers.runs[min(run, len(answers.runs) - 1)]
    if layer not in one.layers or head >= one.layers[layer].heads:
        return []
    kept, width = one.layers[layer], SIDE << level
    made = []
    for i in range(-(-kept.queries // width)):
        low, high = kept.bounds(i * width, min((i + 1) * width, kept.queries))
        tiles = range(low // width, -(-high // width))
        made += [f"tile/{run}/{layer}/{head}/mass/{level}/{i}/{j}" for j in tiles]
    names = [each["name"] for each in edges(one) if each["name"] in EDGES]
    pieces = range(-(-kept.queries // (STRIP << level)))
    return made + [f"edge/{run}/{layer}/{head}/{name}/{level}/{i}" for name in names for i in pieces]


def pack(answers: Answers, chosen: Sequence[tuple[int, int]], budget: int) -> tuple[Packed, dict[str, list[int]]]:
    """The answers that fit, and of each kind how many groups are in, of how many."""
    packed, full = Packed(budget), False
    counts: dict[str, list[int]] = {}
    for what, questions in wanted(answers, chosen):
        entry = counts.setdefault(what, [0, 0])
        entry[1] += 1
        if full:
            continue
        fitted = all(packed.add(question, _exact(answers, question)) for question in questions)
        entry[0] += fitted
        full = not fitted
    return packed, counts


def _exact(answers: Answers, question: str) -> Answer:
    """An answer, a tile of some rows made exact."""
    answer = answers(question)
    while question.startswith("tile/") and answer.facts["rows"] < answer.facts["of"]:
        answer = answers(f"finer/{question.removeprefix('tile/')}")
    return answer


def document(answers: Answers, chosen: Sequence[tuple[int, int]], budget: int, facts: dict[str, Any]) -> bytes:
    """The page, of at most ``budget`` bytes."""
    opened = answers("open").facts
    fixed = len(_page(opened, {}, b"", {}, facts, answers.title))
    packed, counts = pack(answers, chosen, max(0, budget - fixed - 20_000))
    left = {what: [done, of] for what, (done, of) in counts.items()}
    return _page(opened, packed.index, b"".join(packed.parts), left, facts, answers.title)


def _page(
    opened: dict[str, Any], index: dict[str, Any], data: bytes, left: dict[str, Any], facts: dict[str, Any], title: str
) -> bytes:
    head = {"open": opened, "index": index, "contents": left, "facts": facts}
    small = base64.b64encode(
        gzip.compress(json.dumps(head, ensure_ascii=True, separators=(",", ":"), default=str).encode(), 9, mtime=0)
    ).decode()
    lines = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{style()}</style>\n</head>\n<body class='headscope-page'>\n<div id='explorer'></div>",
        f'<script type="application/gzip" id="head">{small}</script>',
        f'<script type="application/octet-stream" id="data">{base64.b64encode(data).decode()}</script>',
        f"<script type='module'>{script()}\nopenPage(document);</script>\n</body>\n</html>\n",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")
