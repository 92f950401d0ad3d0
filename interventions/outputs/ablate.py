"""Head ablation: remove what a set of heads writes, three ways that mean different things."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.statistics import HeadOutput
from headscope.interp.tracing.tracer import trace
from headscope.interventions.base import Intervention, size

How = Literal["zero", "mean", "uniform"]
During = Literal["always", "prefill", "decode"]


class AblateHeads(Intervention):
    """Ablate ``heads`` (a HeadSet or (layer, head) pairs).

    ``how``:
        ``"zero"`` (default): z = 0, the head writes nothing. Strong: later layers never saw such an input.
        ``"mean"``: z = the head's mean output over a reference text (``means`` from ``head_means``), which keeps the
        constant part of what it writes and removes what depends on the input.
        ``"uniform"``: the head's query is zeroed, so that it attends uniformly to every key it may see. This is what
        "masking" a head means in Wu et al. 2024 (arXiv 2404.15574; their code zeroes the query): the head still writes
        the mean of its values, so results are not comparable with zero ablation.

    ``strength`` in [0, 1] interpolates between the model (0) and the full ablation (1): on z for zero and mean, on the
    query for uniform. ``during``: ``"prefill"`` is the pass at position 0, ``"decode"`` every pass that continues a
    cache. Wu et al. mask while decoding only: ``AblateHeads(heads, how="uniform", during="decode")``.
    """

    def __init__(
        self,
        heads: HeadSet | Iterable[tuple[int, int]],
        how: How = "zero",
        *,
        strength: float = 1.0,
        during: During = "always",
        means: Tensor | None = None,
    ) -> None:
        if how not in ("zero", "mean", "uniform"):
            raise HeadscopeError(f"AblateHeads: how must be 'zero', 'mean' or 'uniform', not {how!r}")
        if during not in ("always", "prefill", "decode"):
            raise HeadscopeError(f"AblateHeads: during must be 'always', 'prefill' or 'decode', not {during!r}")
        if not 0.0 <= strength <= 1.0:
            raise HeadscopeError(f"AblateHeads: strength must be between 0 and 1, not {strength}")
        if how == "mean" and means is None:
            raise HeadscopeError("AblateHeads(how='mean') needs means=head_means(lm, texts), the heads' mean outputs")
        if how != "mean" and means is not None:
            raise HeadscopeError(f"AblateHeads(how={how!r}) takes no means; mean ablation is how='mean'")
        self.heads: HeadSet = HeadSet.of(heads)
        if not len(self.heads):
            raise HeadscopeError("AblateHeads was given no heads")
        self.how, self.strength, self.during, self.means = how, strength, during, means
        self.name = f"ablate {len(self.heads)} heads ({how})"
        self._layers = self.heads.by_layer()

    def with_heads(self, heads: HeadSet) -> AblateHeads:
        """The same ablation of other heads."""
        return AblateHeads(heads, self.how, strength=self.strength, during=self.during, means=self.means)

    def describe(self) -> dict[str, Any]:
        """Heads, kind, strength, phase, and a digest of the means."""
        digest = None
        if self.means is not None:
            digest = hashlib.sha256(self.means.float().cpu().numpy().tobytes()).hexdigest()
        settings = {"how": self.how, "strength": self.strength, "during": self.during, "means_sha256": digest}
        return {**super().describe(), **settings}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError for a head the model lacks, or means of another model."""
        super().check(layers, heads)
        if self.means is not None and (self.means.dim() != 3 or tuple(self.means.shape[:2]) != (layers, heads)):
            raise HeadscopeError(
                f"means have the shape {tuple(self.means.shape)}, the model needs ({layers}, {heads}, d_head); "
                "make them with head_means on this model"
            )

    def concerns(self, module: str, layer: int) -> bool:
        """The layers that hold a head of the set."""
        return layer in self._layers

    def _heads_of(self, call: AttentionCall) -> list[int]:
        heads = self._layers.get(call.layer, [])
        if not heads or self.during == "always":
            return heads
        if call.cross:
            raise HeadscopeError("cross-attention does not say where decoding stands; ablate with during='always'")
        return heads if (call.mask.query_offset > 0) == (self.during == "decode") else []

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Uniform attention: scale the heads' queries to (1 - strength)."""
        heads = self._heads_of(call) if self.how == "uniform" else []
        if not heads:
            return call
        if call.position_bias is not None:
            raise HeadscopeError(
                "a zeroed query does not attend uniformly in a model that adds a position bias to its scores; "
                "use how='zero' or how='mean'"
            )
        query = call.query.clone()
        query[:, heads] *= 1.0 - self.strength
        return call.with_(query=query)

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Zero and mean ablation: z moves to its replacement by ``strength``."""
        heads = self._heads_of(call) if self.how != "uniform" else []
        if not heads:
            return z
        z = z.clone()
        z[:, heads] *= 1.0 - self.strength
        if self.means is not None:
            if self.means.shape[2] != z.shape[3]:
                raise HeadscopeError(
                    f"means have {self.means.shape[2]} dimensions a head, layer {call.layer} has {z.shape[3]}; "
                    "make them with head_means on this model"
                )
            mean = self.means[call.layer, heads].to(device=z.device, dtype=z.dtype)
            z[:, heads] += self.strength * mean[None, :, None]
        return z


def head_means(model: Any, texts: Sequence[str]) -> Tensor:
    """Each head's mean output over every token of ``texts``: float32 (layer, head, d_head), for mean ablation.

    Layers without attention have zeros.

    Raises:
        HeadscopeError: no text.
    """
    if not texts:
        raise HeadscopeError("head_means needs at least one text to average over")
    total: Tensor | None = None
    count = 0
    for text in texts:
        length = int(model.encode([text])["input_ids"].shape[1])
        with trace(model, [HeadOutput(tuple(range(length)))]) as tracer:
            model([text])
        z = tracer.record["z"].isel(example=0).transpose("layer", "head", "position", "d_head")
        if total is None:
            total = torch.zeros(size(model)[0], z.sizes["head"], z.sizes["d_head"], dtype=torch.float64)
        total[z["layer"].to_numpy().tolist()] += torch.from_numpy(z.to_numpy().astype("float64")).sum(2)
        count += length
    assert total is not None
    return (total / count).float()
