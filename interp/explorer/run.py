"""One run of a model on one text: its tokens, what the tracer recorded, and the queries and keys of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer.kept import Capture, KeptLayer, example_of
from headscope.interp.explorer.tiles import Tiles
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.prompts.look import Look, extended, look
from headscope.interp.prompts.tokens import check_length
from headscope.interp.prompts.vision_data import VisionItem
from headscope.interp.registry import check_counts
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, SpanMass
from headscope.interp.statistics.declared import Named, declared
from headscope.interp.statistics.spans import OPEN, Span, by_example, published_spans
from headscope.interp.tracing.recording import trace

Prompt = str | Sequence[int] | Tensor | VisionItem


@dataclass(eq=False)
class Run:
    """What the explorer shows of one pass over one text.

    Attributes:
        name: shown where two runs stand side by side.
        tokens: as text, one a token.
        layers: by index, one example each.
        records: of the tracer, one for every kind of layers; empty: nothing was recorded.
        spans: named tokens, each a list of (first, stop).
        prompt_length: tokens before the generated answer; None: nothing was generated.
        pictures: bytes (height, width, 3) of a vision-language prompt; ``grids`` say where their tokens lie.
        facts: provenance.
    """

    name: str
    tokens: list[str]
    layers: dict[int, KeptLayer]
    records: list[xr.Dataset] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    prompt_length: int | None = None
    pictures: list[NDArray[Any]] = field(default_factory=list)
    grids: list[ImageGrid] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.tokens)
        wrong = [layer for layer, kept in self.layers.items() if {kept.queries, kept.keys} != {count}]
        if not self.layers:
            raise HeadscopeError("no layer was kept, so there is nothing to explore: name layers that attend")
        if wrong:
            kept = self.layers[wrong[0]]
            raise HeadscopeError(
                f"layer {wrong[0]} attends from {kept.queries} to {kept.keys} tokens and the text has {count}: the "
                "explorer shows self-attention over one whole text; leave the layer out with layers=..."
            )

    @cached_property
    def tiles(self) -> Tiles:
        """Tiles of its heads' patterns."""
        return Tiles(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys and lse that are held."""
        return sum(kept.nbytes for kept in self.layers.values())

    def layer(self, layer: int, head: int = 0) -> KeptLayer:
        """One layer. Raises HeadscopeError where it was not kept, or has no such head."""
        if layer not in self.layers or not 0 <= head < self.layers[layer].heads:
            raise HeadscopeError(f"{self.name} holds no head L{layer}H{head}")
        return self.layers[layer]


def record_run(
    lm: Loadable,
    prompt: Prompt,
    *,
    name: str | None = None,
    spans: Mapping[str, Any] | None = None,
    statistics: Named | Iterable[Named] | None = None,
    generate: int = 0,
    layers: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Run:
    """Read a prompt once and keep what the explorer needs; inside ``apply`` the run is the edited model's.

    Memory: the queries and keys of every layer, ``layers * (heads + kv_heads) * tokens * d_head`` numbers of the
    model's precision (SmolLM2-135M in float32: 92 kB a token, 1.5 GB at 16,384), beside the statistics, of which each
    takes ``layers * heads * tokens`` float32. No map is made.

    Args:
        lm: load_model's result, or what it takes.
        prompt: text, token ids, or a chat with pictures (``prompts.vision_data.ask``).
        name: of the run; by default the model's.
        spans: tokens to mark by name, as ``SpanMass`` takes them, each also a statistic; a picture's are known.
        statistics: beside entropy, sink mass, distance and key mass.
        generate: tokens that the model adds greedily. The whole is then read again in one pass, in which every row sees
            what it saw when its token was chosen [OURS]; edits are told where the answer begins.
        layers: keep these alone.
        device: where queries and keys are kept; None: where they are computed ("cpu" frees the card).

    Raises:
        HeadscopeError: ``generate`` is no count, a prompt without tokens or longer than the context, layers that do not
            attend, spans beyond the text, or layers that do not attend over the text itself.
    """
    check_counts(0, generate=generate)
    lm = load_model(lm)
    read = _Reading.of(lm, prompt)
    if generate:
        read.generate(generate)
    ids = read.inputs["input_ids"][0].tolist()
    named = {**read.spans, **{key: by_example(span)[0] for key, span in (spans or {}).items()}}
    named = {key: [(a, min(b, len(ids))) for a, b in span if a < len(ids)] for key, span in named.items()}
    if empty := [key for key, span in named.items() if key in (spans or {}) and not span]:
        raise HeadscopeError(f"the span {empty[0]!r} lies beyond the text, which has {len(ids)} tokens")
    named = {key: span for key, span in named.items() if span}
    asked = [Entropy(), SinkMass(), Distance(), KeyMass()]
    asked += [SpanMass({key: [span] for key, span in named.items()})] if named else []
    known = {name for each in asked for name in each.recorded}
    more = declared(statistics) if statistics is not None else ()
    asked += [one for one in more if not known & set(one.recorded)]
    capture = Capture(device)
    with (
        read.published(),
        trace(lm, [*asked, LogSumExp()], layers=layers) as tracer,
        attached(lm, capture, layers=layers),
    ):
        lm.forward(read.inputs["input_ids"], logits=1, **read.rest)
    records = tracer.records
    lse = {
        int(layer): torch.from_numpy(record["logsumexp"].isel(example=0).sel(layer=layer).to_numpy())
        for record in records
        for layer in record["layer"].to_numpy()
    }
    kept = {layer: KeptLayer(example_of(call, 0), lse[layer]) for layer, call in sorted(capture.calls.items())}
    shown = [record.drop_vars("logsumexp") for record in records]
    return Run(
        name or lm.name,
        token_texts(lm, ids),
        kept,
        shown,
        named,
        read.prompt_length,
        read.look.pictures if read.look else [],
        read.look.grids if read.look else [],
        provenance(lm, tokens=len(ids), generate=generate),
    )


def token_texts(lm: LanguageModel, ids: Sequence[int]) -> list[str]:
    """Each token as readable text; pieces of a character as the tokenizer spells them; ids without a tokenizer."""
    if lm.tokenizer is None:
        return [str(i) for i in ids]
    different = sorted(set(ids))
    texts = lm.tokenizer.batch_decode([[i] for i in different], clean_up_tokenization_spaces=False)
    pieces = lm.tokenizer.convert_ids_to_tokens(different)
    by_id = {
        i: str(piece) if "\ufffd" in text or not text else text
        for i, text, piece in zip(different, texts, pieces, strict=True)
    }
    return [by_id[i] for i in ids]


@dataclass(eq=False)
class _Reading:
    """A prompt as the model's inputs, a batch of one."""

    lm: LanguageModel
    inputs: dict[str, Any]
    spans: dict[str, list[Span]] = field(default_factory=dict)
    look: Look | None = None
    prompt_length: int | None = None

    @classmethod
    def of(cls, lm: LanguageModel, prompt: Prompt) -> _Reading:
        if getattr(lm.inner.config, "is_encoder_decoder", False):
            raise HeadscopeError(
                f"{lm.name} reads two sequences, and the explorer shows one: record statistics with trace(tower=...)"
            )
        if isinstance(prompt, VisionItem):
            one = look(lm, prompt)
            own = {key: rows[0] for key, rows in one.prompt.spans.items() if rows[0] and not key.endswith("_0")}
            return cls(lm, dict(one.prompt.inputs), {k: [(a, min(b, OPEN)) for a, b in v] for k, v in own.items()}, one)
        if isinstance(prompt, str):
            return cls(lm, {"input_ids": lm.encode(prompt)["input_ids"]})
        ids = torch.as_tensor(prompt, dtype=torch.long).reshape(-1)
        check_length(lm, ids.numel())
        return cls(lm, {"input_ids": ids[None].to(lm.device)})

    @property
    def rest(self) -> dict[str, Any]:
        return {key: x for key, x in self.inputs.items() if key not in ("input_ids", "attention_mask")}

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block edits may ask for the prompt's end, and for its spans by name."""
        with ExitStack() as stack:
            if self.prompt_length is not None:
                stack.enter_context(prompt_boundary(self.prompt_length))
            if self.spans:
                stack.enter_context(published_spans({key: [rows] for key, rows in self.spans.items()}))
            yield

    def generate(self, count: int) -> None:
        """Add what the model says next."""
        ids = self.inputs["input_ids"]
        self.prompt_length = ids.shape[1]
        check_length(self.lm, ids.shape[1] + count)
        options = {"max_new_tokens": count, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        pad = getattr(self.lm.tokenizer, "pad_token_id", None)
        inputs = {"attention_mask": torch.ones_like(ids), **self.inputs}
        with torch.no_grad(), self.published():
            made = self.lm.model.generate(**inputs, **options, pad_token_id=pad)
        self.inputs = extended(self.inputs, made[0, self.prompt_length :].tolist())
