"""The sink dimensions of a model and the threshold that parts its sinks from other tokens, found in the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headscope.interp.heads.base import Text
from headscope.interp.heads.passes import record_of
from headscope.interp.heads.sinking.dimension import relative
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.statistics import KeyMass, Resid

SHARE = 0.31  # of sqrt(d_model): what tau = 20 is in LLaVA-1.5-7B
FEW = 20  # at most one of so many tokens is above the threshold
TIMES = 10.0  # attention that tokens above it must receive, over that of the others


@dataclass(frozen=True)
class SinkDimensions:
    """``dimensions`` (none, one or two), and of each layer ``layers`` the threshold ``tau`` of phi = max over them of
    |x_d| / rms(x), and ``times``: the mean attention of tokens above it over that of the others (NaN: no threshold).

    ``usable`` are the layers where tokens above tau are sinks: ``times`` is at least 10. Nothing is found where it is
    empty: leave such a model unedited.
    """

    dimensions: tuple[int, ...]
    layers: tuple[int, ...]
    tau: tuple[float, ...]
    times: tuple[float, ...]

    @property
    def usable(self) -> tuple[int, ...]:
        """Layers whose threshold parts sinks from other tokens."""
        return tuple(layer for layer, times in zip(self.layers, self.times, strict=True) if times >= TIMES)


def sink_dimensions(
    lm: LanguageModel, texts: Text | None = None, *, length: int = 64, samples: int = 20, batch: int = 10
) -> SinkDimensions:
    """Find the sink dimensions of Kang et al. 2025 (arXiv 2503.03321) in a model for which nobody published them.

    The paper names two dimensions for each of its models and one threshold, tau = 20, that no stream of fewer than 400
    dimensions can reach. [OURS]: a dimension counts where its mean |x_d| / rms at the first token exceeds
    0.31 sqrt(d_model) (what 20 is in 4096 dimensions) in at least half of the layers from 2 to L - 2; of more than two,
    the two with the largest mean over those layers stay. Tau of a layer is the middle of the widest gap between
    neighbouring phi of all tokens that lies above their median and has at most 5 % of the tokens above it.

    Args:
        lm: load_model's result.
        texts, length, samples, batch: as of ``heads.sinks``: what is read, and how much of it.
    """
    found = sequences.first_windows(lm, texts, length, samples)
    streams, masses, layers = [], [], None
    for first in range(0, len(found), batch):
        record = record_of(
            lm, found[first : first + batch], [KeyMass("mean"), Resid("resid_pre", tuple(range(length)))]
        )
        layers = record["layer"].to_numpy()
        streams.append(relative(record["resid_pre"].transpose("example", "layer", "position", "d_model").to_numpy()))
        masses.append(record["key_mass_mean"].mean("head").transpose("example", "layer", "key").to_numpy())
    assert layers is not None
    x, mass = np.concatenate(streams), np.concatenate(masses)
    chosen = _dimensions(x[:, :, 0].mean(axis=0), layers, lm.info.layers)
    if not chosen:
        return SinkDimensions((), tuple(layers.tolist()), (np.nan,) * len(layers), (np.nan,) * len(layers))
    phi = x[..., list(chosen)].max(axis=-1).transpose(1, 0, 2).reshape(len(layers), -1)  # every token of every text
    alpha = mass.transpose(1, 0, 2).reshape(len(layers), -1)
    tau = [threshold(one) for one in phi]
    times = [_times(*one) for one in zip(phi, alpha, tau, strict=True)]
    return SinkDimensions(chosen, tuple(layers.tolist()), tuple(tau), tuple(times))


def _dimensions(mean: NDArray[np.float64], layers: NDArray[np.int64], count: int) -> tuple[int, ...]:
    """The dimensions of mean |x_d| / rms (layer, d_model) at the first token."""
    inner = mean[(layers >= 2) & (layers <= count - 2)]
    if not len(inner):
        return ()
    passing = np.flatnonzero((inner > SHARE * np.sqrt(mean.shape[-1])).mean(axis=0) >= 0.5)
    largest = sorted(passing.tolist(), key=lambda d: (-inner[:, d].mean(), d))[:2]
    return tuple(sorted(largest))


def threshold(phi: NDArray[np.float64]) -> float:
    """The middle of the widest gap above the median of ``phi`` (token,), with at most 5 % of the tokens above it."""
    ordered = np.sort(phi)
    first = max(len(ordered) // 2, len(ordered) - len(ordered) // FEW - 1)  # the last token that may be below
    gaps = np.diff(ordered[first:])
    if not len(gaps):
        return float("nan")
    at = first + int(gaps.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def _times(phi: NDArray[np.float64], alpha: NDArray[np.float64], tau: float) -> float:
    above = phi > tau
    return float(alpha[above].mean() / alpha[~above].mean()) if above.any() and not above.all() else float("nan")
