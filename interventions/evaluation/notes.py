"""What an edit says of itself while it is evaluated, kept with the trial: that it changed nothing, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headscope.interventions.base import Intervention


@contextmanager
def noted() -> Iterator[list[str]]:
    """A list that holds, after the block, what edits warned of in it; other warnings are given again."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    for one in caught:
        if "changed nothing in this block" in str(one.message):
            said.append(str(one.message).replace(" in this block", ""))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def unseen(task: Any, edit: Intervention) -> str:
    """Why an edit changes nothing of what a task scores, where the task can tell from the edit's phase."""
    ask = getattr(task, "unseen", None)
    return "" if ask is None else str(ask(getattr(edit, "during", "always")))
