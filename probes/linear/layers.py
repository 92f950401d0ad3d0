"""Layer-wise probes: from which layer on the stream says a label, at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.layout import output_of, stream_layers
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.probes.linear.dataset import Labelled, load_labelled
from headscope.probes.linear.fitting import Settings, fit_heads, shuffle_labels, split, surface_baselines

Place = Literal["resid_post", "post_attention_norm"]


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """Accuracy of a linear probe behind every layer.

    Attributes:
        correct: (held-out example, layer) whether the probe was right, all splits after one another.
        control: the same of probes fitted to shuffled labels.
        groups: (held-out example,) which are not independent.
        baselines: mean accuracy of words and of characters of the text on the same splits.
    """

    correct: NDArray[np.bool_]
    control: NDArray[np.bool_]
    groups: NDArray[np.int64]
    baselines: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A row a layer: ``layer`` (from 0), ``depth`` (layers passed, as a share), ``accuracy`` with its 95 %
        bootstrap interval over groups, ``control``."""
        low, high = bootstrap_mean(self.correct.astype(np.float64), self.groups)
        layers = self.correct.shape[1]
        return pd.DataFrame(
            {
                "layer": range(layers),
                "depth": (1 + np.arange(layers)) / layers,
                "accuracy": self.correct.mean(0),
                "ci_low": low,
                "ci_high": high,
                "control": self.control.mean(0),
            }
        )

    def tipping_point(self, threshold: float = 0.8) -> int | None:
        """The first layer (from 0) whose accuracy is ``threshold`` or more, None where none is: the tokenization
        compensation point of Bhatia et al. 2025, which counts layers passed (this number and one more)."""
        found = np.flatnonzero(self.correct.mean(0) >= threshold)
        return int(found[0]) if len(found) else None


def probe_layers(
    lm: LanguageModel,
    dataset: Labelled | str = "truth",
    *,
    place: Place = "resid_post",
    seeds: Sequence[int] = (42,),
    validation: float = 0.3,
    max_iter: int = 1000,
    batch_size: int = 16,
    progress: bool = True,
) -> LayerProbe:
    """Fit a logistic regression to the stream behind every layer at a text's last token.

    Bhatia, Peyrard & Zhao 2025, "Date Fragments" (arXiv 2505.16088; linear_probing.py of gagan3012/llm-thought-tracing
    @ eff662f): scikit-learn's, 1,000 iterations, seed 42, 30 % held out. The paper says "hidden-state vector", which is
    ``"resid_post"``; its code hooks what the norm after attention gives to the MLP, ``"post_attention_norm"``. Beside
    them: whole groups are held out, shuffled labels as a control, and what the text's surface reaches [OURS].

    What it does not show: that the model uses what a probe reads; a tipping point moves with the number of examples
    and of dimensions.

    Args:
        dataset: such as ``date_pairs("past")``.
        seeds: a split each.

    Raises:
        HeadscopeError: another place, or layers without a ``post_attention_layernorm`` to read there.
    """
    lm, labelled = load_model(lm), load_labelled(dataset)
    settings = Settings(tuple(int(seed) for seed in seeds), validation, max_iter)
    features = last_streams(lm, labelled.texts, place, batch_size=batch_size, progress=progress)
    splits = [split(labelled, seed, validation) for seed in settings.seeds]
    correct, control = [], []
    for parts, seed in track(list(zip(splits, settings.seeds, strict=True)), "probes", enabled=progress):
        correct.append(fit_heads(features, labelled.labels, parts, settings).correct)
        shuffled = shuffle_labels(labelled, seed)
        right = fit_heads(features, shuffled, parts, settings).correct
        control.append(right)
    rows = np.concatenate([held_out for _, held_out in splits])
    baselines = {name: float(x.mean()) for name, x in surface_baselines(labelled, splits, settings).items()}
    made = provenance(lm, prompts=labelled.texts, place=place, seeds=list(seeds), validation=validation)
    return LayerProbe(np.concatenate(correct), np.concatenate(control), labelled.group_index[rows], baselines, made)


def last_streams(
    lm: LanguageModel, texts: Sequence[str], place: Place, *, batch_size: int = 16, progress: bool = True
) -> NDArray[np.float32]:
    """(text, layer, d_model) at each text's last token.

    Raises:
        HeadscopeError: as ``probe_layers``.
    """
    layers = stream_layers(lm.inner, tower_size(lm).tower)
    modules: list[nn.Module | None] = [
        layer.module if place == "resid_post" else getattr(layer.module, "post_attention_layernorm", None)
        for layer in layers
    ]
    if place not in get_args(Place) or None in modules:
        raise HeadscopeError(f"{lm.name} is read at 'resid_post', or where layers have a post_attention_layernorm")
    options = {"use_cache": False} if takes(lm.inner, "use_cache") else {}
    found = []
    for first in track(range(0, len(texts), batch_size), "streams", enabled=progress):
        some = list(texts[first : first + batch_size])
        ends = lm.encode(some)["attention_mask"].sum(1) - 1
        held: list[Tensor] = []

        def keep(_: Any, args: Any, output: Any, ends: Tensor = ends, held: list[Tensor] = held) -> None:
            x = output_of(output)
            assert x is not None
            held.append(x[torch.arange(len(x)), ends.to(x.device)].detach().float().cpu())

        with ExitStack() as stack, torch.no_grad():
            for module in modules:
                assert module is not None
                stack.callback(module.register_forward_hook(keep).remove)
            lm(some, **options)
        found.append(torch.stack(held, 1))
    return torch.cat(found).numpy()
