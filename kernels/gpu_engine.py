"""A ``Request`` answered by the Triton kernels, and by the streaming engine for what they do not compute.

Kernels: lse, max, entropy, distance, linear, output (rows), sums and maxima of columns, up to 32 top keys. Without a
kernel of its own: a window is the row kernel under a narrower mask, and target masses need only lse. To streaming go:
any mask with an index ``rule``, an ``edit`` of the scores that is not declared, or inputs the kernels do not take (the
whole call), longer lists of top keys, and lists of edited scores. So does a call whose kernel does not compile
(``fallback``).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.fallback import falls_back
from headscope.kernels.gpu_passes import columns, rows, top_keys
from headscope.kernels.masks import Mask
from headscope.kernels.replay import Results, again
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import engine as streaming
from headscope.kernels.streaming import library
from headscope.kernels.streaming.counts import count_columns
from headscope.kernels.triton.rows import Rows
from headscope.kernels.triton.tuning import MOST_TOP

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
ROW_NAMES = tuple(each.name for each in fields(Reduced))[:-1]  # the last are the columns
AT_ONCE = 20  # linear columns in a pass: three times as many, where half precision needs three to hold a value


def takes(scores: Scores, v: Tensor) -> bool:
    """Whether the kernels compute this call."""
    q, rule = scores.q, scores.mask.rule
    return q.dtype in DTYPES and q.dtype == v.dtype and max(q.shape[3], v.shape[3]) <= WIDEST and rule is None


def attend(
    scores: Scores,
    v: Tensor,
    *,
    request: Request,
) -> Reduced:
    """Compute ``request``; shapes and meaning as in ``headscope.kernels.attention.attend``."""
    if not takes(scores, v) or not scores.in_kernels:
        return streaming.attend(scores, v, request=request)
    if request.linear is not None or scores.edit is not None:  # what is made of features, or an edit's tables, is no
        return _computed(scores, v, request)  # input of the call
    values = v if request.output else None  # else nothing reads them, and they may be the keys
    tensors = (scores.q, scores.k, values, scores.sinks, scores.bias, *scores.mask.tensors, *request.tensors)
    about = ("attend", scores.scale, scores.softcap, *scores.mask.numbers, *request.numbers)
    step = scores.q.shape[2] == 1
    return _whole(again(lambda: _flat(_computed(scores, v, request)), tensors, about, at_once=step))


def _computed(scores: Scores, v: Tensor, request: Request) -> Reduced:
    with falls_back("the streaming engine"):
        return _Call(scores, v, request).run()
    return streaming.attend(scores, v, request=request)


def _flat(reduced: Reduced) -> Results:
    """A call's results, one after the other."""
    columns = [x for each in reduced.columns for x in (each.sum, each.max, each.count)]
    return tuple([*(getattr(reduced, name) for name in ROW_NAMES), *columns])


def _whole(parts: Results) -> Reduced:
    """The results whose ``_flat`` these are."""
    first = len(ROW_NAMES)
    result = Reduced(*parts[:first])  # type: ignore[arg-type]  # by place: by name it takes as long as a small tensor
    result.columns = tuple([ReducedColumns(*parts[at : at + 3]) for at in range(first, len(parts), 3)])
    return result


