"""Needles, haystacks, where sentences end, and ROUGE-1 recall."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError

# A full stop that ends a sentence: white space follows (none in Chinese and Japanese), and it closes no abbreviation.
_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？][」』”’）]*")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Esq|Jr|Sr|No|vs|etc|e\.g|i\.e|[A-Z])\.$")
_CLAUSE = re.compile(r"(?:[,;:–—]|--)(?=\s|\w)|[，；：、]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Needle:
    """A fact to hide and how to ask for it.

    ``needle`` is the hidden sentence; ``question`` asks for it in its own words; ``real_needle`` is the part of
    ``needle`` that answers, whose copying is scored; ``paraphrase`` asks without the needle's content words;
    ``keywords`` are words of a right answer.
    """

    needle: str
    question: str
    real_needle: str
    paraphrase: str | None = None
    keywords: tuple[str, ...] = ()
    name: str = ""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Needle:
        """A needle from JSON; ``name`` defaults to the answer. Other fields are ignored.

        Raises:
            HeadscopeError: a missing field, or ``real_needle`` that is no part of ``needle``.
        """
        for key in ("needle", "question", "real_needle"):
            if not isinstance(fields.get(key), str) or not fields[key].strip():
                raise HeadscopeError(f"a needle needs the fields needle, question and real_needle; {key} is missing")
        needle, real = fields["needle"].strip(), fields["real_needle"].strip()
        at = needle.casefold().find(real.casefold())
        if at < 0:
            raise HeadscopeError(f"real_needle {real!r} is not a part of its needle {needle!r}; make it one")
        keywords = tuple(map(str, fields.get("keywords") or ()))
        name = str(fields.get("name") or real)
        real = needle[at : at + len(real)] if len(needle.casefold()) == len(needle) else real
        return cls(needle, fields["question"].strip(), real, fields.get("paraphrase") or None, keywords, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "keywords": list(self.keywords)}


Needles = int | str | Path | Sequence[Needle | dict[str, Any] | str] | None


def load_needles(needles: Needles = None) -> tuple[Needle, ...]:
    """The bundled needles (None: the first three; an int: the first so many), those of a JSON lines file, or the given
    ones, a bundled one by its name. Names must differ.

    Three is the paper's number, but the texts are headscope's own. The authors find heads with three others (a report
    of the WMO, what to do in Beijing, why Mr Green is disliked) and keep the San Francisco sandwich, our first, for
    their masking experiment. Their file, haystack_for_detect/needles.jsonl of their repository, is read as it is.

    Raises:
        HeadscopeError: a file that cannot be read, a broken needle, or no needle at all.
    """
    if needles is None or isinstance(needles, int):
        bundled = list(_bundled().values())
        count = 3 if needles is None else needles
        if not 0 < count <= len(bundled):
            raise HeadscopeError(f"there are {len(bundled)} bundled needles; {count} were asked for")
        found = bundled[:count]
    elif isinstance(needles, str | Path):
        found = _read_needles(Path(needles))
    else:
        found = [_needle(n) for n in needles]
    if not found:
        raise HeadscopeError("there is no needle to hide; give at least one")
    twice = [name for name, n in Counter(needle.name for needle in found).items() if n > 1]
    if twice:
        raise HeadscopeError(f"two needles are called {twice[0]!r}; give each its own name")
    return tuple(found)


def _bundled() -> dict[str, Needle]:
    lines = files("headscope.interp").joinpath("data/needles.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return {needle.name: needle for needle in (Needle.from_dict(json.loads(line)) for line in lines)}


def _needle(given: Any) -> Needle:
    if isinstance(given, str):
        if given not in _bundled():
            raise HeadscopeError(f"no bundled needle is called {given!r}; there are {', '.join(_bundled())}")
        return _bundled()[given]
    return given if isinstance(given, Needle) else Needle.from_dict(given)


def _read_needles(path: Path) -> list[Needle]:
    lines = _read(path).split("\n")
    try:
        return [Needle.from_dict(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, AttributeError) as error:
        raise HeadscopeError(f"{path} is not a file of needles, one JSON object a line ({error})") from error


def load_haystack(path: str | Path | None = None) -> str:
    """The bundled prose (None; see ``data/README.md``) or the text of a UTF-8 file.

    Raises:
        HeadscopeError: a file that is missing, empty, or not UTF-8 text.
    """
    if path is None:
        return files("headscope.interp").joinpath("data/haystack.txt").read_text(encoding="utf-8")
    text = _read(Path(path)).lstrip("\ufeff")
    if not text.strip():
        raise HeadscopeError(f"{path} holds no text to hide a needle in; choose another haystack")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise HeadscopeError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise HeadscopeError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def sentence_ends(text: str) -> list[int]:
    """Character positions just after each sentence; after each line, or else each word, in text without sentences."""
    ends = [match.end() for match in _END.finditer(text) if not _abbreviates(text, match.end())]
    for fallback in (r"\S(?=\s*\n)", r"\S(?=\s)"):
        ends = ends or [match.end() for match in re.finditer(fallback, text)]
    return ends


def _abbreviates(text: str, end: int) -> bool:
    return _ABBREVIATION.search(text[max(0, end - 8) : end]) is not None


def boundary_before(ends: Sequence[int], at: int) -> int:
    """The last of ``ends`` at or before character ``at``; the first one after it where there is none before."""
    if not ends:
        return at
    return ends[max(0, bisect_right(ends, at) - 1)]


def insertion_point(text: str, at: int) -> int:
    """Where a sentence may be set into ``text`` at character ``at``: the sentence end at or before it. In a sentence
    that began more than 5 % of the text earlier (half the paper's step between depths), the last comma, semicolon,
    colon or dash, so that two depths do not become one."""
    end = boundary_before(sentence_ends(text), at)
    if abs(at - end) <= 0.05 * len(text):
        return end
    clauses = [match.end() for match in _CLAUSE.finditer(text)]
    return boundary_before(sorted({end, *clauses}), at)


def rouge1_recall(answer: str, response: str, *, stem: Callable[[str], str] | None = None) -> float:
    """ROUGE-1 recall: the share of ``answer``'s words found in ``response``, each counted as often as it occurs there.

    Words are runs of letters and digits in any script, without case (Chinese and Japanese: single characters). The
    authors' rouge-score package also applies Porter stemming to words of more than three letters; pass a stemmer as
    ``stem`` (e.g. ``nltk.stem.PorterStemmer().stem``) to do the same. Without one, "eats" does not match "eat", which
    changes nothing where a head copies the needle's own words.

    Raises:
        HeadscopeError: ``answer`` has no word.
    """

    def words(text: str) -> Counter[str]:
        found = _WORD.findall(text.casefold())
        return Counter(stem(word) if stem is not None and len(word) > 3 else word for word in found)

    wanted, given = words(answer), words(response)
    if not wanted:
        raise HeadscopeError(f"the answer {answer!r} has no words to recall")
    return sum((wanted & given).values()) / sum(wanted.values())
