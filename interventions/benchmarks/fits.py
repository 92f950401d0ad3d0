"""ITI and LoFiT on held-out items of two tasks, beside no edit, other heads and LoRA at matched data.

    python interventions/benchmarks/fits.py --out interventions/benchmarks/results/fits.json

Tasks (``fit_tasks``): ``facts``, asked for from memory, and ``lookup``, a city read in the context; an item counts as
right where its right continuation has the higher log-probability. For every seed items are split by group into
training, development and test parts. Conditions: no edit; ITI; LoFiT; LoFiT's second step on random heads of the same
layers, and on the heads that LoFiT chose for the other task (the paper's claim is that heads are the task's own); LoRA
on the same rows for as many steps as that second step. ITI's alpha, LoFiT's second rate and LoRA's rate are chosen on
the development part of the first seed, the same number of candidates for each; the random and the other task's heads
have LoFiT's. ``prose`` is the loss on bundled prose (nats a token), what an edit costs elsewhere (ITI's at every row).
Intervals of differences from no edit resample groups over all seeds; they do not show how far seeds' fits differ, which
``by seed`` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.measured import save_measured
from headscope.interventions import ITI, LoFiT, TextLoss, apply, lora
from headscope.interventions.applying import size
from headscope.interventions.base import Intervention
from headscope.interventions.benchmarks.fit_tasks import TASKS, Item, split
from headscope.interventions.fitted.base import every_head
from headscope.interventions.fitted.data import responses
from headscope.interventions.fitted.lofit import LoFiTResult
from headscope.interventions.fitted.training import whole_responses

ALPHAS, OFFSET_RATES, LORA_RATES = (15.0, 5.0, 1.5), (1e-2, 3e-2, 1e-1), (1e-4, 5e-4, 2e-3)  # the papers' first
SMALL = {"train": 16, "dev": 8, "test": 12, "seeds": 1, "epochs": 1, "passages": 1, "candidates": 1}
Parts = dict[str, list[list[Item]]]  # task -> training, development and test items
Row = dict[str, Any]


class Bench:
    """One model, the settings of all fits, and what was measured."""

    def __init__(self, lm: LanguageModel, given: argparse.Namespace) -> None:
        self.lm, self.given = lm, given
        self.rows: list[Row] = []
        self.chosen: dict[tuple[str, str], float] = {}  # (task, method) -> the candidate of the first seed
        self.fits: dict[tuple[str, int, HeadSet, float], LoFiTResult] = {}

    def right(self, items: Sequence[Item], edit: Intervention | None = None) -> NDArray[np.bool_]:
        """Whether the right continuation of each item has the higher log-probability."""
        rows = responses(self.lm, [item.preference() for item in items], "dpo", end=False, longest=400)
        found = []
        with nullcontext() if edit is None else apply(self.lm, edit), torch.no_grad():
            for i in range(0, len(rows), 32):
                batch = rows[i : i + 32]
                with prompt_boundary([len(x) for row in batch for x, _ in row]):
                    said = whole_responses(self.lm, batch)
                found.append((said[:, 0] > said[:, 1]).cpu().numpy())
        return np.concatenate(found)

    def prose(self, edit: Intervention | None = None) -> float:
        """Loss on prose, nats a token; an edit of answers is in force at every row."""
        task = TextLoss(self.given.passages, 256)
        with nullcontext() if edit is None else apply(self.lm, edit.with_settings(during="always")):
            return float(np.mean([task.run(self.lm, trial)["score"] for trial in task.trials(self.lm)]))

    def keep(self, task: str, seed: int, condition: str, test: Sequence[Item], **more: Any) -> None:
        """Measure the model as it is or with ``edit``, and keep it."""
        edit = more.pop("edit", None)
        right = self.right(test, edit)
        row = {"task": task, "seed": seed, "condition": condition, "accuracy": float(right.mean()), "n": len(test)}
        row |= {"prose": self.prose(edit), **more}
        print(json.dumps(row), flush=True)
        self.rows.append({**row, "right": right.tolist(), "groups": [item.group for item in test]})

    def best(self, task: str, method: str, candidates: Sequence[float], accuracy: Callable[[float], float]) -> float:
        """The candidate that does best on the development part, the first of equals; chosen once a task."""
        if (task, method) not in self.chosen:
            scores = {one: float(accuracy(one)) for one in candidates[: self.given.candidates]}
            print(json.dumps({"task": task, "method": method, "development": scores}), flush=True)
            self.chosen[task, method] = max(scores, key=lambda one: scores[one])
        return self.chosen[task, method]

    def lofit(
        self, task: str, seed: int, train: Sequence[Item], rate: float, heads: HeadSet | None = None
    ) -> LoFiTResult:
        """LoFiT on the training part, of these heads or of those that it chooses; each is fitted once."""
        if heads is not None and (task, seed, heads, rate) in self.fits:
            return self.fits[task, seed, heads, rate]
        fit = LoFiT(
            preset="truthfulqa",
            loss=self.given.loss,
            heads=heads,
            share=None if heads is not None else self.given.share,
            offset_rate=rate,
            epochs=self.given.epochs,
            seed=seed,
        )
        found = fit.fit(self.lm, self.data(train), progress=False)
        return self.fits.setdefault((task, seed, found.heads, rate), found)

    def data(self, items: Sequence[Item]) -> list[dict[str, str]]:
        """Rows for the loss."""
        return [item.preference() if self.given.loss == "dpo" else item.response() for item in items]

    def seed(self, seed: int, parts: Parts) -> None:
        """Every condition of every task for one seed."""
        rates = OFFSET_RATES
        own = {task: self.lofit(task, seed, part[0], rates[0]).heads for task, part in parts.items()}
        for task, (train, dev, test) in parts.items():
            self.keep(task, seed, "no edit", test, trained=0)
            self._iti(task, seed, train, dev, test)

            def after(rate: float, task: str = task, train: Any = train, dev: Any = dev) -> Any:
                return self.right(dev, self.lofit(task, seed, train, rate, own[task]).edit).mean()

            rate = self.best(task, "LoFiT", rates, after)
            other = next(name for name in parts if name != task)
            drawn, how = self.random_heads(own[task], seed)
            for name, heads in (("LoFiT", own[task]), (f"LoFiT, {how}", drawn), ("LoFiT, other task's", own[other])):
                found = self.lofit(task, seed, train, rate, heads)
                told = {"heads": [list(head) for head in heads], "rate": rate, **_losses(found.summary())}
                self.keep(task, seed, name, test, edit=found.edit, trained=found.trained["offsets"], **told)
            self._lora(task, seed, train, dev, test)

    def _iti(self, task: str, seed: int, train: list[Item], dev: list[Item], test: list[Item]) -> None:
        rows = [row for item in train for row in item.labelled()]
        found = ITI(share=self.given.iti_share, seed=seed).fit(self.lm, rows, progress=False)
        alpha = self.best(task, "ITI", ALPHAS, lambda a: self.right(dev, found.edit.with_settings(strength=a)).mean())
        edit = found.edit.with_settings(strength=alpha)
        # no gradient trains them, but a direction and a sigma of every head that is pushed come from the data
        numbers = len(found.heads) * (found.directions.shape[-1] + 1)
        self.keep(task, seed, "ITI", test, edit=edit, trained=numbers, alpha=alpha, **_heads(found.summary()))

    def _lora(self, task: str, seed: int, train: list[Item], dev: list[Item], test: list[Item]) -> None:
        def worn(rate: float, then: Callable[[int], Any]) -> Any:
            more = {"loss": self.given.loss, "epochs": self.given.epochs, "seed": seed, "progress": False}
            with lora(self.lm, self.data(train), rate=rate, **more) as found:
                return then(found.trained)

        rate = self.best(task, "LoRA", LORA_RATES, lambda r: worn(r, lambda _: self.right(dev).mean()))
        worn(rate, lambda count: self.keep(task, seed, "LoRA", test, trained=count, rate=rate))

    def random_heads(self, heads: HeadSet, seed: int) -> tuple[HeadSet, str]:
        """As many other heads of the same layers, or of any layer where a layer has too few; and which it was."""
        try:
            return heads.matched_random(size(self.lm)[1], seed), "random heads of the same layers"
        except HeadscopeError:
            free = [head for head in every_head(self.lm) if head not in heads]
            drawn = np.random.default_rng(seed).choice(len(free), len(heads), replace=False)
            return HeadSet(tuple(free[i] for i in drawn)), "random heads of any layer"

    def summary(self) -> list[Row]:
        """Each task's conditions over all seeds, with the difference from no edit and its interval."""
        found = []
        for task, condition in dict.fromkeys((row["task"], row["condition"]) for row in self.rows):
            mine = [row for row in self.rows if (row["task"], row["condition"]) == (task, condition)]
            plain = {row["seed"]: row for row in self.rows if (row["task"], row["condition"]) == (task, "no edit")}
            gains = np.concatenate([np.subtract(x["right"], plain[x["seed"]]["right"], dtype=float) for x in mine])
            groups = np.unique([g for row in mine for g in row["groups"]], return_inverse=True)[1]
            low, high = bootstrap_mean(gains[:, None, None], groups)
            row = {"task": task, "condition": condition, "accuracy": float(np.mean([x["accuracy"] for x in mine]))}
            row |= {"by seed": [round(x["accuracy"], 4) for x in mine], "n": int(sum(x["n"] for x in mine))}
            row |= {"gain": float(gains.mean()), "interval": [float(low[0, 0]), float(high[0, 0])]}
            row |= {"prose": float(np.mean([x["prose"] for x in mine])), "trained": mine[0]["trained"]}
            found.append(row)
        return found


