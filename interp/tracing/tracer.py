"""The tracer: records declared statistics of every forward pass inside a ``with trace(...)`` block."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import xarray as xr
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.provenance import signed
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import without_gradients
from headscope.interp.sites.towers import tower_of
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics import BLOCK, OUTPUT, ROW, BlockStatistic, CallStatistic, Resid
from headscope.interp.statistics.base import check_together
from headscope.interp.statistics.declared import Named, declared
from headscope.interp.statistics.exactness import Exactness
from headscope.interp.statistics.plan import Plans
from headscope.interp.statistics.queries import Queries, checked
from headscope.interp.tracing import layer_groups
from headscope.interp.tracing.caches import Caches, check_repeats
from headscope.interp.tracing.decoder import DecoderPosition
from headscope.interp.tracing.heap import Heap
from headscope.interp.tracing.host_copies import HostCopies
from headscope.interp.tracing.piece import Piece, Where
from headscope.interp.tracing.repeats import Repeats
from headscope.interp.tracing.session import Answer, Session
from headscope.interp.tracing.stream import StreamRecord
from headscope.kernels.request import Reduced, Request

TEXT = ("language", "decoder")  # towers that read or write text


class Tracer(Handler):
    """Collects statistics while attached. ``record`` assembles what was collected so far.

    A forward pass at position 0 starts new examples; one that continues a cache extends the current ones. A module that
    attends several times in one pass goes through images or windows: each becomes an example of its own.
    """

    only_reads = True

    def __init__(
        self,
        model: ModelLike,
        statistics: Named | Iterable[Named],
        *,
        layers: Sequence[int] | None = None,
        queries: Queries | None = None,
        tower: str | None = None,
    ) -> None:
        self.model, self.declared = model, declared(statistics)
        check_together(self.declared)
        self.statistics = tuple(each for each in self.declared if not isinstance(each, Resid))
        self._stream = StreamRecord(self.declared)
        self.streams = self._stream.places
        self.layers = None if layers is None else layer_groups.numbers_of(layers)
        self.queries, self.tower = checked(queries), tower
        self._sessions: list[Session] = []
        self._finished: list[list[xr.Dataset]] = []  # of a batch, one for every kind of layers
        self._pending_ids: Tensor | None = None
        self._plans = Plans(self.statistics, queries, Exactness(self.statistics).require)
        self._alike: dict[Any, Answer] = {}  # of this pass, by what decides it
        self._reads: dict[str, bool] = {}
        self._times: dict[int, int] = {}
        self._heap, self._host_copies, self._caches, self._decoder = Heap(), HostCopies(), Caches(), DecoderPosition()
        self._pass: list[Piece] = []
        self._answers: list[Answer] = []  # of each of them
        self._running, self._passes = False, 0  # how many passes ended
        self.boundary: int | None = None  # where the prompt ends of what `generate` reads
        self._repeats: Repeats | None = None
        self._cache: weakref.ref[Any] | None = None
        if tower == "cross" or (tower is not None and tower_of(tower, bare_model(model)) == "cross"):
            self.follows = TEXT  # queries of cross-attention stand where the decoder stands

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """Remember the tokens of the pass that begins."""
        if self._running:  # the last pass broke off where no hook could tell
            self.abort_forward()
        self._keep_pass()
        self._running = True
        ids = inputs.get("input_ids")
        self._pending_ids = ids.clone() if isinstance(ids, Tensor) and ids.dim() == 2 else None  # may be reused
        self._decoder.begin(inputs)
        cache = inputs.get("past_key_values")
        self._cache = None if cache is None else weakref.ref(cache)
        self._caches.watch(cache)

    def begin_generation(self, prompt_length: int | None) -> None:
        """Passes before position ``prompt_length`` read the prompt, those after it the response."""
        self.boundary = prompt_length

    def end_generation(self) -> None:
        """Passes are the user's own again."""
        self.boundary = None

    def fill_cache(self, cache: Any) -> None:
        """What moves examples inside it would mix them up, also in a cache that the model made itself."""
        self._caches.watch(cache)

    def end_forward(self) -> None:
        """What the pass recorded is part of the record from now on."""
        self._passes += 1
        self._running = False
        self._stream.end_forward()

    def abort_forward(self) -> None:
        """Forget what a pass recorded that did not come to its end."""
        if self._repeats is not None:
            self._repeats.drop(self._passes)
        self._running = False
        self._stream.abort_forward()
        self._pass.clear()
        self._answers.clear()
        self._keep_pass()
        self._sessions = [session for session in self._sessions if session.continues]

    def end(self) -> None:
        """The block is left, perhaps by an exception: finished passes stay recorded, nothing on the model's caches."""
        self._caches.release()
        (self.abort_forward if self._running else self._keep_pass)()

    def concerns(self, module: str, layer: int) -> bool:
        """Every layer, unless only the stream is read."""
        return bool(self.statistics)

    def stream(self, call: StreamCall) -> Tensor:
        """Record the stream."""
        self._stream.see(call)
        return call.x

    def follow(self, call: AttentionCall) -> None:
        """Remember where the decoder stands."""
        self._decoder.see(call)

    @without_gradients
    def request(self, call: AttentionCall) -> Request | None:
        """The declared statistics as one request, or None where this call is not recorded."""
        query, alike = call.query, None
        if call.layer not in self._times and not call.cross:  # where the decoder stands may change within a pass
            shapes = call.mask, query.shape, call.key.shape, query.device
            alike = *shapes, call.module, call.gaps, call.dense  # the mask itself: held, its place is nobody else's
        answer = None if alike is None else self._alike.get(alike)
        if answer is None:
            answer = self._answer(call)
            if alike is not None and answer is not None:
                self._alike[alike] = answer
        else:
            self._times[call.layer] = 1
        if answer is None:
            return None
        self._answers.append(answer)
        self._pass.append(Piece(call.layer, answer.where))
        return answer.asked

    def _answer(self, call: AttentionCall) -> Answer | None:
        """What ``call`` is asked, and where that belongs; the same for the calls of a pass that are alike."""
        if call.module not in self._reads:
            self._reads[call.module] = tower_of(call.module, bare_model(self.model)) in TEXT
        if self._reads[call.module]:
            self.follow(call)
        if not self.statistics:
            return None
        session, offset = self._session_of(call)
        prompt = session.is_prompt(call, offset, self.boundary)
        planned = self._plans.of(call, prompt=prompt, continues=session.continues)
        request, _, rows = planned
        idle = rows is not None and rows.numel() == 0 and not request.wants_keys
        idle = idle and not any(statistic.kind in (BLOCK, OUTPUT) for statistic in self.statistics)
        return Answer(planned, session, Where.of(call, offset, rows, prompt=prompt), None if idle else request)

    @without_gradients
    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Store this call's statistics: large ones of rows in host memory, the others on the layer's device."""
        answer, piece = self._answers[-1], self._pass[-1]
        _, readers, rows = answer.planned
        for statistic, reader in readers:
            if statistic.kind == ROW and rows is not None and rows.numel() == 0:
                continue
            values = statistic.measure(call, reduced, rows) if isinstance(statistic, CallStatistic) else reader(reduced)
            piece.keep(statistic, values, self._host_copies)
            if isinstance(statistic, BlockStatistic):
                piece.places = {**(piece.places or {}), statistic.recorded[0]: statistic.place(call)}
        if len(self._pass) == 1 and self.boundary is None and not answer.session.continues:
            answer.session.rooms.prepare(call, piece, self)
        self._heap.called(piece.where.shape[0] * piece.where.shape[2], call.query.device)

    def _session_of(self, call: AttentionCall) -> tuple[Session, int]:
        times = self._times.get(call.layer, 0)
        self._times[call.layer] = times + 1
        if times:
            check_repeats(bare_model(self.model), call)
        offset = call.mask.query_offset if not call.cross else self._decoder.offset()
        self._settle()
        if not self._pass and self._sessions and self._sessions[0].is_over(call, offset, self._cache):
            self._finished += self._open()
            self._sessions.clear()
        while len(self._sessions) <= times:
            self._sessions.append(Session(self.statistics, call.module, call.query.shape[0]))
        session = self._sessions[times]
        session.check(call.module, offset, self._cache)
        ids, self._pending_ids = self._pending_ids, None
        if ids is not None and not call.cross and ids.shape == (call.query.shape[0], call.query.shape[2]):
            session.add_tokens(offset, ids)
        return session, offset

    @property
    def last_pass(self) -> list[Piece]:
        """What the calls of the pass that runs, or ran last, have left."""
        return self._pass.copy()

    @property
    def continues(self) -> bool:
        """Whether something is recorded of the present text, which ``repeat`` can continue."""
        return bool(self._sessions)

    def repeat(self, offset: int, pieces: list[Piece], values: dict[str, Tensor]) -> None:
        """The pass that began ran as a graph, at position ``offset``, of one that left ``pieces``: it leaves ``values``
        (call, ...) of its rows, by name."""
        if self._repeats is None or not self._repeats.follows(offset, pieces):
            self._settle()
            self._repeats = Repeats(offset, pieces, self._cache)
        ids, self._pending_ids = self._pending_ids, None
        self._repeats.add(self._passes, values, ids)

    def _settle(self) -> None:
        repeats, self._repeats = self._repeats, None
        if repeats is not None:
            repeats.leave(self._sessions[0])

    def _keep_pass(self) -> None:
        """The pass came to its end: what it recorded becomes part of the record."""
        (pieces, self._pass), (answers, self._answers) = (self._pass, []), (self._answers, [])
        for held in (self._plans, self._alike, self._times):
            held.clear()
        if answers and all(answer is answers[0] for answer in answers):  # nearly always
            answers[0].session.add(pieces)
            return
        done = [(answer.session, piece) for answer, piece in zip(answers, pieces, strict=True)]
        kinds = layer_groups.by_layer_group(done)
        if len(kinds) < 2:
            for session, piece in done:
                session.add([piece])
            return
        layer_groups.check_no_cache(kinds, cached=self._cache is not None)
        self._sessions.clear()
        self._host_copies.wait()
        self._finished.append(layer_groups.datasets(kinds))

    def _open(self) -> list[list[xr.Dataset]]:
        self._settle()
        self._host_copies.wait()
        made = (session.dataset() for session in self._sessions)
        return [[dataset] for dataset in made if dataset is not None]

    @property
    def record(self) -> xr.Dataset:
        """Everything recorded so far: dimensions example, layer, head, query, key and the statistics' own.

        Raises:
            HeadscopeError: nothing was recorded, or layers of several kinds, which ``records`` has one by one.
        """
        found = self.records
        layer_groups.refuse_several(found)
        return found[0]

    @property
    def records(self) -> list[xr.Dataset]:
        """``record`` for every kind of layers: one, unless layers attend over different pieces of the input (windows
        and whole images) or differ in their number of heads.

        Raises:
            HeadscopeError: nothing was recorded.
        """
        if not self._running:
            self._keep_pass()
        named = {"statistics": [str(s) for s in self.declared], "queries": str(self.queries)}
        stream = self._stream.dataset()
        if stream is not None and not self.statistics:
            return [signed(stream, self.model, **named)]
        if self.layers is not None and not self.layers:
            raise HeadscopeError("nothing was recorded: layers=[] reads none; name a layer, or leave layers= out")
        entries = [*self._finished, *self._open()]
        if self._passes and not entries:
            layer_groups.refuse_none(self.model, self.tower, self.queries)
        return [signed(self._stream.beside(record), self.model, **named) for record in layer_groups.join(entries)]

    def clear(self) -> None:
        """Forget everything recorded."""
        self._stream.clear()
        self._repeats = None
        for held in (self._pass, self._answers, self._alike, self._sessions, self._finished):
            held.clear()