class _Call:
    """One call's inputs, so that its passes are short methods."""

    def __init__(self, scores: Scores, v: Tensor, request: Request) -> None:
        self.scores, self.v, self.want = scores, v, request
        self.q, self.k, self.mask, self.sinks = scores.q, scores.k, scores.mask, scores.sinks
        self.result = Reduced()
        self.all_lse: Tensor | None = None
        self.lists = 0 < request.top <= MOST_TOP and scores.edit is None  # by the kernel of top keys

    def run(self) -> Reduced:
        """Rows (with the output where both want the same rows), then what follows from lse, then columns."""
        self._rows()
        self._output()
        self.result.columns = tuple(self._columns(each) for each in self.want.columns)
        if self.want.top and not self.lists:
            only = Request(output=False, top=self.want.top, query_rows=self.want.query_rows)
            part = streaming.attend(self.scores, self.v, request=only)
            self.result.top_mass, self.result.top_keys = part.top_mass, part.top_keys
        count_columns(self.want, self.result, self.scores)
        return self.result

    def _wide(self, got: Rows, where: Tensor | None) -> Rows:
        """More linear columns than one pass holds take further passes."""
        rest = [self._pass({"linear"}, where=where, features=part).linear for part in self._parts()[1:]]
        return (
            got if not rest else got._replace(linear=torch.cat([x for x in (got.linear, *rest) if x is not None], -1))
        )

    def _parts(self) -> list[Tensor | None]:
        """The linear columns that a pass takes, pass by pass."""
        linear = self.want.linear
        return [linear] if linear is None or linear.shape[-1] <= AT_ONCE else list(linear.split(AT_ONCE, -1))

    def _pass(
        self,
        wants: set[str],
        *,
        where: Tensor | None = None,
        mask: Mask | None = None,
        sinks: bool = True,
        features: Tensor | None = None,
    ) -> Rows:
        """The row kernel on rows ``where`` (None: all)."""
        q = self.q if where is None else self.q[:, :, where]
        return rows(
            q,
            self.k,
            self.v if "output" in wants else None,
            **{**self.scores.device_arguments, "mask": mask or self.mask},
            sinks=self.sinks if sinks else None,
            features=features,
            wants=frozenset(wants),
            positions=None if where is None else (where + self.mask.query_offset).to(torch.int32),
        )

    def _rows(self) -> None:
        want, where = self.want, self.want.query_rows
        asked = {"lse": want.lse, "max": want.max, "entropy": want.entropy, "distance": want.distance}
        wants = {name for name, wanted in asked.items() if wanted}
        wants |= {"linear"} if want.linear is not None else set()
        if want.windows:
            wants |= {"lse", "distance"}
        if want.targets is not None or self.lists or (where is None and any(each.weighs for each in want.columns)):
            wants |= {"lse"}
        if not wants:
            return
        if want.output and where is None:
            wants |= {"output"}
        got = self._wide(self._pass(wants, where=where, features=self._parts()[0]), where)
        for name, wanted in asked.items():
            if wanted:
                setattr(self.result, name, getattr(got, name))
        self.result.linear, self.result.output = got.linear, got.output
        if where is None:
            self.all_lse = got.lse
        if want.windows:
            assert got.lse is not None and got.distance is not None
            self._windows(got.lse, got.distance)
        if want.targets is not None:
            assert got.lse is not None
            self._targets(got.lse, want.targets, where)
        if self.lists:
            assert got.lse is not None
            self._top(got.lse, where)

    def _targets(self, lse: Tensor, targets: Tensor, where: Tensor | None) -> None:
        from headscope.kernels.triton.targets import target_mass  # see ``gpu_passes``

        options = self.scores.device_arguments
        self.result.target_mass = target_mass(self.q, self.k, lse, targets, rows=where, **options)

    def _top(self, lse: Tensor, where: Tensor | None) -> None:
        self.result.top_mass, self.result.top_keys = top_keys(
            self.q if where is None else self.q[:, :, where],
            self.k,
            lse,
            count=self.want.top,
            positions=None if where is None else (where + self.mask.query_offset).to(torch.int32),
            **self.scores.device_arguments,
        )

    def _windows(self, lse: Tensor, distance: Tensor) -> None:
        """Sums over ``gap < w`` are the row kernel's under ``left = w - 1``, weighted by exp(lse_w - lse).

        sum_j p min(gap, w) = w (mass - mass_w) + sum over gap < w of p gap; the window's mass also asks gap >= 0.
        """
        mask, where = self.mask, self.want.query_rows
        whole = torch.ones_like(lse)
        if self.sinks is not None:
            whole = _share(self._pass({"lse"}, where=where, sinks=False).lse, lse)
        masses, distances = [], []
        for w in self.want.windows:
            left = w - 1 if mask.left is None else min(w - 1, mask.left)
            near = self._pass({"lse", "distance"}, where=where, mask=replace(mask, left=left), sinks=False)
            mass = _share(near.lse, lse)
            assert near.distance is not None
            distances.append(w * (whole - mass) + mass * near.distance)
            if mask.right is None or mask.right > 0:
                past = replace(mask, left=left, right=0)
                mass = _share(self._pass({"lse"}, where=where, mask=past, sinks=False).lse, lse)
            masses.append(mass)
        empty = (lse == -torch.inf)[..., None]
        self.result.window_mass = torch.stack(masses, -1).masked_fill_(empty, 0.0)
        self.result.window_distance = torch.stack(distances, -1).masked_fill_(empty, 0.0)

    def _output(self) -> None:
        if not self.want.output or self.result.output is not None:
            return
        if self.scores.is_plain and library.covers(self.mask, self.q.shape[2], self.k.shape[2]):
            self.result.output = library.attention(self.scores, self.v)
        else:
            self.result.output = self._pass({"output"}).output

    def _columns(self, want: Columns) -> ReducedColumns:
        if not want.weighs:
            return ReducedColumns()
        which, part, lse = want.rows(self.q.shape[2]), self.scores, self.all_lse
        if lse is None:  # rows were asked of other queries, or not at all
            part, which = part.rows(slice(*which)), (0, which[1] - which[0])
            lse = rows(part.q, part.k, None, sinks=self.sinks, **part.device_arguments).lse
        assert lse is not None
        options: dict[str, Any] = {"queries": which, "total": want.sum, "highest": want.max}
        sums, most = columns(part.q, part.k, lse, **options, **part.device_arguments)
        return ReducedColumns(sums, most)


def _share(part: Tensor | None, lse: Tensor) -> Tensor:
    """exp(part - lse), 0 where either is empty."""
    assert part is not None
    return torch.exp(torch.where(part == -torch.inf, -torch.inf, part - lse))
