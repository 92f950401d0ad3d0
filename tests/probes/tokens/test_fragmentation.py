"""The paper's numbers for tokenizers of numbers, and every component by itself."""

from __future__ import annotations

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.probes.tokens.fragmentation import fragmentation, to_frame

BARE = ("10", "27", "1606")
KEPT = ("10", "/", "27", "/", "1606")


@pytest.mark.parametrize(
    ("pieces", "paper"),
    [
        (("102", "716", "06"), 0.40),  # Llama 3
        (("1027", "16", "06"), 0.40),  # GPT-3
        (("10", "27", "16", "06"), 0.34),  # OLMo: 0.20 - 0.05 + 0.30 (1 - 2 / sqrt(4 * 7))
        (tuple("10271606"), 0.55),  # one digit a token
        (("", *"10271606"), 0.60),  # and a marker before them
    ],
)
def test_the_papers_numbers_for_a_bare_date(pieces: tuple[str, ...], paper: float) -> None:
    (found,) = fragmentation(["10271606"], [KEPT], lambda text: pieces)
    assert round(found.ratio, 2) == paper
    assert found.delimiter and found.extra == len(pieces) - 5


@pytest.mark.parametrize(
    ("pieces", "cut", "merged"),
    [
        (("102", "716", "06"), 0.40, 0.40),
        (("10", "27", "16", "06"), 0.15 + 0.30 * (1 - 2 / 12**0.5), 0.05 + 0.30 * (1 - 2 / 12**0.5)),
        (tuple("10271606"), 0.55, 0.55),
        (BARE, 0.0, 0.0),
    ],
)
def test_a_baseline_without_delimiters(pieces: tuple[str, ...], cut: float, merged: float) -> None:
    for split, ratio in (("cut", cut), ("merged", merged)):
        (found,) = fragmentation(["10271606"], [BARE], lambda text: pieces, split=split)
        assert found.ratio == pytest.approx(ratio)
        assert not found.delimiter and found.extra == len(pieces) - 3


def test_delimiters_and_the_table() -> None:
    fields = ("10", "/", "27", "/", "1606")
    (kept,) = fragmentation(["10/27/1606"], [fields], lambda text: fields)
    assert kept.ratio == 0.0
    (lost,) = fragmentation(["10/27/1606"], [fields], lambda text: ("10/", "27/", "1606"))
    assert lost.delimiter and not lost.split and lost.extra == -2
    assert lost.distance == pytest.approx(1 - 1 / (3 * 7) ** 0.5)  # fields count 1, 2, 1, 1: sqrt(7)
    (both,) = fragmentation(["10/27/1606"], [fields], lambda text: ("10/2", "7/1606"))
    assert both.split and both.delimiter
    assert to_frame([kept, lost])["ratio"].tolist() == [kept.ratio, lost.ratio]


def test_parts_that_are_not_the_date_are_refused() -> None:
    with pytest.raises(HeadscopeError, match="pieces .* do not join"):
        fragmentation(["1"], [["1"]], lambda text: ["_", "1"])
    with pytest.raises(HeadscopeError, match="fields .* do not join"):
        fragmentation(["12"], [["1"]], lambda text: ["12"])
    with pytest.raises(HeadscopeError, match="empty text"):
        fragmentation([""], [()], lambda text: ())
    with pytest.raises(HeadscopeError, match="give fields to each date"):
        fragmentation(["12"], [], lambda text: ["12"])
    with pytest.raises(HeadscopeError, match="'cut' or 'merged'"):
        fragmentation(["12"], [["12"]], lambda text: ["12"], split="half")
