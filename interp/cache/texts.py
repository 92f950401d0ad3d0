"""LADM: how far back the parts of a text look, as a model reads it, and so what a short cache would cost that text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_numbers
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sweeps.batches import Prompts
from headscope.kernels.request import Columns, Reduced, Request

FEWEST = 4  # earlier spans that a span must have, as in the authors' loop


@dataclass(frozen=True, kw_only=True)
class LADM:
    """How spans and their distances become a text's score (Chen et al. 2025, arXiv 2503.02502; ZNLP/LADM @ 853d7c1).

    A span is ``chunk`` queries from ``start`` on. Their softmax over the keys before ``start`` alone, summed over the
    queries and averaged over the layer's heads, is w. With I = chunk * d_afs, for m = 1, 2, ... while start - m I >=
    keep, and for a text of T tokens:

        PFS_m = sum of w over the ``chunk`` keys from start - m I on
        AFS   = start / T * std_m(PFS) * sum_m (m I / T) PFS_m        (std divides by n - 1)
        CDS   = mean of AFS over the starts T - chunk, T - chunk - d_cds * chunk, ... > keep + 4 I, then over layers

    This is the authors' code; the paper writes sums over all spans and weighs by their numbers. Scores depend on T:
    compare texts of one length (the authors' have 32,768 tokens, read in float16 by a TinyLlama trained for them). In a
    layer with a sliding window a query that sees no key before ``start`` adds nothing [OURS]. What it does not show:
    that the far keys are needed. Sinks among the first ``keep`` tokens are left out, later ones are not.

    Args:
        chunk: tokens of a span.
        d_afs: earlier spans are so many spans apart.
        d_cds: scored spans are so many spans apart.
        keep: first tokens that are in no earlier span.
        spread: multiply by the standard deviation (False: the authors' "no_std").
        length_weight: multiply by start / T and m I / T (False: "no_len_weight"; that both fall away is [OURS], the
            code was not at hand).
    """

    chunk: int = 128
    d_afs: int = 4
    d_cds: int = 4
    keep: int = 128
    spread: bool = True
    length_weight: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, "ladm")
        if min(self.chunk, self.d_afs, self.d_cds) < 1 or self.keep < 0:
            raise HeadscopeError("LADM: chunk, d_afs and d_cds are whole numbers from 1 on, and keep from 0")

    @property
    def interval(self) -> int:
        """Tokens between earlier spans."""
        return self.chunk * self.d_afs

    @property
    def shortest(self) -> int:
        """Tokens that a text must have at least."""
        return self.keep + FEWEST * self.interval + self.chunk + 1

    def starts(self, tokens: int) -> list[int]:
        """Where the scored spans of a text begin, the last one first."""
        return list(range(tokens - self.chunk, self.keep + FEWEST * self.interval, -self.chunk * self.d_cds))

    def earlier(self, start: int) -> list[int]:
        """Where the earlier spans of a span begin, the nearest first."""
        return list(range(start - self.interval, self.keep - 1, -self.interval))

    def focus(self, pfs: Tensor, start: int, tokens: int) -> Tensor:
        """AFS of a span from its ``pfs`` (m,)."""
        far = torch.arange(1, pfs.shape[0] + 1, dtype=pfs.dtype, device=pfs.device) * self.interval / tokens
        found = (far * pfs).sum() * start / tokens if self.length_weight else pfs.sum()
        return found * pfs.std() if self.spread else found


def long_context_scores(
    lm: Loadable,
    texts: Any,
    settings: LADM | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Contextual dependency scores (CDS) of texts, the highest first: which of them need what is far back.

    A row a text: ``text`` (its number), ``tokens``, ``spans`` (that were scored), ``pfs`` (the mean over layers, spans
    and earlier spans: mass of a span's queries on one of those), ``cds``. No query x key tensor is made: a span's pass
    holds one number a key.

    Args:
        lm: load_model's result, or what load_model takes.
        texts: texts or sequences of token ids, best of one length (see ``LADM``).
        out: folder for the journal that makes a killed run resume.

    Raises:
        HeadscopeError: no text, one shorter than ``LADM.shortest``, or a model that cannot be traced exactly.
    """
    out, lm, asked = folder_of(out), load_model(lm), _settings(settings)
    given = Prompts(lm, texts)
    _long_enough(given, asked)
    files = [] if out is None else ["ladm.trials.jsonl"]
    announce(((n, 0) for n in given.lengths), files)
    made = provenance(lm)

    def step(index: int) -> dict[str, Any]:
        found = _read(lm, given.batch([index])["input_ids"], asked)
        return {
            "tokens": given.lengths[index],
            "spans": found.sizes["span"],
            "pfs": float(found["pfs"].mean()),
            "cds": float(found["cds"].mean()),
        }

    path = None if out is None else out / files[0]
    config = {"model": made.get("model"), "ladm": vars(asked), "texts_sha256": given.sha256}
    with opened(path, config) as journal:
        rows = run_steps(journal, len(given), step, "texts", progress=progress)
    table = pd.DataFrame({"text": range(len(rows)), **{key: [row[key] for row in rows] for key in rows[0]}})
    return table.sort_values("cds", ascending=False, kind="stable").reset_index(drop=True)


def long_context_spans(lm: Loadable, text: str | Sequence[int], settings: LADM | None = None) -> xr.Dataset:
    """The parts of one text's score: ``pfs`` (layer, span, distance), ``afs`` (layer, span), ``cds`` (layer,).

    ``span`` is where a span begins and ``distance`` how many tokens before it an earlier one does; NaN where the text
    begins sooner. The text's score is the mean of ``cds``.

    Raises:
        HeadscopeError: as ``long_context_scores``.
    """
    lm, asked = load_model(lm), _settings(settings)
    given = Prompts(lm, [text])
    _long_enough(given, asked)
    return _read(lm, given.batch([0])["input_ids"], asked)


def _settings(given: LADM | None) -> LADM:
    if given is not None and not isinstance(given, LADM):
        raise HeadscopeError(f"settings of LADM are LADM(chunk=128), not {given!r:.60}")
    return given or LADM()


def _long_enough(given: Prompts, asked: LADM) -> None:
    if min(given.lengths) < asked.shortest:
        raise HeadscopeError(
            f"a text has {min(given.lengths)} tokens, and LADM needs {asked.shortest} with spans of {asked.chunk} "
            f"tokens, {asked.d_afs} apart: give longer texts or a smaller chunk"
        )


def _read(lm: LanguageModel, ids: Tensor, asked: LADM) -> xr.Dataset:
    """One pass over a text (1, token)."""
    handler = _Spans(asked, ids.shape[1])
    with attached(lm, handler), torch.no_grad():
        lm.forward(ids, logits=1)
    layers = sorted(handler.pfs)
    if not layers:
        raise HeadscopeError(f"no layer of {lm.name} attends, so no text has far dependencies in it")
    pfs = torch.stack([handler.pfs[layer] for layer in layers])
    afs = torch.stack([handler.afs[layer] for layer in layers])
    distances = [asked.interval * m for m in range(1, pfs.shape[-1] + 1)]
    return xr.Dataset(
        {
            "pfs": (("layer", "span", "distance"), pfs.cpu().numpy()),
            "afs": (("layer", "span"), afs.cpu().numpy()),
            "cds": ("layer", afs.mean(-1).cpu().numpy()),
        },
        {"layer": layers, "span": handler.starts, "distance": distances},
    )


class _Spans(Handler):
    """Scores every span of a text of ``tokens`` tokens, layer by layer."""

    only_reads = True

    def __init__(self, asked: LADM, tokens: int) -> None:
        self.asked, self.tokens, self.starts = asked, tokens, asked.starts(tokens)
        self.pfs: dict[int, Tensor] = {}
        self.afs: dict[int, Tensor] = {}

    def request(self, call: AttentionCall) -> Request:
        if call.cross or call.redistribution is not None or call.position_bias is not None:
            raise HeadscopeError(
                f"layer {call.layer} of {call.module}: LADM reads self-attention by its scores, without a bias of "
                "positions and without mass that an edit moves after softmax; take another tower or model"
            )
        return Request(output=False)

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        most = len(self.asked.earlier(self.starts[0]))
        pfs = torch.full((len(self.starts), most), torch.nan, dtype=torch.float64)
        afs = torch.empty(len(self.starts), dtype=torch.float64)
        for i, start in enumerate(self.starts):
            weights = self._weights(call, start)
            own = torch.stack([weights[first : first + self.asked.chunk].sum() for first in self.asked.earlier(start)])
            pfs[i, : own.shape[0]], afs[i] = own.cpu(), self.asked.focus(own, start, self.tokens).cpu()
        self.pfs[call.layer], self.afs[call.layer] = pfs, afs

    def _weights(self, call: AttentionCall, start: int) -> Tensor:
        """w (key,): what the span's queries put on the keys before it, renormalised over those; float64."""
        stop = start + self.asked.chunk
        bias = None if call.key_bias is None else call.key_bias[..., :start]
        here = call.with_(
            query=call.query[:, :, start:stop],
            key=call.key[:, :, :start],
            value=call.value[:, :, :start],
            mask=replace(call.mask, query_offset=call.mask.query_offset + start),
            key_bias=bias,
        )
        sums = here.attend(Request(output=False, columns=(Columns(sum=True),))).columns[0].sum
        assert sums is not None
        return sums[0].double().mean(0)
