"""What the heads of a vision transformer do: which matter, how far they look, and which patterns there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cross_entropy

from headscope.interp import plots
from headscope.interp.analysis.agreement import agree
from headscope.interp.analysis.pattern_embedding import PatternEmbedding, embed_patterns
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.vision_transformer import pictures as sources
from headscope.interp.laboratory.vision_transformer.model import VisionTransformer
from headscope.interp.laboratory.vision_transformer.pruning import MEASURES, PLACES, importance
from headscope.interp.laboratory.vision_transformer.reach import maps, mean_hops, patterns, profile
from headscope.interp.laboratory.watch import Watch
from headscope.interp.registry import check_counts
from headscope.interp.reports.page import Report
from headscope.interp.results.findings import Claim, Numbers
from headscope.interp.results.scores import HeadScores
from headscope.interp.statistics import SinkMass

SHUFFLES = 2000  # of each null of the agreement


@dataclass(frozen=True, eq=False)
class Study:
    """What ``study`` found of one model: ``importance`` by ``"PLACE.MEASURE"``, ``hops`` (``reach.mean_hops``),
    ``profile`` (``reach.profile``), ``uniform``, the profile of uniform attention, and ``embedding``."""

    importance: dict[str, HeadScores]
    hops: HeadScores
    profile: xr.Dataset
    uniform: xr.Dataset
    embedding: PatternEmbedding


def study(
    model: VisionTransformer, pictures: Tensor, labels: Tensor, *, mapped: int = 200, steps: int = 600, seed: int = 0
) -> Study:
    """Importance, reach and patterns of every head.

    Args:
        model: trained; it is left as it is.
        pictures, labels: (picture, side, side) and (picture,), on the model's device.
        mapped: of them whose patterns are kept, for reach and embedding.
        steps: of the patterns' autoencoder.
        seed: of its weights and the split.
    """
    was = model.training
    model.eval()
    try:
        found = patterns(model, pictures[:mapped])
        matter = importance(model, pictures, labels)
    finally:
        model.train(was)
    even = torch.full((1, 1, 1, *found.shape[-2:]), 1 / found.shape[-1])
    embedding = embed_patterns(maps(found), width=4, steps=steps, seed=seed)
    return Study(matter, mean_hops(found, model.grid), profile(found, model.grid), profile(even, model.grid), embedding)


@dataclass(frozen=True, kw_only=True)
class VisionTransformerStudy(Experiment):
    """Train a small vision transformer on pictures, and ask of its heads what Li et al. ask: which matter (pruned
    wholly, at CLS, at patches, by five measures), how far they look (rings of patches), which patterns there are.

    The paper (arXiv 2303.13731) studies large models of natural pictures, and only its abstract could be read, without
    a figure to compare: sizes, formulas and claims are [OURS]. The defaults are Fashion-MNIST's pictures and 139
    thousand parameters. AdamW, rates warm up over 50 steps and fall along a cosine to 0.

    Args:
        images: a folder of IDX files as Debian's dataset-fashion-mnist has, or ``digits`` (scikit-learn's, 8 x 8
            pixels: then ``grid=4``).
        grid: patches a side.
        width: of the stream.
        heads: of a layer.
        layers: of the model.
        hidden: the MLP's width.
        steps: of training.
        batch: pictures a step.
        lr: the highest learning rate.
        pruned: held-out pictures that every pruning is measured on.
        mapped: of them whose patterns are profiled and encoded.
        codes: steps of the patterns' autoencoder.
    """

    name: ClassVar[str] = "vision_transformer"
    source: ClassVar[str] = "arXiv 2303.13731"

    images: str = sources.FASHION
    grid: int = 7
    width: int = 64
    heads: int = 4
    layers: int = 4
    hidden: int = 128
    steps: int = 1000
    batch: int = 128
    lr: float = 2e-3
    pruned: int = 1000
    mapped: int = 200
    codes: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(1, steps=self.steps, batch=self.batch, pruned=self.pruned, codes=self.codes)
        check_counts(2, mapped=self.mapped)

    def quick(self) -> Self:
        small: dict[str, Any] = {"images": "digits", "grid": 4, "width": 32, "layers": 3, "hidden": 64}
        return replace(self, **small, steps=250, batch=64, lr=5e-3, pruned=200, mapped=60, codes=150)

    def run(self, bench: Bench) -> Mapping[str, float]:
        data = sources.load(self.images)
        train, labels = data.train.to(bench.device), data.train_labels.to(bench.device)
        test, wanted = data.test.to(bench.device), data.test_labels.to(bench.device)
        sizes = {"width": self.width, "heads": self.heads, "layers": self.layers, "hidden": self.hidden}
        model = VisionTransformer(data.side, self.grid, **sizes)

        def loss(model: Any, step: int) -> Tensor:
            at = torch.randint(len(train), (self.batch,), generator=generator(bench.seed, step)).to(train.device)
            return cross_entropy(model(train[at]).logits, labels[at])

        def seen(model: Any) -> dict[str, float]:
            said = torch.cat([model(part).logits.argmax(-1) for part in torch.split(test, 500)])
            return {"accuracy": float((said == wanted).double().mean())}

        watch = Watch(
            every=max(1, self.steps // 5), numbers=seen, inputs={"pictures": test[:100]},
            statistics=("entropy", SinkMass(first=1)),
        )  # fmt: skip
        adam = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.05)
        rows = bench.train("transformer", model, loss, adam, steps=self.steps, clip=1.0, rate=self._rate, watch=watch)
        found = study(
            model, test[: self.pruned], wanted[: self.pruned], mapped=self.mapped, steps=self.codes, seed=bench.seed
        )
        bench.curves["heads"] = [{"step": self.steps, **_of_heads(found)}]
        if bench.folder is not None:
            page = Report("Map of patterns", f"seed {bench.seed}")
            page.figure(plots.pattern_map(found.embedding), "Heads whose patterns look alike lie close together")
            page.save(bench.folder / "patterns.html")
        parameters = sum(p.numel() for p in model.parameters())
        return {"parameters": parameters, "accuracy": rows[-1]["accuracy"], **_numbers(found)}

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / 50) * 0.5 * (1 + float(np.cos(np.pi * step / self.steps)))

    def claims(self, numbers: Numbers) -> list[Claim]:
        def shown(name: str, places: int = 2) -> str:
            return ", ".join(f"{value:.{places}f}" for value in numbers[name])

        apart = numbers["best head, low end"] - numbers["weakest head, high end"]
        further = numbers["hops, last layer"] - numbers["hops, first layer"]
        beside = f"{shown('unexplained by the autoencoder')}; PCA {shown('unexplained by PCA')}"
        of = "mean rank correlation"
        return [
            Claim("It tells the classes apart", "", shown("accuracy", 3), _all(numbers["accuracy"] > 0.8)),
            Claim(
                "Heads differ in importance: the interval of the best lies above that of the weakest (label's "
                "probability, pruned wholly)",
                "", f"low end {shown('best head, low end', 3)}; high end {shown('weakest head, high end', 3)}",
                _all(apart > 0),
            ),
            Claim(
                "Measures of one pruning agree on which heads matter",
                "", f"{of} {shown('agreement of measures')}", _all(numbers["agreement of measures"] > 0.5),
            ),
            Claim(
                "Pruning a head at CLS alone finds other heads than pruning it at patches alone",
                "", f"{of} {shown('agreement of CLS and patches')}",
                _all(numbers["agreement of CLS and patches"] < 0.5),
            ),
            Claim(
                "Neighbours in the picture get more than their share of a patch's attention in the first layer",
                "", f"times uniform: {shown('neighbours, first layer')}", _all(numbers["neighbours, first layer"] > 1),
            ),
            Claim(
                "Heads look further in the last layer than in the first",
                "", f"hops {shown('hops, first layer')}, then {shown('hops, last layer')}; "
                f"uniform {shown('hops, uniform')}",
                _all(further > 0),
            ),
            Claim(
                "An autoencoder sums up the patterns, better than as many principal components",
                "", f"unexplained {beside}",
                _all(numbers["unexplained by the autoencoder"] < numbers["unexplained by PCA"]),
            ),
        ]  # fmt: skip


def _all(held: Any) -> bool:
    return bool(np.all(held))


def _numbers(found: Study) -> dict[str, float]:
    matter, reach = found.importance, found.profile
    low, high = matter["all.drop"].interval
    best, weakest = matter["all.drop"].mean.argmax(), matter["all.drop"].mean.argmin()
    ranks = agree(list(matter.values()), permutations=SHUFFLES).matrix("spearman")
    whole = [f"all.{name}" for name in MEASURES]
    upper = np.triu_indices(len(MEASURES), 1)

    def between(one: str, other: str) -> float:
        return float(np.nanmean([ranks.loc[f"{one}.{name}", f"{other}.{name}"] for name in MEASURES]))

    rings = found.uniform["ring"].to_numpy()[0, 0]
    return {
        "best head, low end": low.flat[best],
        "weakest head, high end": high.flat[weakest],
        "agreement of measures": float(np.nanmean(ranks.loc[whole, whole].to_numpy()[upper])),
        "agreement of CLS and patches": between("cls", "patches"),
        "agreement of all and CLS": between("all", "cls"),
        "agreement of all and patches": between("all", "patches"),
        "neighbours, first layer": float(reach["neighbour"][0, :, 1].mean() / found.uniform["neighbour"][0, 0, 1]),
        "hops, first layer": float(found.hops.mean[0].mean()),
        "hops, last layer": float(found.hops.mean[-1].mean()),
        "hops, uniform": float((rings * np.arange(len(rings))).sum() / rings.sum()),
        "mass on CLS, first layer": float(reach["cls"][0].mean()),
        "mass on CLS, last layer": float(reach["cls"][-1].mean()),
        "unexplained by the autoencoder": found.embedding.unexplained("autoencoder"),
        "unexplained by PCA": found.embedding.unexplained("pca"),
    }


def _of_heads(found: Study) -> dict[str, Any]:
    """Everything that has a value a head: one list a layer."""
    row: dict[str, Any] = {}
    for place in PLACES:
        for name in MEASURES:
            scores = found.importance[f"{place}.{name}"]
            low, high = scores.interval
            row |= {f"{place}.{name}": scores.mean, f"{place}.{name}.low": low, f"{place}.{name}.high": high}
    row |= {"mean_hops": found.hops.mean, "cls_mass": found.profile["cls"].to_numpy()}
    for hop in found.profile["hop"].to_numpy():
        row |= {f"{name}.{hop}": found.profile[name].sel(hop=hop).to_numpy() for name in ("ring", "neighbour")}
    row |= {f"code.{i}": found.embedding.codes[..., i].to_numpy() for i in range(found.embedding.codes.shape[-1])}
    row["code.error"] = found.embedding.error_of.to_numpy()
    return {name: np.round(values, 5).tolist() for name, values in row.items()}
