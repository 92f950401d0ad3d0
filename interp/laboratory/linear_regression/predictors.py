"""What a prompt's answer can be guessed by: one step of gradient descent, the same debiased, and Bayes."""

from __future__ import annotations

import torch
from scipy.optimize import minimize
from torch import Tensor

from headscope.interp.laboratory.linear_regression.data import Prompts, Regression


def step_of_descent(prompts: Prompts, *, debiased: bool) -> Tensor:
    """The prediction of one gradient step from zero at rate 1, (prompt,): mean_l y_l x_l.x_q. ``debiased`` takes the
    mean of x from every x first, as two heads of opposite signs do (the paper's debiased GD)."""
    x, y = prompts.context[..., :-1].double(), prompts.context[..., -1].double()
    if debiased:
        x = x - x.mean(1, keepdim=True)
    return torch.einsum("plf,pl,pf->p", x, y, prompts.query[:, :-1].double()) / x.shape[1]


def best_rate(guess: Tensor, target: Tensor) -> float:
    """The rate that fits ``guess`` to ``target`` best, by least squares."""
    g, t = guess.double().flatten(), target.double().flatten()
    return float(g @ t / (g @ g))


def error(guess: Tensor, target: Tensor) -> float:
    """Mean squared error, of tensors of one shape."""
    return float((guess.double() - target.double()).square().mean())


def bayes(prompts: Prompts, law: Regression) -> Tensor:
    """The posterior mean of a target, (prompt, task): ridge regression with the noise over the coefficients' variance.

    No predictor has a smaller expected squared error.
    """
    d, out = law.features, []
    penalty = law.noise * (1 if law.tasks else d)
    x, y = prompts.context[..., :d].double(), prompts.context[..., d:].double()
    for task, seen in enumerate(law.support(x.device).bool()):
        own = x[..., seen]
        gram = own.transpose(1, 2) @ own + penalty * torch.eye(int(seen.sum()), dtype=own.dtype, device=own.device)
        beta = torch.linalg.solve(gram, own.transpose(1, 2) @ y[..., task, None])[..., 0]
        out.append((beta * prompts.query[:, :d][:, seen].double()).sum(-1))
    return torch.stack(out, -1)


def approximate_loss(omega: Tensor, mu: Tensor, law: Regression, examples: int) -> Tensor:
    """The paper's approximate loss of heads (omega, mu), each (head,), for many examples (``approx_loss`` of the code):
    1 + s2 - 2 mu.omega + mu'(omega omega' + (1 + s2) / L exp(d omega omega')) mu, s2 the noise."""
    outer = omega[:, None] * omega[None, :]
    spread = (1 + law.noise) / examples * (law.features * outer).exp()
    return 1 + law.noise - 2 * mu @ omega + mu @ (outer + spread) @ mu


def smallest_loss(heads: int, law: Regression, examples: int, starts: int = 8) -> tuple[float, Tensor, Tensor]:
    """The minimum of ``approximate_loss`` with its omega and mu, (head,): mu solved for exactly, omega by L-BFGS-B from
    ``starts`` points (every other head negative).

    With two heads or more the infimum lies at omega -> 0: it is searched with |omega| >= 0.01, below which the matrix
    to solve is as good as singular in float64.
    """
    signs = torch.tensor([1.0 if head % 2 == 0 else -1.0 for head in range(heads)], dtype=torch.float64)

    def best_mu(omega: Tensor) -> Tensor:
        outer = omega[:, None] * omega[None, :]
        held = outer + (1 + law.noise) / examples * (law.features * outer).exp()
        solved: Tensor = torch.linalg.solve(held, omega)
        return solved

    def loss(size: object) -> float:
        omega = signs * torch.as_tensor(size, dtype=torch.float64)
        return float(approximate_loss(omega, best_mu(omega), law, examples))

    bounds = [(0.01, 2.0)] * heads
    begun = [[0.05 + 0.1 * start + 0.01 * head for head in range(heads)] for start in range(starts)]
    found = [minimize(loss, start, bounds=bounds, method="L-BFGS-B") for start in begun]
    best = min(found, key=lambda one: float(one.fun))
    omega = signs * torch.as_tensor(best.x, dtype=torch.float64)
    return float(best.fun), omega, best_mu(omega)


def of_heads(omega: Tensor, mu: Tensor, prompts: Prompts) -> Tensor:
    """What heads of exactly the paper's pattern say, (prompt,): sum_h mu_h sum_l softmax_l(omega_h x_l.x_q) y_l."""
    x, y = prompts.context[..., :-1].double(), prompts.context[..., -1].double()
    match = torch.einsum("plf,pf->pl", x, prompts.query[:, :-1].double())
    weights = (omega.to(x.device)[:, None, None] * match).softmax(-1)
    return torch.einsum("h,hpl,pl->p", mu.to(x.device), weights, y)
