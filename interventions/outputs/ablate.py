"""Head ablation: remove what a set of heads writes, three ways that mean different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics import HeadOutput
from headscope.interp.tracing.recording import trace
from headscope.interventions.applying import size
from headscope.interventions.head_edit import HeadEdit

How = Literal["zero", "mean", "uniform"]


@dataclass(frozen=True, eq=False)
class AblateHeads(HeadEdit):
    """Ablate ``heads``: they write nothing, their mean, or the mean of their values.

    Wu et al. mask while answering only: ``AblateHeads(heads, how="uniform", during="answer")``.

    Args:
        how: ``"zero"``: z = 0, the head writes nothing. Strong: later layers never saw such an input. ``"mean"``: z =
            the head's mean output over a reference text (``means``), which keeps the constant part of what it writes
            and removes what depends on the input. ``"uniform"``: the head's query is zeroed, so that it attends
            uniformly to every key it may see. This is what "masking" a head means in Wu et al. 2024 (arXiv 2404.15574;
            their code zeroes the query): the head still writes the mean of its values, so results are not comparable
            with zero ablation.
        means: with ``how="mean"``: what ``head_means`` gives, (layer, head, d_head).
        strength: from 0 (the model) to 1 (ablated), on z for zero and mean, on the query for uniform.
    """

    how: How = "zero"
    _: KW_ONLY
    means: Tensor | None = None

    source: ClassVar[str] = "arXiv 1905.10650 (zero), 2211.00593 (mean), 2404.15574 (uniform)"
    unit: ClassVar[str] = "share of z removed"
    refused: ClassVar[dict[str, str]] = {"position bias": "how='uniform': a zeroed query would still follow the bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in ("zero", "mean", "uniform"):
            raise HeadscopeError(f"AblateHeads: how must be 'zero', 'mean' or 'uniform', not {self.how!r}")
        if self.how == "mean" and self.means is None:
            raise HeadscopeError("AblateHeads(how='mean') needs means=head_means(lm, texts), the heads' mean outputs")
        if self.means is not None and not (isinstance(self.means, Tensor) and bool(self.means.isfinite().all())):
            raise HeadscopeError("AblateHeads: means must be a tensor of finite numbers; make them with head_means")
        if self.how != "mean" and self.means is not None:
            raise HeadscopeError(f"AblateHeads(how={self.how!r}) takes no means; mean ablation is how='mean'")

    @classmethod
    def measured(cls, model: ModelLike, given: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """For ``how="mean"`` without means: those over ``texts``."""
        if given.get("how") == "mean" and "means" not in given:
            return {"means": head_means(model, texts)}
        return {}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError for a head the model lacks, or means of another model."""
        super().check(layers, heads)
        if self.means is not None and (self.means.dim() != 3 or tuple(self.means.shape[:2]) != (layers, heads)):
            raise HeadscopeError(
                f"means have the shape {tuple(self.means.shape)}, the model needs ({layers}, {heads}, d_head); "
                "make them with head_means on this model"
            )

    def change(self, call: AttentionCall, heads: list[int]) -> AttentionCall:
        """Uniform attention: the heads' queries are scaled by 1 - strength."""
        if self.how != "uniform":
            return call
        if call.position_bias is not None:
            raise HeadscopeError(
                "a zeroed query does not attend uniformly in a model that adds a position bias to its scores; "
                "use how='zero' or how='mean'"
            )
        keep = torch.where(self.head_rows(call), 1.0 - self.strength, 1.0).to(call.query.dtype)
        return call.with_(query=call.query * keep[..., None])

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor | None:
        """Nothing, or the means."""
        if self.how == "uniform":
            return None
        if self.means is None:
            return torch.zeros_like(z)
        if self.means.shape[2] != z.shape[3]:
            raise HeadscopeError(
                f"means have {self.means.shape[2]} dimensions a head, layer {call.layer} has {z.shape[3]}; "
                "make them with head_means on this model"
            )
        return self.of_layer(self.means, call, heads)[None, :, None].expand_as(z)


def head_means(model: ModelLike, texts: Sequence[str | Sequence[int]], *, tokenizer: Any = None) -> Tensor:
    """Each head's mean output over every token of ``texts``: float32 (layer, head, d_head), for mean ablation.

    Layers without attention have zeros.

    Args:
        model: load_model's result, or a bare Hugging Face model (with ``tokenizer``, unless texts are token ids).
        texts: strings, or token ids.

    Raises:
        HeadscopeError: no text, or a text for a model without tokenizer.
    """
    if isinstance(texts, str) or not len(texts):
        raise HeadscopeError("head_means needs at least one text to average over, as a list")
    if not all(len(text) for text in texts):
        raise HeadscopeError("head_means was given an empty text; leave it out")
    lm = load_model(model, tokenizer=tokenizer)
    total: Tensor | None = None
    count = 0
    for text in texts:
        ids = lm.encode([text])["input_ids"] if isinstance(text, str) else torch.tensor([list(text)], device=lm.device)
        with trace(lm, [HeadOutput(tuple(range(ids.shape[1])))]) as tracer:
            lm.model(input_ids=ids)
        z = tracer.record["z"].isel(example=0).transpose("layer", "head", "position", "d_head")
        if total is None:
            total = torch.zeros(size(lm)[0], z.sizes["head"], z.sizes["d_head"], dtype=torch.float64)
        total[z["layer"].to_numpy().tolist()] += torch.from_numpy(z.to_numpy().astype("float64")).sum(2)
        count += ids.shape[1]
    assert total is not None
    return (total / count).float()
