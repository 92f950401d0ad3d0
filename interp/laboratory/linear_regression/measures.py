"""What the weights of a trained layer say: the patterns that the paper finds in KQ and OV."""

from __future__ import annotations

from torch import Tensor

DUMMY = 0.05  # of the largest |omega mu|, below which a head counts as a dummy [OURS]


def patterns(kq: Tensor, ov: Tensor) -> dict[str, float]:
    """Diagnostics of a layer with one output, from ``Regressor.circuits``.

    Of a KQ only the rows of x are read: the query's last entry is 0, so that its row acts on nothing (and, without
    weight decay, keeps what it began with). omega of a head is the mean diagonal, mu the last entry of its OV. A head
    whose |omega mu| is under ``DUMMY`` of the largest is left out of all but ``zero_sum`` [OURS]; no definition of
    these shares is printed in the paper, which shows matrices.

    Returns:
        ``kq_diagonal``: the smallest share of a KQ's squared entries that omega I explains, 0 to 1. ``ov_last``: the
        smallest share of an OV's squares in its last entry. ``zero_sum``: |sum of mu| / sum of |mu|, 0 for heads that
        cancel, 1 for one sign. ``homogeneous``: standard deviation of |omega| over its mean. ``both_signs``: 1 where
        some omega is positive and some negative. ``agreeing``: share of heads whose omega and mu have one sign.
        ``active``: heads that are no dummies. ``omega``, ``mu``: mean sizes |.|; ``strength``: sum of omega mu (1 over
        all heads would be an unbiased slope without noise).
    """
    rows = kq[:, : kq.shape[1] - 1]
    omega, mu = rows.diagonal(dim1=1, dim2=2).mean(-1), ov[:, -1, 0]
    weight = (omega * mu).abs()
    active = weight >= DUMMY * weight.max()
    diagonal = rows.shape[1] * omega.square() / rows.square().sum((1, 2))
    last = mu.square() / ov[..., 0].square().sum(1)
    size = omega[active].abs()
    return {
        "kq_diagonal": float(diagonal[active].min()),
        "ov_last": float(last[active].min()),
        "zero_sum": float(mu.sum().abs() / mu.abs().sum()),
        "homogeneous": float(size.std(correction=0) / size.mean()),
        "both_signs": float(bool((omega[active] > 0).any() and (omega[active] < 0).any())),
        "agreeing": float((omega[active] * mu[active] > 0).double().mean()),
        "active": float(active.sum()),
        "omega": float(size.mean()),
        "mu": float(mu[active].abs().mean()),
        "strength": float((omega * mu).sum()),
    }


def shared(kq: Tensor, ov: Tensor, outputs: int) -> dict[str, float]:
    """How heads are divided among ``outputs`` tasks.

    A head serves a task by the size of what it moves from the task's y to the task's output. Its share of the task it
    serves most is 1 for a head of one task, 1 / outputs for one that serves all alike: superposition [OURS measure;
    the authors' notebook shows matrices].

    Returns:
        ``on_one_task``: the mean of that share over heads, weighted by what they move. ``shared_heads``: heads whose
        share is under 0.9 and that move at least ``DUMMY`` of what the strongest moves. ``crossing``: share of OV's
        squares (rows of y) that go from one task's y to another's output. ``kq_diagonal``: share of KQ's squares
        between x and x that are on the diagonal, over all heads.
    """
    own_x = kq[:, :-outputs, :-outputs]
    own = ov[:, -outputs:].diagonal(dim1=1, dim2=2).abs()  # (head, task)
    slope = own_x.diagonal(dim1=1, dim2=2).abs().mean(-1)
    moved = own * slope[:, None]
    share, size = moved.amax(1) / moved.sum(1), moved.sum(1)
    squares = ov[:, -outputs:].square()
    return {
        "on_one_task": float((share * size).sum() / size.sum()),
        "shared_heads": float(((share < 0.9) & (size >= DUMMY * size.max())).sum()),
        "crossing": float(1 - squares.diagonal(dim1=1, dim2=2).sum() / squares.sum()),
        "kq_diagonal": float(own_x.diagonal(dim1=1, dim2=2).square().sum() / own_x.square().sum()),
    }
