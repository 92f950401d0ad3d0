"""Head ablation: remove what a set of heads writes, four ways that mean different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interventions.head_tables import D_HEAD, TableEdit
from headscope.interventions.outputs.measuring import head_means, head_samples
from headscope.interventions.phases import token_positions
from headscope.interventions.words import listed

How = Literal["zero", "mean", "uniform", "resample"]
HOWS: tuple[str, ...] = get_args(How)


@dataclass(frozen=True, eq=False)
class AblateHeads(TableEdit):
    """Ablate ``heads``: they write nothing, their mean, the mean of their values, or what they wrote elsewhere.

    Wu et al. mask while answering only: ``AblateHeads(heads, how="uniform", during="answer")``.

    Resampling keeps z where the later layers are used to it (means and zeros are values that no input gives) and
    removes what it says of this input. In Chan et al. 2022 (causal scrubbing) and McGrath et al. 2023 z comes from a
    random other prompt, the same for all heads. [OURS]: every row draws one of the bank's tokens, the same for all
    heads and layers, so that what heads wrote together stays together; and it draws by ``seed`` and position, not by
    its place in the batch, so that an example is changed alike alone, padded, in any batch, and from a cache. Average
    over several seeds (``with_settings(seed=1)``). What it does not show: positions are not matched, and one draw is
    one sample; a loss under it holds the variance of z as well as the head's use.

    Args:
        how: ``"zero"``: z = 0, the head writes nothing. Strong: later layers never saw such an input. ``"mean"``: z =
            the head's mean output over a reference text (``means``), which keeps the constant part of what it writes
            and removes what depends on the input. ``"uniform"``: the head's query is zeroed, so that it attends
            uniformly to every key it may see. This is what "masking" a head means in Wu et al. 2024 (arXiv 2404.15574;
            their code zeroes the query): the head still writes the mean of its values, so results are not comparable
            with zero ablation. ``"resample"``: z = the head's output at a random token of other texts (``samples``).
        means: with ``how="mean"``: what ``head_means`` gives, (layer, head, d_head).
        samples: with ``how="resample"``: what ``head_samples`` gives, (layer, head, sample, d_head).
        seed: with ``how="resample"``: of the draw at every position.
        strength: from 0 (the model) to 1 (ablated), on z for zero, mean and resample, on the query for uniform.
    """

    how: How = "zero"
    _: KW_ONLY
    means: Tensor | None = None
    samples: Tensor | None = None
    seed: int = 0

    source: ClassVar[str] = (
        "arXiv 1905.10650 (zero), 2211.00593 (mean), 2404.15574 (uniform), Chan et al. 2022 and 2307.15771 (resample)"
    )
    unit: ClassVar[str] = "share of z removed"
    refused: ClassVar[dict[str, str]] = {
        "position bias": "how='uniform': a zeroed query would still follow the bias",
        "cross-attention": "how='resample': it draws by position",
    }
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"means": (D_HEAD,), "samples": ("sample", D_HEAD)}
    made_with: ClassVar[Mapping[str, str]] = {"means": "head_means", "samples": "head_samples"}

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise HeadscopeError(f"AblateHeads: how must be {listed(HOWS)}, not {self.how!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise HeadscopeError(f"AblateHeads: seed must be a whole number from 0 up, not {self.seed!r}")
        super().__post_init__()
        for how, name, what in (("mean", "means", "mean outputs"), ("resample", "samples", "outputs on other texts")):
            if self.how == how and getattr(self, name) is None:
                raise HeadscopeError(f"AblateHeads(how={how!r}) needs {name}=head_{name}(lm, texts), the heads' {what}")
            if self.how != how and getattr(self, name) is not None:
                raise HeadscopeError(f"AblateHeads(how={self.how!r}) takes no {name}; {how} ablation is how={how!r}")

    @classmethod
    def measured(cls, model: ModelLike, given: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """For ``how="mean"`` without means, and ``how="resample"`` without samples: those over ``texts``."""
        if given.get("how") == "mean" and "means" not in given:
            return {"means": head_means(model, texts)}
        if given.get("how") == "resample" and "samples" not in given:
            return {"samples": head_samples(model, texts)}
        return {}

    def change(self, call: AttentionCall, heads: list[int]) -> AttentionCall:
        """Uniform attention: the heads' queries are scaled by 1 - strength."""
        if self.how != "uniform":
            return call
        if call.position_bias is not None:
            raise HeadscopeError(
                "a zeroed query does not attend uniformly in a model that adds a position bias to its scores; "
                "use how='zero' or how='mean'"
            )
        keep = call.either(self.head_rows(call), 1.0 - self.strength, 1.0).to(call.query.dtype)
        return call.with_(query=call.query * keep[..., None])

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor | None:
        """Nothing, the means, or a sample a row."""
        if self.how == "uniform":
            return None
        if self.how == "zero":
            return torch.zeros_like(z)
        if self.how == "mean":
            return self.table("means", call)[None, :, None].expand_as(z)
        samples = self.table("samples", call)  # (chosen head, sample, d_head)
        return samples[:, self._draw(call, samples.shape[1])].transpose(0, 1).expand_as(z)

    def _draw(self, call: AttentionCall, count: int) -> Tensor:
        """The number of each row's sample, (batch or 1, query): made once a pass, whose layers share what positions go
        by (the very tensor that says where each example begins, held here so that its identity stays its own)."""
        kept: dict[Any, Any] = vars(self)["_indices"]
        mask, queries = call.mask, call.query.shape[2]
        key = mask.query_offset, queries, call.query.device, call.gaps, call.cross
        last = kept.get("draw")
        if last is None or last[0] != key or last[1] is not mask.start:
            last = kept["draw"] = key, mask.start, drawn(token_positions(call, "how='resample'"), self.seed, count)
        found: Tensor = last[2]
        return found

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor] | None:
        """0 and the means, or nothing; uniform attention and drawn samples are no such map."""
        if self.how not in ("zero", "mean"):
            return None
        b = torch.zeros(len(self._held[layer]), width) if self.how == "zero" else self.rows_of("means", layer)
        return torch.zeros(len(b), width, width, dtype=torch.float64), b.detach().double()


def drawn(at: Tensor, seed: int, count: int) -> Tensor:
    """For every position a number below ``count``, by position and seed alone and alike on every device: the integer
    hash of Thomas Mueller, whose products stay within 64 bits."""
    low, factor = 0xFFFFFFFF, 0x45D9F3B
    x = (at.long() + (0x9E3779B9 * (seed + 1) & low)) & low
    for _ in range(2):
        x = ((x ^ (x >> 16)) * factor) & low
    return (x ^ (x >> 16)) % count
