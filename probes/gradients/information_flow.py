"""Information flow between spans: how much a token's loss depends on what one span reads of another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics.spans import members
from headscope.kernels.saliency import Saliency
from headscope.probes.gradients.backward import Inputs, backward
from headscope.probes.lenses.targets import Token


@dataclass(frozen=True, eq=False)
class Flow:
    """``by_key`` (layer, key): sum over the reading span's rows of |sum over heads of A * dL/dA|, in nats, of the keys
    ``positions`` (from the prompt's first token); NaN in layers that do not attend."""

    by_key: NDArray[np.float64]
    positions: NDArray[np.int64]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(layer,) the mean over keys."""
        found: NDArray[np.float64] = self.by_key.mean(1)
        return found

    def grid(self, height: int, width: int) -> NDArray[np.float64]:
        """(layer, height, width) for the tokens of one image, row by row.

        Raises:
            HeadscopeError: the span is not so many tokens.
        """
        if height * width != self.by_key.shape[1]:
            raise HeadscopeError(f"{self.by_key.shape[1]} tokens are no grid of {height} x {width}")
        return self.by_key.reshape(-1, height, width)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: layer, position, flow in nats."""
        layer, key = (index.ravel() for index in np.indices(self.by_key.shape))
        frame = pd.DataFrame({"layer": layer, "position": self.positions[key], "flow": self.by_key.ravel()})
        return frame.dropna().reset_index(drop=True)


def information_flow(
    model: Loadable, inputs: Inputs, target: Token | None = None, *, source: Any = "image", into: Any = "instruction"
) -> Flow:
    """How much the loss of ``target`` depends on what the span ``into`` reads of every token of ``source``.

    I_l = |sum_h A_hl * dL/dA_hl| (Wang et al. 2023, "Label Words are Anchors", arXiv 2305.14160, Eq. 1), summed over
    the rows of ``into``, a number for each token of ``source``; as Xing et al. 2024 (CCA, arXiv 2410.15926) show it
    from image tokens into instruction tokens, as a grid. What differs: we know no code of theirs for it, so that heads
    are summed before the absolute value is taken from Wang et al. [OURS]. No map is built (``kernels.saliency``).

    What it does not show: what reaches the answer through other tokens than ``into``.

    Args:
        inputs: one text, or a model's inputs of one example (``VisionPrompt.inputs``).
        target: the token explained after the prompt; None: the most probable one.
        source, into: spans, or names of published ones (``published_spans(prompt.spans)``).

    Raises:
        HeadscopeError: as ``attention_saliency``; a span that holds nothing.
    """
    lm = load_model(model)
    found = backward(lm, inputs, target)
    flows: dict[int, Saliency] = {layer: one.saliency(rows=into) for layer, one in found.layers.items()}
    count = int(found.real.sum())
    at = np.arange(count)
    kept, reads = (members(span, torch.arange(count)[None], 1)[0].numpy() for span in (source, into))
    if not kept.any() or not reads.any():
        raise HeadscopeError(f"source and into must hold tokens of this prompt, which has {count}")
    by_key = np.full((lm.info.layers, int(kept.sum())), np.nan)
    for layer, one in flows.items():
        by_key[layer] = one.flow[0, found.real.to(one.flow.device)].double().cpu().numpy()[kept]
    made = provenance(lm, target=found.target) | {"unit": "nats"}
    return Flow(by_key, at[kept], made)
