"""What fits are given: answers with labels, responses, preferences; from rows or JSON-lines files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.gates import Tokens
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.tokens import body_tokens, check_length, start_tokens
from headscope.probes.linear.dataset import Labelled, load_labelled

FORMS = {
    "answers": '{"question": ..., "choices": [...], "labels": [0 or 1, ...]} or {"text": ..., "label": 0 or 1}',
    "sft": '{"prompt": ..., "response": ...}',
    "dpo": '{"prompt": ..., "chosen": ..., "rejected": ...}',
}
KEYS = {"sft": ("prompt", "response"), "dpo": ("prompt", "chosen", "rejected")}


def read_rows(data: str | Path | Sequence[Any], form: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a JSON-lines file, or rows as they are given, and what errors call them.

    Raises:
        HeadscopeError: no such file, a line that is no JSON object, or no row.
    """
    name, rows = "the data", cast("Sequence[Any]", data)
    if isinstance(data, str | Path):
        name = str(data)
        try:
            lines = Path(data).read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise HeadscopeError(f"cannot read {name} ({error}); give JSON lines {FORMS[form]}") from error
    found = list(rows)
    if not found or not all(isinstance(row, dict) for row in found):
        raise HeadscopeError(f"{name} holds no rows of objects; give JSON lines {FORMS[form]}")
    return found, name


def answers(data: Labelled | str | Path | Sequence[Any]) -> Labelled:
    """Labelled texts for ITI: ``"Q: {question} A: {choice}"`` of every choice, grouped by question, in their order.

    Rows are {"question", "choices" (or "answers"), "labels"} or {"text", "label", and "group" if there is one}. The
    name of a generated set (``"truth"``) or a CSV file is read by ``headscope.probes.load_labelled``.

    Raises:
        HeadscopeError: see ``read_rows``, ``Labelled`` and ``load_labelled``; a row of neither form, or whose labels
            are not one a choice.
    """
    if isinstance(data, Labelled):
        return data
    if isinstance(data, str | Path) and (not Path(data).exists() or Path(data).suffix == ".csv"):
        return load_labelled(data)
    rows, name = read_rows(data, "answers")
    found: list[tuple[str, Any, str]] = []
    for i, row in enumerate(rows, 1):
        choices = row.get("choices", row.get("answers"))
        if "text" in row and "label" in row:
            found.append((row["text"], row["label"], str(row.get("group", i))))
        elif isinstance(choices, list) and isinstance(row.get("question"), str) and _one_each(row, choices):
            asked = row["question"]
            found += [(f"Q: {asked} A: {c}", x, asked) for c, x in zip(choices, row["labels"], strict=True)]
        else:
            raise HeadscopeError(f"{name}, row {i}: give {FORMS['answers']}, with one label a choice")
    texts, labels, groups = zip(*found, strict=True)
    if not all(isinstance(label, int) and label in (0, 1) for label in labels):
        raise HeadscopeError(f"{name}: labels must be 0 and 1; found {sorted(set(map(str, labels)))[:4]}")
    return Labelled(texts, np.array(labels), groups, Path(name).stem if isinstance(data, str | Path) else "labelled")


def _one_each(row: dict[str, Any], choices: list[Any]) -> bool:
    labels = row.get("labels")
    return isinstance(labels, list) and len(labels) == len(choices) and all(isinstance(c, str) for c in choices)


def responses(
    lm: LanguageModel, data: str | Path | Sequence[Any], loss: str, *, end: bool, longest: int
) -> list[tuple[Tokens, ...]]:
    """Tokens of prompts and responses: one (prompt, response) a row for ``loss="sft"``, the chosen one's and the
    rejected one's for ``"dpo"``. A response is joined to its prompt as it stands: begin it with a space where one
    belongs.

    Args:
        end: the tokenizer's end-of-text token closes every response, where it has one.
        longest: tokens of a prompt and its response.

    Raises:
        HeadscopeError: see ``read_rows``; a row without its strings, without tokens, or too long.
    """
    rows, name = read_rows(data, loss)
    start = start_tokens(lm)
    stop = [lm.tokenizer.eos_token_id] if end and lm.tokenizer.eos_token_id is not None else []
    found = []
    for i, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in KEYS[loss]):
            raise HeadscopeError(f"{name}, row {i}: give strings {FORMS[loss]}, none empty, for the loss {loss!r}")
        prompt, *written = ([*body_tokens(lm, row[key])] for key in KEYS[loss])
        most = len(start) + len(prompt) + max(map(len, written)) + len(stop)
        if most > longest or not prompt or not all(written):
            raise HeadscopeError(
                f"{name}, row {i}: {most} tokens; a row has some in each part and at most longest={longest} together"
            )
        check_length(lm, most)
        found.append(tuple(([*start, *prompt], [*y, *stop]) for y in written))
    return found
