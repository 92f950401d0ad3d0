"""Pairs of prompt and target whose rule stands in the context: A^ B^ A and A^ B^ B (Nam et al. 2025)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.haystack import load_haystack

Pair = tuple[str, str]
Rule = Literal["ABA", "ABB"]
EXAMPLES = 4  # complete lines before the one to complete


def pattern_pairs(count: int, rule: Rule, seed: int) -> list[Pair]:
    """``count`` prompts of four lines `` A^ B^ A`` (or B) of different words and the first two words of a fifth.

    The target is the fifth's third word. Equal seeds give the same words under both rules.

    The task of "Causal Head Gating" (arXiv 2505.13737). Its data are not published: [OURS] words of four to seven
    letters of the bundled prose, and the number of lines.
    """
    words = sorted(set(re.findall(r"\b[a-z]{4,7}\b", load_haystack())))
    found = []
    for i in range(count):
        drawn = np.random.default_rng([seed, i]).choice(len(words), 2 * (EXAMPLES + 1), replace=False)
        lines = [(words[a], words[b]) for a, b in drawn.reshape(-1, 2)]
        whole = [f" {a}^ {b}^ {a if rule == 'ABA' else b}" for a, b in lines]
        prompt, _, target = "\n".join(whole).rpartition(" ")
        found.append((prompt, f" {target}"))
    return found


def load_pairs(given: Sequence[Pair] | str | Path) -> list[Pair]:
    """Pairs as they are given, or of a file with one JSON object a line, {"prompt": ..., "target": ...}.

    Raises:
        HeadscopeError: no such file, another form, or none at all.
    """
    try:
        if isinstance(given, str | Path):
            lines = [json.loads(line) for line in Path(given).read_text(encoding="utf-8").split("\n") if line.strip()]
            found = [(str(line["prompt"]), str(line["target"])) for line in lines]
        else:
            found = [(str(prompt), str(target)) for prompt, target in given]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadscopeError(
            f"{str(given)[:60]} holds no pairs ({type(error).__name__}: {error}); give (prompt, target) pairs, or a "
            'file with one {"prompt": ..., "target": ...} a line'
        ) from error
    if not found or not all(prompt and target for prompt, target in found):
        raise HeadscopeError("give at least one pair of a prompt and a target, neither of them empty")
    return found