def _short(row: Row) -> Row:
    """A row for the file: an item is one digit, and its group is left out (the tasks make the same items again)."""
    kept = {name: value for name, value in row.items() if name != "groups"}
    return {**kept, "right": "".join(str(int(one)) for one in row["right"])}


def _losses(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if "loss" in name}


def _heads(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in ("heads", "accuracy_first", "accuracy_last", "tied_with_last")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", help="default: CUDA where present")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--loss", choices=("dpo", "sft"), default="dpo")
    for name, default in (("train", 96), ("dev", 64), ("test", 192), ("seeds", 3), ("epochs", 5), ("passages", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--candidates", type=int, default=3, help="rates and alphas tried, at most 3")
    parser.add_argument("--share", type=float, default=0.03125, help="of heads that LoFiT's second step trains")
    parser.add_argument("--iti-share", type=float, default=0.046875, help="of heads that ITI pushes")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: a check that it runs, no result")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.small:
        vars(given).update(SMALL)
    lm = load_model(given.model, device=given.device, dtype=given.dtype)
    bench = Bench(lm, given)
    for seed in range(given.seeds):
        sizes = (given.train, given.dev, given.test)
        bench.seed(seed, {name: split(make(seed), seed, sizes) for name, make in TASKS.items()})
    summary = bench.summary()
    print("\n".join(json.dumps(row) for row in summary))
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "model")}
    chosen = {f"{task}, {method}": value for (task, method), value in bench.chosen.items()}
    document = {"summary": summary, "chosen": chosen, "rows": [_short(row) for row in bench.rows]}
    save_measured(given.out, document, lm, **settings)


if __name__ == "__main__":
    main()
