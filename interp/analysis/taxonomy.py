"""What kinds of heads a model has: heads clustered by what they do, the clusters named, and how far that holds."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from sklearn.metrics import silhouette_score

from headscope.interp.analysis import clusters as sorting
from headscope.interp.analysis.clusters import Method, Stability
from headscope.interp.analysis.features import FEATURES, head_features
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.models import load_model
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.provenance import hash_texts, provenance
from headscope.interp.runs.sealed import read_beside, unsealed, write_results

FORMAT = 1
NAME = "taxonomy"
TABLE, ARRAY = f"{NAME}.csv", f"{NAME}_features.npy"


@dataclass(frozen=True)
class Cluster:
    """A kind of heads: its name, how many, the head in its middle (layer, head), and its centre by feature, in standard
    deviations from the mean of all heads."""

    name: str
    heads: int
    medoid: tuple[int, int]
    centre: dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class Taxonomy:
    """What ``taxonomy`` found.

    ``features`` (example, layer, head, feature) is what it went by, ``labels`` (layer, head) each head's cluster, an
    index into ``clusters`` (the largest first). ``silhouettes``: the mean silhouette by number of clusters;
    ``shuffled``: its (mean, 2.5 %, 97.5 %) for the number chosen where features are shuffled over heads.
    ``stability`` is None for a single text.
    """

    features: xr.DataArray
    labels: NDArray[np.int64]
    clusters: tuple[Cluster, ...]
    silhouettes: dict[int, float]
    shuffled: tuple[float, float, float]
    stability: Stability | None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shown = "; ".join(f"{one.heads} {one.name}" for one in self.clusters[:4])
        more = f"; and {len(self.clusters) - 4} more" if len(self.clusters) > 4 else ""
        return f"Taxonomy({self.labels.size} heads in {len(self.clusters)} clusters: {shown}{more})"

    @property
    def silhouette(self) -> float:
        """Of the clusters that were made: 1 is apart, 0 is one into the other."""
        return self.silhouettes[len(self.clusters)]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: layer, head, cluster, name, medoid (is it its cluster's), and its features' means."""
        layers, heads = (np.asarray(index).ravel() for index in np.indices(self.labels.shape))
        layer = self.features["layer"].to_numpy()[layers]
        own = self.labels.ravel()
        middle = {one.medoid for one in self.clusters}
        frame = pd.DataFrame({"layer": layer, "head": heads, "cluster": own})
        frame["name"] = [self.clusters[i].name for i in own]
        frame["medoid"] = [pair in middle for pair in zip(layer.tolist(), heads.tolist(), strict=True)]
        means = sorting.averaged(_flat(self.features))
        return pd.concat([frame, pd.DataFrame(means, columns=self.features["feature"].to_numpy())], axis=1)

    def summary(self) -> pd.DataFrame:
        """One row a cluster: cluster, name, heads, medoid (``L3H4``), layers (the middle half of its heads lies there),
        and its centre's features."""
        rows = []
        for i, one in enumerate(self.clusters):
            layers = self.features["layer"].to_numpy()[np.nonzero(self.labels == i)[0]]
            low, high = np.percentile(layers, [25, 75])
            told = {"cluster": i, "name": one.name, "heads": one.heads, "medoid": "L{}H{}".format(*one.medoid)}
            rows.append({**told, "layers": f"{low:.0f}-{high:.0f}", **one.centre})
        return pd.DataFrame(rows)

    def save(self, folder: str | Path) -> Path:
        """Write ``taxonomy.json`` (clusters, stability, provenance), ``taxonomy.csv`` (the table of heads) and
        ``taxonomy_features.npy``, each atomically; returns the JSON's path.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        array = io.BytesIO()
        np.save(array, self.features.to_numpy())
        document = {
            "format": FORMAT,
            "layers": self.features["layer"].to_numpy().tolist(),
            "features": self.features["feature"].to_numpy().tolist(),
            "labels": self.labels.tolist(),
            "clusters": [asdict(one) for one in self.clusters],
            "silhouettes": self.silhouettes,
            "silhouette_shuffled": self.shuffled,
            "stability": None if self.stability is None else asdict(self.stability),
            "provenance": self.provenance,
        }
        path = Path(folder) / f"{NAME}.json"
        write_results(path, document, {TABLE: self.to_frame().to_csv(index=False).encode(), ARRAY: array.getvalue()})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Taxonomy:
        """Read what ``save`` wrote, from the JSON file or its folder.

        Raises:
            HeadscopeError: no such file, another kind of file, or one that was changed.
        """
        path = Path(path) / f"{NAME}.json" if Path(path).is_dir() else Path(path)
        try:
            held = unsealed(json.loads(path.read_bytes()))
            values = np.load(io.BytesIO(read_beside(path, held, ARRAY)))
            coordinates = {"example": np.arange(len(values)), "layer": held["layers"], "feature": held["features"]}
            features = xr.DataArray(values, coordinates, ("example", "layer", "head", "feature"), name="features")
            found = tuple(Cluster(**{**one, "medoid": tuple(one["medoid"])}) for one in held["clusters"])
            stable = held["stability"]
            ranges = {} if stable is None else {key: tuple(x) for key, x in stable.items() if key != "draws"}
            return cls(
                features,
                np.array(held["labels"], dtype=np.int64),
                found,
                {int(k): float(x) for k, x in held["silhouettes"].items()},
                tuple(held["silhouette_shuffled"]),
                None if stable is None else Stability(**ranges, draws=stable["draws"]),
                held["provenance"],
            )
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise HeadscopeError(f"{path} is no taxonomy ({error}); run `headscope taxonomy`") from error


def taxonomy(
    lm: Any,
    texts: Text | None = None,
    *,
    length: int = 128,
    samples: int = 16,
    clusters: int | None = None,
    method: Method = "kmeans",
    draws: int = 100,
    seed: int = 0,
    out: str | Path | None = None,
) -> Taxonomy:
    """Sort a model's heads into kinds by what they do with texts, and say how far other texts give the same kinds.

    [OURS: papers sort heads by eye or by one detector at a time.] ``head_features`` of every head, averaged over texts
    and standardised over heads, are clustered; each cluster is named after the features in which it is farthest from
    the mean of all heads (``clusters.names``). Stability is the adjusted Rand index between clusterings of other
    draws of the texts, beside labels permuted over heads.

    What it does not show: that there are kinds. Any features with little noise are sorted alike twice, also where heads
    differ by degrees. ``shuffled``, where features are shuffled over heads, is a low bar: a continuum of correlated
    features is above it, too. Nor what heads write, or need, or do with other kinds of texts; a name is about the mean
    head of its cluster.

    Args:
        lm: load_model's result, or what load_model takes.
        texts, length, samples: as of ``head_features``.
        clusters: how many; by default those of 3 to 12 with the highest mean silhouette. (Two have a higher one in
            SmolLM2, and say only that some heads rest on the first token and others look near.)
        method: "kmeans", or "agglomerative" (Ward), which is less stable over texts where we looked: of 16 passages in
            SmolLM2-135M-Instruct, halves of the texts agree to an adjusted Rand index of 0.5 at 3 to 10 clusters, by
            k-means to 0.6 to 0.8.
        draws: of texts for the stability, and of shuffled features.
        seed: of the draws and of k-means.
        out: folder to save to.

    Raises:
        HeadscopeError: a setting out of range, texts that cannot be read, or too few heads.
    """
    out, lm = folder_of(out), load_model(lm)
    sorting.check(method, clusters, lm.info.layers * lm.info.heads, draws)
    features = head_features(lm, texts, length=length, samples=samples)
    given: dict[str, Any] = {"length": length, "samples": samples, "method": method, "draws": draws}
    read = None if texts is None else hash_texts([texts] if isinstance(texts, str) else texts)
    made = provenance(lm, seed=seed, **given, clusters=clusters, texts=read)
    found = sort_heads(features, clusters=clusters, method=method, draws=draws, seed=seed, made=made)
    if out is not None:
        found.save(out)
    return found


def sort_heads(
    features: xr.DataArray,
    *,
    clusters: int | None = None,
    method: Method = "kmeans",
    draws: int = 100,
    seed: int = 0,
    made: dict[str, Any] | None = None,
) -> Taxonomy:
    """``taxonomy`` of features (example, layer, head, feature) that are there already, ``made`` their provenance."""
    examples, (layers, heads) = _flat(features), features.shape[1:3]
    sorting.check(method, clusters, layers * heads, draws)
    x = sorting.standardised(sorting.averaged(examples))
    scores = sorting.silhouettes(x, method, seed)
    k = sorting.chosen(scores) if clusters is None else clusters
    labels = sorting.partition(x, k, method, seed)
    scores.setdefault(k, float(silhouette_score(x, labels)))
    index = [str(name) for name in features["feature"].to_numpy()]
    told = sorting.names(x, labels, [FEATURES.get(name, (f"high {name}", f"low {name}")) for name in index])
    kinds = []
    for c, name in enumerate(told):
        members = np.flatnonzero(labels == c)
        layer, head = divmod(sorting.medoid(x, members), heads)
        centre = dict(zip(index, x[members].mean(axis=0).tolist(), strict=True))
        kinds.append(Cluster(name, len(members), (int(features["layer"][layer]), head), centre))
    mixed = sorting.shuffled_silhouettes(x, k, method, seed, draws)
    shuffled = (float(mixed.mean()), *np.percentile(mixed, [2.5, 97.5]).tolist())
    stable = sorting.stability(examples, k, method, seed, draws)
    return Taxonomy(features, labels.reshape(layers, heads), tuple(kinds), scores, shuffled, stable, made or {})


def _flat(features: xr.DataArray) -> NDArray[np.float64]:
    """(example, head, feature), a model's heads in its order."""
    values = features.transpose("example", "layer", "head", "feature").to_numpy()
    return np.asarray(values.reshape(len(values), -1, values.shape[-1]))  # merges layer and head
