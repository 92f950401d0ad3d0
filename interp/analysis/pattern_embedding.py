"""What patterns look like, as a few numbers a head: codes of an autoencoder of pooled maps, beside PCA's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from headscope.interp.analysis.autoencoder import train
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.heads.passes import record_of
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.runs.provenance import provenance
from headscope.interp.statistics import BlockMap

SIDE = 14  # blocks a side, at most
BATCH = 8  # texts in one forward pass


@dataclass(frozen=True, eq=False, repr=False)
class PatternEmbedding:
    """What ``embed_patterns`` found.

    ``codes`` (layer, head, code) and ``pca`` (the same) are means over the texts held out. ``error``: the mean squared
    error of a place of the held-out maps, of the autoencoder ("autoencoder"), of principal components of the same
    width ("pca"), and of the mean map of the other texts ("mean map"); ``error_of`` (layer, head) that of the
    autoencoder by head.
    """

    codes: xr.DataArray
    pca: xr.DataArray
    error: dict[str, float]
    error_of: xr.DataArray
    held_out: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, heads, width = self.codes.shape
        share, other = self.unexplained("autoencoder"), self.unexplained("pca")
        return f"PatternEmbedding({layers * heads} heads, width {width}, unexplained {share:.3f}, by PCA {other:.3f})"

    def unexplained(self, how: str) -> float:
        """The held-out error as a share of the mean map's: 0 is perfect, 1 no better than one map for all heads."""
        return self.error[how] / self.error["mean map"]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: layer, head, code_0 ..., pca_0 ..., error."""
        layers, heads = (np.asarray(index).ravel() for index in np.indices(self.error_of.shape))
        frame = pd.DataFrame({"layer": self.codes["layer"].to_numpy()[layers], "head": heads})
        for name, values in (("code", self.codes), ("pca", self.pca)):
            own = values.to_numpy().reshape(len(frame), -1)  # merges layer and head
            frame = frame.assign(**{f"{name}_{i}": own[:, i] for i in range(own.shape[1])})
        return frame.assign(error=self.error_of.to_numpy().ravel())


def pooled_maps(
    lm: LanguageModel, texts: Text | None = None, *, length: int = 112, samples: int = 12, side: int = SIDE
) -> xr.DataArray:
    """Every head's pattern of each text, pooled to ``side`` x ``side`` blocks (``BlockMap``, means over rows):
    (example, layer, head, query_block, key_block). Blocks that no query sees hold 0; no map at full length is made.

    Args:
        texts: several, of which the beginnings are read, or one, in consecutive windows; by default bundled prose.
        length: tokens of each; ``side`` divides it.
        samples: at most so many.
        side: 4 to 14.

    Raises:
        HeadscopeError: texts that cannot be read, or a length that ``side`` does not divide.
    """
    if not 4 <= side <= SIDE or length % side or length < side:
        raise HeadscopeError(f"length={length}, side={side}: make maps of 4 to {SIDE} blocks a side that divide length")
    if isinstance(texts, str):
        found = sequences.text_samples(lm, texts, length, samples)
    else:
        found = sequences.first_windows(lm, texts, length, samples)
    groups = [found[first : first + BATCH] for first in range(0, len(found), BATCH)]
    parts = [record_of(lm, group, [BlockMap(length // side)])["block_map"] for group in groups]
    dims = ("example", "layer", "head", "query_block", "key_block")
    values = np.concatenate([part.transpose(*dims).to_numpy() for part in parts])
    return xr.DataArray(values, {"layer": parts[0]["layer"].to_numpy()}, dims, name="block_map")


def embed_patterns(
    maps: xr.DataArray, *, width: int = 4, steps: int = 600, seed: int = 0, made: dict[str, Any] | None = None
) -> PatternEmbedding:
    """A code of ``width`` numbers for every head's pattern, by a convolutional autoencoder of pooled maps.

    After Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (arXiv
    2303.13731), who lay out the codes of heads' maps to see which patterns there are. Neither their code nor their
    sizes are public: the network (two convolutions of stride 2 each way, 8 and 16 channels), Adam, the split and the
    comparison are [OURS]. It is trained on the maps of half of the examples, one map a head, and what is reported is of
    the other half: codes, and the error beside that of principal components of the same width, fitted to the same
    maps. Where the components do as well, take them: they need no seed.

    What it does not show: what a code means (its axes turn with the seed: compare distances), or anything finer than a
    block. A text model's causal maps lie below the diagonal, so that part of every map is alike.

    Args:
        maps: (example, layer, head, query_block, key_block) of at most 14 blocks a side, as ``pooled_maps`` makes them,
            or a record's ``block_map`` (of a vision tower, say).
        width: numbers of a code.
        steps: updates of 128 maps.
        seed: of the weights, the batches and the split.
        made: provenance to keep.

    Raises:
        HeadscopeError: fewer than two examples, other dimensions, larger maps, or maps with NaN (texts of unequal
            length).
    """
    values = _checked(maps, width, steps)
    examples, layers, heads, side = values.shape[:4]
    order = np.random.default_rng(seed).permutation(examples)
    held_out, kept = np.sort(order[: examples // 2]), order[examples // 2 :]
    known, new = (values[chosen].reshape(-1, side, side) for chosen in (kept, held_out))  # merges text, layer and head
    scale = float(known.std()) or 1.0  # the network sees maps of unit variance, whatever the length
    centre = known.mean(axis=0)
    model = train(torch.from_numpy((known - centre) / scale).float(), width, steps, seed)
    seen = torch.from_numpy((new - centre) / scale).float()
    coded = model.encode(seen)
    drawn = model.decode(coded).double().numpy() * scale + centre
    components = PCA(width, svd_solver="full").fit(known.reshape(len(known), -1))
    flat = components.transform(new.reshape(len(new), -1))
    error = (drawn - new) ** 2
    errors = {
        "autoencoder": float(error.mean()),
        "pca": float(((components.inverse_transform(flat).reshape(new.shape) - new) ** 2).mean()),
        "mean map": float(((centre - new) ** 2).mean()),
    }
    coordinates = {"layer": maps["layer"].to_numpy()}

    def by_head(rows: NDArray[Any], *more: str) -> xr.DataArray:
        mean = rows.reshape(len(held_out), layers, heads, -1).mean(axis=0)
        return xr.DataArray(mean if more else mean[..., 0], coordinates, ("layer", "head", *more))

    of_head = by_head(error.mean(axis=(1, 2)))
    codes, pca = by_head(coded.double().numpy(), "code"), by_head(flat, "code")
    held = made if made is not None else provenance(seed=seed, width=width, steps=steps, examples=examples, side=side)
    return PatternEmbedding(codes, pca, errors, of_head, tuple(held_out.tolist()), held)


def _checked(maps: xr.DataArray, width: int, steps: int) -> NDArray[np.float64]:
    dims = ("example", "layer", "head", "query_block", "key_block")
    if set(maps.dims) != set(dims):
        raise HeadscopeError(f"maps have the dimensions {', '.join(dims)}, not {', '.join(map(str, maps.dims))}")
    values = np.asarray(maps.transpose(*dims).to_numpy(), dtype=np.float64)
    rows, columns = values.shape[3:]
    if rows != columns or not 4 <= rows <= SIDE:
        raise HeadscopeError(
            f"maps of {rows} x {columns} blocks: pool them to 4 to {SIDE} a side, BlockMap(length // 14)"
        )
    if not np.isfinite(values).all():
        raise HeadscopeError(
            "some blocks are not a number: give maps of texts of one length, or cut them to the shortest"
        )
    if len(values) < 2:
        raise HeadscopeError("one example leaves none to hold out: give the maps of at least two")
    if not 1 <= width <= min(rows * columns, values[: len(values) - len(values) // 2, ..., 0, 0].size) or steps < 1:
        raise HeadscopeError(f"width={width}, steps={steps}: both are at least 1, and a code is smaller than a map")
    return values
