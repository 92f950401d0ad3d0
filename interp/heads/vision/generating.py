"""Attention to pictures while an answer is written: maps of every step, and how the mass falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.look import Look, look
from headscope.interp.prompts.vision_data import VisionData, vision_items
from headscope.interp.results.picture_values import PictureValues, place
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics import SpanMass
from headscope.interp.statistics.queries import Last
from headscope.interp.tracing.generation import response_steps
from headscope.interp.tracing.recording import trace


def generated_maps(
    model: Loadable, one: Look, *, max_new_tokens: int = 32, layers: Sequence[int] | None = None
) -> list[PictureValues]:
    """Each image token's weight in the row that chooses each generated token: (step, layer, head, row, column), one for
    every grid of every picture. Greedy; step 0 is the prompt's last row; ends with the token that ends the answer.
    """
    lm = load_model(model)
    tokens = one.tokens
    each = {str(at): [[(int(at), int(at) + 1)]] for at in tokens}
    record, _ = _generated(lm, one, each, max_new_tokens, layers)
    steps = response_steps(record)["span_mass"].isel(example=0).transpose("step", "layer", "head", "span")
    whole = np.zeros((*steps.shape[:3], int(tokens.max()) + 1))  # (step, layer, head, key)
    whole[..., tokens] = steps.to_numpy()
    coordinates = {dim: steps[dim].to_numpy() for dim in ("step", "layer", "head")}
    return place(one, whole, ("step", "layer", "head"), coordinates, title="Attention while generating")


def generated_attention(
    model: Loadable,
    data: VisionData = None,
    *,
    samples: int = 10,
    max_new_tokens: int = 64,
    spans: Sequence[str] = ("image", "instruction", "response"),
) -> pd.DataFrame:
    """The mass on the picture, the question and the answer so far, as an answer is written greedily: a row a chat,
    step, layer and span, mean of heads. Step t chooses the token t, whose text is ``token``.

    What it does not show: that less mass on the picture means that less of it is known; what was read earlier is
    carried by other tokens. The response's share grows with its length by itself; a falling share of the picture has
    to be held against that (``share`` = mass over that of all named spans).
    """
    lm = load_model(model)
    tables = []
    for example, item in enumerate(vision_items(data, samples)):
        one = look(lm, item)
        if missing := [name for name in spans if name not in one.prompt.spans]:
            raise HeadscopeError(f"this chat has no span {missing[0]!r}: it has {', '.join(one.prompt.spans)}")
        record, ids = _generated(lm, one, {name: one.prompt.spans[name] for name in spans}, max_new_tokens, None)
        frame = attention_steps(record).assign(example=example)
        texts = [lm.required_tokenizer().decode([i]) for i in ids]
        tables.append(frame.assign(token=[texts[step] for step in frame["step"]]))
    found = pd.concat(tables, ignore_index=True)
    total = found.groupby(["example", "step", "layer"])["mass"].transform("sum")
    return found.assign(share=found["mass"] / total)[["example", "step", "token", "layer", "span", "mass", "share"]]


def attention_steps(record: xr.Dataset) -> pd.DataFrame:
    """A record of generation with ``SpanMass`` as a tidy table: example, step, layer, span, mass (mean of heads)."""
    if "span_mass" not in record.data_vars:
        raise HeadscopeError("the record holds no span_mass; trace SpanMass(prompt.spans) around generate")
    mean = response_steps(record)["span_mass"].mean("head")
    frame = mean.rename("mass").to_dataframe().reset_index().dropna(subset="mass")
    return frame[["example", "step", "layer", "span", "mass"]].reset_index(drop=True)


def falls(frame: pd.DataFrame, over: Literal["step", "layer"] = "step", span: str = "image") -> pd.DataFrame:
    """How the mass on a span changes over generated tokens (of every layer) or over layers (of every step).

    ``slope``: of the least-squares line through one example's masses, mass a step or a layer, the mean over examples;
    ``falling``: the share of examples whose slope is below 0; ``first``, ``last``: means of the ends; ``n``: examples
    with at least two points. With fewer than six examples a share says nothing.

    Raises:
        HeadscopeError: the table of ``generated_attention`` or ``attention_steps`` has no such span.
    """
    own = frame[frame["span"] == span]
    if own.empty:
        raise HeadscopeError(f"the table has no span {span!r}: it has {', '.join(sorted(set(frame['span'])))}")
    by = "layer" if over == "step" else "step"
    rows = []
    for at, group in own.groupby(by):
        lines = [one.sort_values(over) for _, one in group.groupby("example") if len(one) > 1]
        slopes = np.array([np.polyfit(one[over], one["mass"], 1)[0] for one in lines])
        if len(slopes):
            ends = {"first": [one["mass"].iloc[0] for one in lines], "last": [one["mass"].iloc[-1] for one in lines]}
            facts = {"slope": slopes.mean(), "falling": (slopes < 0).mean()}
            facts |= {name: np.mean(values) for name, values in ends.items()}
            rows.append({by: at, **{name: float(x) for name, x in facts.items()}, "n": len(slopes)})
    return pd.DataFrame(rows)


def _generated(
    lm: LanguageModel, one: Look, spans: Mapping[str, Any], max_new_tokens: int, layers: Sequence[int] | None
) -> tuple[xr.Dataset, list[int]]:
    """A greedy answer under ``SpanMass`` of the last row of every pass: the record, and the answer's token ids."""
    if max_new_tokens < 1:
        raise HeadscopeError(f"max_new_tokens={max_new_tokens}: generate at least 1")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None}
    options |= {"top_p": None, "top_k": None}
    asked = [SpanMass(dict(spans))]
    with one.prompt.published(), trace(lm, asked, layers=layers, queries=Last(1)) as tracer, torch.no_grad():
        made = lm.model.generate(**one.prompt.inputs, **options)
    ids = made if isinstance(made, torch.Tensor) else made.sequences
    return tracer.record, ids[0, len(one.ids) :].tolist()
