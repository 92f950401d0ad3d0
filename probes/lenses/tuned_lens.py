"""The tuned lens: a logit lens with an affine change of basis for every depth, trained to say what the model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.progress import track
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.probes.lenses.logit_lens import LensReading, final_logits, logit_lens, streams
from headscope.probes.lenses.targets import Token

FORMAT = "headscope tuned lens 1"
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators x + W x + b of the stream at some depths (0 enters the first layer), float32.

    Attributes:
        depths: (n,) which depths have one; others are read as the logit lens reads them.
        weight, bias: (n, d_model, d_model) and (n, d_model).
        kl_before, kl_after: (n,) mean KL(model || lens) in nats on held-out tokens, untrained and trained.
    """

    depths: NDArray[np.int64]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    kl_before: NDArray[np.float64]
    kl_after: NDArray[np.float64]

    def translate(self, x: Tensor, depth: int) -> Tensor:
        """The stream ``x`` (row, d_model) of a depth in the last one's basis."""
        at = np.flatnonzero(self.depths == depth)
        if not len(at):
            return x
        w, b = (torch.from_numpy(each[at[0]]).to(x.device) for each in (self.weight, self.bias))
        return (x.float() + x.float() @ w.T + b).to(x.dtype)

    def read(
        self, model: Loadable, text: str, target: Token | None = None, *, positions: Sequence[int] | None = None
    ) -> LensReading:
        """``logit_lens`` through the translators.

        Raises:
            HeadscopeError: as ``logit_lens``; a model of another width or depth.
        """
        lm = load_model(model)
        if self.weight.shape[-1] != lm.info.d_model or self.depths.max() >= tower_size(lm).depth:
            raise HeadscopeError(f"this tuned lens is of another model than {lm.name}: fit one to it")
        return logit_lens(lm, text, target, positions=positions, translate=self.translate)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; tensors are named as the attributes."""
        names = ("depths", "weight", "bias", "kl_before", "kl_after")
        write_atomically(path, save({n: np.ascontiguousarray(getattr(self, n)) for n in names}, {"format": FORMAT}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what ``save`` wrote.

        Raises:
            HeadscopeError: it is missing, or something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise HeadscopeError(f"{path} is no tuned lens of headscope: fit one with fit_tuned_lens")
                return cls(**{name: file.get_tensor(name) for name in file.keys()})
        except (OSError, SafetensorError, TypeError) as error:
            raise HeadscopeError(f"{path} cannot be read as a tuned lens ({str(error)[:80]})") from error


def fit_tuned_lens(
    model: Loadable,
    texts: Sequence[str],
    *,
    depths: Sequence[int] | None = None,
    steps: int = 250,
    batch: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Train an affine translator for each depth to make KL(model || lens) small, the model frozen.

    Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens" (arXiv 2303.08112, Section
    3): translators begin as the identity, each depth has its own loss, the final norm and unembedding are the model's.
    What differs: Adam at ``rate``, falling in a line to 0, and few tokens, held in memory; the authors use SGD with
    Nesterov momentum on 2^18 tokens a step, weight decay, and text that the model was trained on [OURS: a small lens].

    What it does not show: that the model uses what the translator finds: it is trained on text like ``texts``, and can
    learn their unigram statistics in its bias (compare ``kl_after`` at depth 0).

    Args:
        model: load_model's result, or what it takes.
        texts: every position of them is a sample; the last fifth of all tokens is held out.
        depths: which to train, 0 to layers - 1; None: all.
        steps, batch, rate, seed: of Adam; ``batch`` tokens a step, and logits of one depth held at a time.

    Raises:
        HeadscopeError: too few tokens, no such depth, or as ``logit_lens``.
    """
    lm = load_model(model)
    count = tower_size(lm).depth
    chosen = sorted(range(count) if depths is None else depths)
    if not chosen or chosen[0] < 0 or chosen[-1] >= count or min(steps, batch) < 1:
        raise HeadscopeError(f"fit_tuned_lens: depths are 0 to {count - 1} (the last is the model), steps 1 or more")
    held = _tokens(lm, texts, chosen)
    kept = held[0].shape[0] * 4 // 5
    if kept < 2 or held[0].shape[0] - kept < 1:
        raise HeadscopeError(f"{held[0].shape[0]} tokens are too few to fit a lens to: give more texts")
    finish, width = final_logits(lm), lm.info.d_model
    found: list[tuple[Tensor, Tensor, float, float]] = []
    with frozen(lm):
        for x in track(held[:-1], "tuned lens", enabled=progress):
            draw = torch.Generator().manual_seed(seed)
            w = torch.zeros(width, width, device=x.device, requires_grad=True)
            b = torch.zeros(width, device=x.device, requires_grad=True)
            before = _loss(x[kept:], held[-1][kept:], w, b, finish, batch)
            optimizer = torch.optim.Adam([w, b], lr=rate)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
                at = torch.randint(0, kept, (batch,), generator=draw)
                optimizer.zero_grad()
                with torch.enable_grad():
                    _kl(x[at], held[-1][at], w, b, finish).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            after = _loss(x[kept:], held[-1][kept:], w, b, finish, batch)
            found.append((w.detach().cpu(), b.detach().cpu(), before, after))
    weight, bias = torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found])
    kl = np.array([one[2:] for one in found])
    return TunedLens(np.array(chosen), weight.numpy(), bias.numpy(), kl[:, 0], kl[:, 1])


def _tokens(lm: LanguageModel, texts: Sequence[str], depths: Sequence[int]) -> list[Tensor]:
    """The stream (token, d_model) at each of ``depths`` and at the last, of all texts, in float32."""
    found: list[list[Tensor]] = [[] for _ in range(len(depths) + 1)]
    for text in texts:
        with streams(lm) as held:
            lm.forward(lm.encode(text)["input_ids"], logits=1)
        for into, depth in zip(found, [*depths, len(held) - 1], strict=True):
            into.append(held[depth][0].float())
    return [torch.cat(each) for each in found]


def _kl(x: Tensor, last: Tensor, w: Tensor, b: Tensor, finish: Read) -> Tensor:
    """KL(model || lens) of every row, in nats."""
    with torch.no_grad():
        own = finish(last).log_softmax(-1)
    lens = finish(x + x @ w.T + b).log_softmax(-1)
    found: Tensor = (own.exp() * (own - lens)).sum(-1)
    return found


@torch.no_grad()
def _loss(x: Tensor, last: Tensor, w: Tensor, b: Tensor, finish: Read, batch: int) -> float:
    pairs = zip(torch.split(x, batch), torch.split(last, batch), strict=True)
    return float(torch.cat([_kl(one, other, w, b, finish) for one, other in pairs]).mean())
