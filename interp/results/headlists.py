"""Head lists of other people's releases, read and written in the form in which they publish them.

- Retrieval_Head (Wu et al. 2024, arXiv 2404.15574; ``head_score/MODEL.json``): one JSON object on one line,
  ``{"LAYER-HEAD": [score of every kept trial]}``, query heads.
- DuoAttention (Xiao et al. 2024, arXiv 2410.10819; ``attn_patterns/MODEL/SETTING``): ``full_attention_heads.tsv``, one
  line a layer, one tab-separated gate a **key/value** head, as numpy.savetxt writes it, and ``config.json`` with
  ``sink_size`` and ``recent_size``.
- MInference: ``headscope.interp.results.minference``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import write_atomically

GATES, CONFIG = "full_attention_heads.tsv", "config.json"
_NAME = re.compile(r"(\d+)-(\d+)")


def from_retrieval_head(path: str | Path) -> HeadScores:
    """Retrieval scores of a file of Retrieval_Head: trials in its order; NaN where a head has fewer than others.

    Raises:
        HeadscopeError: no such file, or another form.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8").split("\n")[0])
        found = {_pair(name): [float(x) for x in scores] for name, scores in held.items()}
        layers, heads = (1 + max(pair[side] for pair in found) for side in (0, 1))
        trials = np.full((max(map(len, found.values())), layers, heads), np.nan)
    except (OSError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise HeadscopeError(
            f"{path} is no head list of Retrieval_Head ({type(error).__name__}: {error}); give a file such as its "
            'head_score/MODEL.json, {"LAYER-HEAD": [scores]}'
        ) from error
    for (layer, head), scores in found.items():
        trials[: len(scores), layer, head] = scores
    made = {"file": Path(path).name, "unit": "share of the answer copied", "source": "arXiv 2404.15574"}
    return HeadScores("retrieval", trials, made)


def is_retrieval_head(path: str | Path) -> bool:
    """Whether a file's first line is an object whose first key is LAYER-HEAD; nothing else of it is looked at."""
    try:
        with open(path, encoding="utf-8") as file:
            return re.match(r'\s*\{\s*"\d+-\d+"\s*:\s*\[', file.read(64)) is not None
    except (OSError, ValueError):
        return False


def to_retrieval_head(scores: HeadScores, path: str | Path) -> Path:
    """Write scores as Retrieval_Head's scripts read them, every trial of every head; NaN is left out.

    Its masking experiment sorts heads by the mean over their list, which is what ``scores.mean`` is.

    Raises:
        HeadscopeError: a head without any trial (their scripts would average an empty list).
    """
    layers, heads = scores.layers, scores.heads
    lists = {f"{i}-{h}": scores.trials[:, i, h] for i in range(layers) for h in range(heads)}
    kept = {name: values[~np.isnan(values)].tolist() for name, values in lists.items()}
    empty = [name for name, values in kept.items() if not values]
    if empty:
        raise HeadscopeError(f"head {empty[0]} has no trial, and Retrieval_Head's lists have some for every head")
    write_atomically(path, (json.dumps(kept) + "\n").encode())
    return Path(path)


def from_duo_attention(folder: str | Path, *, group: int = 1) -> HeadScores:
    """Gates of a folder of DuoAttention as one trial of scores, cut to [0, 1] as its loader does.

    A gate belongs to a key/value head. ``group`` query heads share one (``lm.info.heads // lm.info.kv_heads``): with it
    every query head has its gate, which edits of heads need; 1 leaves key/value heads. ``provenance["config"]`` is
    config.json. Their inference keeps full attention where a gate exceeds 0.5: ``scores.above(0.5)``.

    Raises:
        HeadscopeError: no such folder, or other files.
    """
    folder = Path(folder)
    try:
        gates = np.loadtxt(folder / GATES, dtype=np.float64, delimiter="\t", ndmin=2)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        sizes = {"sink_size": int(config["sink_size"]), "recent_size": int(config["recent_size"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadscopeError(
            f"{folder} is no folder of DuoAttention ({type(error).__name__}: {error}); it holds {GATES} and {CONFIG} "
            "with sink_size and recent_size"
        ) from error
    if not np.isfinite(gates).all() or group < 1:
        raise HeadscopeError(f"{folder}: gates are numbers, and group is at least 1, not {group}")
    made: dict[str, Any] = {"unit": "gate", "range": (0.0, 1.0), "source": "arXiv 2410.10819"}
    made |= {"parameters": {"group": group, **sizes}, "config": config}
    return HeadScores("duo_attention", np.clip(gates, 0, 1).repeat(group, axis=1)[None], made)


def to_duo_attention(
    scores: HeadScores, folder: str | Path, *, sink_size: int, recent_size: int, group: int = 1, **config: Any
) -> Path:
    """Write scores (their means) as the gates of a folder of DuoAttention; further keywords go to config.json.

    ``group`` query heads share a key/value head. [OURS] They must agree: nothing published says how to pool scores of
    query heads into one gate, so choose (a mean, a maximum) before.

    Raises:
        HeadscopeError: query heads of one group that differ, a number of heads that ``group`` does not divide, or a
            head without a score.
    """
    gates: NDArray[np.float64] = scores.mean
    if gates.shape[1] % group or np.isnan(gates).any():
        raise HeadscopeError(f"{gates.shape[1]} heads a layer, all with a score, are needed in groups of {group}")
    grouped = gates.reshape(gates.shape[0], -1, group)
    if (grouped != grouped[..., :1]).any():
        raise HeadscopeError(
            f"query heads of one key/value head have different scores (groups of {group}), but DuoAttention has one "
            "gate for them: pool them first, e.g. by their maximum"
        )
    text = io.StringIO()
    np.savetxt(text, grouped[..., 0], delimiter="\t")
    folder = Path(folder)
    write_atomically(folder / GATES, text.getvalue().encode())
    held: Mapping[str, Any] = {**config, "sink_size": sink_size, "recent_size": recent_size}
    write_atomically(folder / CONFIG, json.dumps(held).encode())
    return folder


def _pair(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not LAYER-HEAD")
    return int(found[1]), int(found[2])
