"""How much each head matters: what changes where it writes nothing, at all tokens, at CLS alone, at patches alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.laboratory.vision_transformer.model import Seen, VisionTransformer
from headscope.interp.results.scores import HeadScores
from headscope.interp.sites import attached

PLACES = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}  # of the tokens where a head is pruned
MEASURES = ("drop", "divergence", "distance", "flip", "error")
BATCH = 500  # pictures in one forward pass


class Pruned(Handler):
    """One head writes nothing at some tokens: its z is 0 there."""

    def __init__(self, head: int, tokens: slice) -> None:
        self.head, self.tokens = head, tokens

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        z = z.clone()
        z[:, self.head, self.tokens] = 0
        return z


def importance(model: VisionTransformer, pictures: Tensor, labels: Tensor) -> dict[str, HeadScores]:
    """What pruning each head does to each picture, ``"PLACE.MEASURE"`` for every place and measure.

    After Li et al. 2023 (arXiv 2303.13731), who prune heads of vision transformers, wholly or in part, and compare
    several measures. Their formulas and code are not public; these are [OURS]:

    * ``drop``: the label's probability before, minus after;
    * ``divergence``: Jensen-Shannon divergence of the predicted distributions, in nats, 0 to log 2;
    * ``distance``: 1 - cosine of the CLS token's last states before the final norm, 0 to 2;
    * ``flip``: 1 where another class is predicted;
    * ``error``: 1 where a right prediction becomes wrong, -1 where a wrong one becomes right: its mean is the loss of
      accuracy.

    A head is removed alone, so what another one takes over does not show; and a head that writes a constant matters
    here though it says nothing of the picture (zero is no head's mean). At patches of the last layer nothing can come
    of it: CLS alone is read.

    Args:
        model: in evaluation mode, as it stands.
        pictures: (picture, side, side).
        labels: (picture,).
    """
    before = _run(model, pictures)
    found: dict[str, list[list[NDArray[np.float64]]]] = {}
    for place, tokens in PLACES.items():
        for layer in range(len(model.layers)):
            row = []
            for head in range(model.heads):
                with attached(model, Pruned(head, tokens), layers=[layer]):
                    row.append(changes(before, _run(model, pictures), labels))
            for name in MEASURES:
                found.setdefault(f"{place}.{name}", []).append([one[name] for one in row])
    return {name: HeadScores(name, np.moveaxis(np.array(each), -1, 0)) for name, each in found.items()}


def changes(before: Seen, after: Seen, labels: Tensor) -> dict[str, NDArray[np.float64]]:
    """Every one of ``MEASURES`` of each picture (picture,), as ``importance`` defines them."""
    p, q = (seen.logits.double().log_softmax(-1) for seen in (before, after))
    middle = torch.logaddexp(p, q) - np.log(2)
    at = labels[:, None]
    first, second = p.argmax(-1), q.argmax(-1)
    cosine = cosine_similarity(before.cls.double(), after.cls.double(), dim=-1)
    told = {
        "drop": (p.exp().gather(1, at) - q.exp().gather(1, at))[:, 0],
        "divergence": ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2,
        "distance": 1 - cosine,
        "flip": (first != second).double(),
        "error": (first == labels).double() - (second == labels).double(),
    }
    return {name: values.cpu().numpy() for name, values in told.items()}


def _run(model: VisionTransformer, pictures: Tensor) -> Seen:
    with torch.no_grad():
        parts = [model(batch) for batch in torch.split(pictures, BATCH)]
    return Seen(torch.cat([part.logits for part in parts]), torch.cat([part.cls for part in parts]))
