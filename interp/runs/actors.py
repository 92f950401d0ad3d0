"""Work shared out over actors of Ray, on one host or many: each holds the model and is given one piece at a time.

Plain actors, not Ray Data: the pieces are ready-made (batches of prompts, trials), so that there is no data set to
read, cut into blocks or shuffle; what is left of Ray Data's executor is what stands here. A piece is handed out when a
result was taken (back-pressure: at most two pieces an actor are under way); an actor that dies is started again, with
the pieces that it had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from headscope.interp.errors import HeadscopeError

UNDER_WAY = 2  # pieces of an actor: one that runs, one that waits


@dataclass(frozen=True)
class Ray:
    """Actors of a Ray cluster: the one that ``ray.init`` was called for, else one that is started on this host.

    Args:
        workers: actors, each with a model of its own.
        gpus: of each actor; None: one where the cluster has as many, else none. A model of several GPUs is one actor
            with ``gpus`` of them and ``device_map="auto"``.
        cpus: of each actor.
        tries: how often a piece is begun before its actors' deaths are taken for its own doing (out of memory).
    """

    workers: int = 2
    gpus: float | None = None
    cpus: float = 1
    tries: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1 or self.tries < 1:
            raise HeadscopeError(f"{self}: at least 1 worker, and 1 try")

    def map(
        self, make: Callable[[], Any], task: Callable[[Any, Any], Any], pieces: Iterable[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Each piece's number and ``task(make(), piece)``, in the order in which they are finished; ``make`` runs once
        an actor.

        Raises:
            HeadscopeError: Ray is not installed, what a task refuses, and a piece whose actors died ``tries`` times.
        """
        ray = _ray()
        each = self._gpus(ray)
        actor = ray.remote(num_cpus=self.cpus, num_gpus=each, max_restarts=-1, max_task_retries=self.tries - 1)(_Actor)
        made = ray.put(make)  # once: it may hold a model
        actors = [actor.remote(made, task) for _ in range(self.workers)]
        try:
            yield from self._results(ray, actors, enumerate(pieces))
        finally:
            for one in actors:
                ray.kill(one)

    def _gpus(self, ray: Any) -> float:
        if self.gpus is not None:
            return self.gpus
        return 1.0 if ray.cluster_resources().get("GPU", 0) >= self.workers else 0.0

    def _results(self, ray: Any, actors: list[Any], pieces: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        running: dict[Any, tuple[Any, int]] = {}

        def give(one: Any) -> None:
            for number, piece in itertools.islice(pieces, 1):
                running[one.run.remote(piece)] = one, number

        for one in actors * UNDER_WAY:
            give(one)
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            one, number = running.pop(done)
            try:
                refused, result = ray.get(done)
            except ray.exceptions.RayActorError as error:
                raise HeadscopeError(
                    f"the workers that were given piece {number} died {self.tries} times (out of "
                    "memory, perhaps): what is finished is kept; run it again with smaller pieces (memory=, batch=)"
                ) from error
            if refused is not None:
                raise HeadscopeError(refused)
            give(one)
            yield number, result


class _Actor:
    """Holds what ``make`` gives. A refusal travels as text: an exception of ours would come back as one of Ray's."""

    def __init__(self, make: Callable[[], Any], task: Callable[[Any, Any], Any]) -> None:
        self.make, self.task, self.held = make, task, None

    def run(self, piece: Any) -> tuple[str | None, Any]:
        """The task's refusal, or its result."""
        try:
            if self.held is None:
                self.held = self.make()
            return None, self.task(self.held, piece)
        except HeadscopeError as error:
            return str(error), None


def engine_of(given: Ray | str | None) -> Ray | None:
    """``"ray"`` or a ``Ray`` as the engine; None: this process, and those that were launched with it.

    Raises:
        HeadscopeError: another name.
    """
    if given is None or isinstance(given, Ray):
        return given
    if given != "ray":
        raise HeadscopeError(f"no engine {given!r}: give 'ray', Ray(workers=4), or None for this process")
    return Ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise HeadscopeError("engine='ray' needs Ray: pip install 'headscope[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray
