"""In-context linear regression: what one layer of softmax attention learns (He et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.linear_regression import predictors
from headscope.interp.laboratory.linear_regression.data import Prompts, Regression
from headscope.interp.laboratory.linear_regression.measures import patterns, shared
from headscope.interp.laboratory.linear_regression.model import Regressor
from headscope.interp.laboratory.linear_regression.verdicts import verdicts
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.registry import check_counts
from headscope.interp.results.findings import Claim, Numbers

TASKS = ((0, 3), (1, 5))  # the authors' two tasks, of 3 and 4 features, two in common
WATCHED = 2_000  # prompts on which the curves are measured


@dataclass(frozen=True, kw_only=True)
class LinearRegression(Experiment):
    """One layer of softmax attention on prompts of (x, y), the query no key: its KQ and OV, and its loss beside one
    step of gradient descent, debiased gradient descent and Bayes; longer prompts; two tasks at once.

    The paper trains 500,000 steps at Adam's rate 1e-3; here far fewer at a larger rate, which falls to a tenth for the
    last quarter [OURS]. The two-task models see noise of the same variance as the others (the authors' configuration
    says a deviation of 0.01, their notebook a variance of 0.1). Rates of gradient descent are fitted on prompts that
    are not those they are judged on.

    Args:
        features: of x.
        examples: of a training prompt, 8 a feature in the paper.
        noise: variance of y about beta.x.
        heads: of the models of one task.
        two_task_heads: of the models of two tasks.
        steps: of training, each model (500,001 in the paper).
        batch: prompts a step.
        rate: Adam's (1e-3 in the paper).
        prompts: of the test, the same for every model of a seed.
        lengths: examples of the prompts on which length generalisation is measured.
        every: steps between two points of a curve.
    """

    name: ClassVar[str] = "linear_regression"
    source: ClassVar[str] = "arXiv 2503.12734"

    features: int = 5
    examples: int = 40
    noise: float = 0.1
    heads: tuple[int, ...] = (1, 2, 4)
    two_task_heads: tuple[int, ...] = (3, 6)
    steps: int = 4_000
    batch: int = 256
    rate: float = 5e-3
    prompts: int = 20_000
    lengths: tuple[int, ...] = (10, 20, 40, 80, 160)
    every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.heads or not 0 <= self.noise < float("inf"):
            raise HeadscopeError(
                "linear_regression: heads names one model at least, and noise is a variance, 0 or more"
            )
        least = min((*self.heads, *self.two_task_heads))
        check_counts(1, heads=least, steps=self.steps, batch=self.batch, prompts=self.prompts, every=self.every)

    def quick(self) -> Self:
        return replace(self, heads=(1, 2), two_task_heads=(3,), steps=800, rate=1e-2, prompts=4_000, lengths=(40, 160))

    def run(self, bench: Bench) -> Mapping[str, float]:
        law = Regression(features=self.features, noise=self.noise)
        two = replace(law, tasks=TASKS if self.two_task_heads else ())
        numbers = self._references(law, bench)
        for heads in self.heads:
            model = self._trained(bench, f"H{heads}", law, heads)
            numbers |= {f"{name}_h{heads}": value for name, value in patterns(*model.circuits()).items()}
            numbers |= self._lengths(model, law, bench, heads)
        test = self._test(two, bench, self.examples)
        for heads in self.two_task_heads:
            model = self._trained(bench, f"two_tasks_H{heads}", two, heads)
            found = shared(*model.circuits(), two.outputs) | {"loss": _loss(model, test)}
            numbers |= {f"two_tasks_{name}_h{heads}": value for name, value in found.items()}
            numbers["two_tasks_bayes"] = predictors.error(predictors.bayes(test, two), test.target)
        return numbers

    def claims(self, numbers: Numbers) -> list[Claim]:
        return verdicts(numbers, self.heads, self.two_task_heads, self.examples, self.lengths)

    def _trained(self, bench: Bench, label: str, law: Regression, heads: int) -> Regressor:
        torch.manual_seed(bench.seed)  # each model begins as it would alone
        model = Regressor(law.features + law.outputs, heads, law.outputs).to(bench.device)
        watched = law.draw(WATCHED, self.examples, generator(bench.seed, -3, bench.device))

        def loss(model: Any, step: int) -> Tensor:
            drawn = law.draw(self.batch, self.examples, generator(bench.seed, step, bench.device))
            rest: Tensor = model(drawn.context, drawn.query) - drawn.target
            return rest.square().mean()

        def measured(model: Any) -> dict[str, float]:
            weights = {} if law.tasks else patterns(*model.circuits())
            return {"loss": _loss(model, watched)} | weights

        given = {"context": watched.context[:100], "query": watched.query[:100]}
        watch = Watch(every=self.every, numbers=measured, inputs=given, statistics=("entropy",))
        adam = torch.optim.Adam(model.parameters(), self.rate)
        falls = lambda step: 1.0 if step < 0.75 * self.steps else 0.1  # noqa: E731
        bench.train(label, model, loss, adam, steps=self.steps, watch=watch, rate=falls)
        return model

    def _test(self, law: Regression, bench: Bench, examples: int) -> Prompts:
        return law.draw(self.prompts, examples, generator(bench.seed, -2, bench.device))

    def _references(self, law: Regression, bench: Bench) -> dict[str, float]:
        """The smallest approximate losses, and the losses of softmax heads there (``softmax_there``); losses of what
        needs no training at every length, with rates that are fitted at the training length."""
        known = law.draw(self.prompts, self.examples, generator(bench.seed, -4, bench.device))
        test, numbers = self._test(law, bench, self.examples), dict[str, float]()
        for heads in self.heads:
            lowest, omega, mu = predictors.smallest_loss(heads, law, self.examples)
            there = predictors.error(predictors.of_heads(omega, mu, test)[:, None], test.target)
            numbers |= {f"approximate_h{heads}": lowest, f"softmax_there_h{heads}": there}
        for length in {self.examples, *self.lengths}:
            test = self._test(law, bench, length)
            numbers[f"bayes_L{length}"] = predictors.error(predictors.bayes(test, law), test.target)
            for name, debiased in (("descent", False), ("debiased", True)):
                rate = predictors.best_rate(predictors.step_of_descent(known, debiased=debiased), known.target)
                guess = rate * predictors.step_of_descent(test, debiased=debiased)[:, None]
                numbers[f"{name}_L{length}"] = predictors.error(guess, test.target)
                if not debiased:  # linear attention sums over examples: its optimum is the sum, tuned at its length
                    summed = guess * length / self.examples
                    numbers[f"linear_attention_L{length}"] = predictors.error(summed, test.target)
        return numbers

    def _lengths(self, model: Regressor, law: Regression, bench: Bench, heads: int) -> dict[str, float]:
        """Test losses at every length, and how far the predictions are from debiased gradient descent's."""
        tests = {length: self._test(law, bench, length) for length in {self.examples, *self.lengths}}
        numbers = {f"loss_h{heads}_L{length}": _loss(model, test) for length, test in tests.items()}
        test = tests[self.examples]
        step = predictors.step_of_descent(test, debiased=True)
        with torch.no_grad():
            said = model(test.context, test.query)[:, 0].double()
        rest = predictors.error(predictors.best_rate(step, said) * step, said) / float(said.square().mean())
        return numbers | {f"beside_debiased_h{heads}": rest}


def _loss(model: Any, prompts: Prompts) -> float:
    with torch.no_grad():
        return predictors.error(model(prompts.context, prompts.query), prompts.target)
