"""The tracer: records declared statistics of every forward pass inside a ``with trace(...)`` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from headscope.interp.assemble import Session
from headscope.interp.attention import AttentionCall, Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.provenance import provenance
from headscope.interp.queries import Queries
from headscope.interp.record import concatenate
from headscope.interp.sites import attached
from headscope.interp.statistics import KEY, OUTPUT, Plan, Reader, Statistic
from headscope.interp.verify import verify_once
from headscope.kernels.request import Attended, Request


class Tracer(Handler):
    """Collects statistics while attached. ``record`` assembles what was collected so far.

    A forward pass at position 0 starts new examples; one that continues a cache extends the current ones.
    """

    def __init__(
        self,
        model: Any,
        statistics: Sequence[Statistic],
        *,
        layers: Sequence[int] | None = None,
        queries: Queries | None = None,
        site: str | None = None,
    ) -> None:
        if not statistics:
            raise HeadscopeError("name at least one statistic to trace, e.g. trace(model, [Entropy()])")
        names = [name for statistic in statistics for name in statistic.variables]
        if len(set(names)) != len(names):
            raise HeadscopeError(f"two statistics write the same variable: {sorted(names)}; declare each once")
        self.model, self.statistics = model, tuple(statistics)
        self.layers = None if layers is None else frozenset(layers)
        self.queries, self.site = queries, site
        self._sessions: list[Session] = []
        self._finished: list[xr.Dataset] = []
        self._pending_ids: Tensor | None = None
        self._plans: dict[Any, tuple[Any, Request, list[tuple[Statistic, Reader]], Tensor | None]] = {}

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """Remember the tokens of the pass that begins."""
        ids = inputs.get("input_ids")
        self._pending_ids = ids.detach() if isinstance(ids, Tensor) and ids.dim() == 2 else None
        self._plans.clear()

    def request(self, call: AttentionCall) -> Request | None:
        """The declared statistics as one request, or None where this call is not recorded."""
        if (self.layers is not None and call.layer not in self.layers) or (self.site not in (None, call.site)):
            return None
        session = self._session_of(call)
        prompt = session.is_first_pass(call)
        _, request, _, rows = self._plan(call, prompt)
        if rows is not None and rows.numel() == 0 and not request.wants_keys:
            if not any(statistic.kind == OUTPUT for statistic in self.statistics):
                session.skip(call)
                return None
        return request

    def observe(self, call: AttentionCall, attended: Attended) -> None:
        """Store this call's statistics on the layer's device."""
        session = self._sessions[-1]
        _, _, readers, rows = self._plan(call, session.is_first_pass(call))
        kinds: dict[str, dict[str, Tensor]] = {}
        for statistic, reader in readers:
            if statistic.kind == OUTPUT and not session.is_first_pass(call):
                continue
            if statistic.kind != KEY and statistic.kind != OUTPUT and rows is not None and rows.numel() == 0:
                continue
            kinds.setdefault(statistic.kind, {}).update(reader(attended))
        session.add(call, rows, kinds)

    def _session_of(self, call: AttentionCall) -> Session:
        if not self._sessions or self._sessions[-1].is_over(call):
            if self._sessions:
                self._finish(self._sessions.pop())
            self._sessions.append(Session(self.statistics, call.site, call.query.shape[0]))
        session = self._sessions[-1]
        if session.site != call.site:
            raise HeadscopeError(
                f"this model attends in several towers ({session.site} and {call.site}); choose one with site=..."
            )
        if self._pending_ids is not None:
            session.add_tokens(call.mask.query_offset, self._pending_ids)
            self._pending_ids = None
        return session

    def _plan(
        self, call: AttentionCall, prompt: bool
    ) -> tuple[Any, Request, list[tuple[Statistic, Reader]], Tensor | None]:
        # layers of one pass share their mask object, so the plan is made once a pass and mask
        key = (id(call.mask), call.query.shape[2], call.key.shape[2], call.query.device, prompt)
        if key not in self._plans:
            rows = None if self.queries is None else self.queries.rows(call, prompt=prompt)
            plan = Plan(call)
            asked = [s for s in self.statistics if s.kind != OUTPUT or prompt]
            readers = [(statistic, statistic.ask(plan)) for statistic in asked]
            self._plans[key] = (call.mask, plan.request(rows), readers, rows)
        return self._plans[key]

    def _finish(self, session: Session) -> None:
        dataset = session.dataset()
        if dataset is not None:
            self._finished.append(dataset)

    @property
    def record(self) -> xr.Dataset:
        """Everything recorded so far: dimensions example, layer, head, query, key and the statistics' own.

        Raises:
            HeadscopeError: nothing was recorded.
        """
        open_sessions = [dataset for dataset in (s.dataset() for s in self._sessions) if dataset is not None]
        record = concatenate([*self._finished, *open_sessions])
        made = provenance(self.model, statistics=[str(s) for s in self.statistics], queries=str(self.queries))
        tokens = record["token"].to_numpy().tobytes() if "token" in record else b""
        made["tokens_sha256"] = _sha256(tokens)
        return record.assign_attrs(headscope=_json(made))

    def clear(self) -> None:
        """Forget everything recorded."""
        self._sessions.clear()
        self._finished.clear()


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> str:
    import json

    return json.dumps(value, default=str)


@contextmanager
def trace(
    model: Any,
    statistics: Sequence[Statistic],
    *,
    layers: Sequence[int] | None = None,
    queries: Queries | None = None,
    site: str | None = None,
    verify: bool = True,
) -> Iterator[Tracer]:
    """Record ``statistics`` of every forward pass of ``model`` inside the block; nothing stays on the model after it.

    Args:
        model: load_model's result or a Hugging Face model.
        statistics: declarations from ``headscope.interp.statistics``.
        layers: record only these layers (all by default).
        queries: ``Last(n)``, ``Every(n)`` or ``Generated()`` limit the row statistics; None records every query.
        site: which tower to record, where a model has several.
        verify: check once per model that our attention equals the model's own (see ``headscope.interp.verify``).

    Raises:
        HeadscopeError: an architecture that cannot be traced exactly, named, before anything runs.
    """
    tracer = Tracer(model, statistics, layers=layers, queries=queries, site=site)
    if verify:
        verify_once(model)
    with attached(model, tracer), torch.no_grad():
        yield tracer
