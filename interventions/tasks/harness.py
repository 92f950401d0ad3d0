"""lm-evaluation-harness: its tasks, read and run a document at a time, and its model class, with edits in force.

Imports ``lm_eval``, so that only who needs it imports this file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.sites.quiet import errors_only
from headscope.interventions.applying import apply
from headscope.interventions.load import load_intervention

PER_WORD = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # a document's value: log-likelihood and its words
FEWSHOT_SEED = 1234  # lm-evaluation-harness's own


@register_model("headscope")
class HeadscopeLM(HFLM):  # type: ignore[misc] # the harness has no types
    """A model for lm-evaluation-harness that ``load_model`` reads, with a saved edit in force.

    Log-likelihoods and generations are those of ``HFLM``, which also says where a prompt ends: for edits that go by
    phase a continuation's rows are generated tokens', and a text whose perplexity is asked is all prompt. Requests run
    together where their contexts have equally many tokens.

    Args:
        pretrained: what ``load_model`` takes, or its result.
        edit: a saved edit.
        device, dtype: of ``load_model``.
        options: of ``HFLM``, such as batch_size and max_length.
    """

    def __init__(
        self,
        pretrained: Any,
        edit: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the command's default, which HFLM replaces too
        loaded = load_model(pretrained, device=device, dtype=dtype) if isinstance(pretrained, str) else pretrained
        self.loaded: LanguageModel = load_model(loaded)
        self.edits = () if edit is None else (load_intervention(edit, self.loaded),)
        with errors_only(HFLM.__module__):
            super().__init__(pretrained=self.loaded.model, tokenizer=self.loaded.required_tokenizer(), **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with apply(self.loaded, *self.edits):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with apply(self.loaded, *self.edits):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with apply(self.loaded, *self.edits):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        groups: dict[int, list[int]] = {}
        for place, (text, context, answer) in enumerate(requests):
            read = min(len(context) + len(answer) - 1, self.max_length)  # HFLM cuts from the left
            stop = read if text is None else read - len(answer) + 1
            groups.setdefault(stop, []).append(place)
        found: dict[int, Any] = {}
        for stop, places in groups.items():
            own = [requests[place] for place in places]
            with prompt_boundary(stop):
                batch = None if override_bs is None else len(own)
                answers = super()._loglikelihood_tokens(own, disable_tqdm=True, override_bs=batch)
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]


def read_tasks(name: str, include_path: str | None, num_fewshot: int | None) -> dict[str, Any]:
    """The tasks of lm-evaluation-harness that a name (of a task, group or tag) or a YAML file means, by name.

    Raises:
        HeadscopeError: an unknown name, or a task whose data cannot be loaded.
    """
    if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise HeadscopeError(f"there is no file {name}: give a YAML file of lm-evaluation-harness, or a task's name")
    try:
        found = _manager(name, include_path).load([name])["tasks"]
    except Exception as error:  # a task's YAML and its data raise anything
        said = " ".join(str(error).split())[:200]
        raise HeadscopeError(
            f"lm-evaluation-harness cannot load {name!r} ({type(error).__name__}: {said}); give a task's name (of your "
            "own with include_path) or a YAML file, and data that are on this machine"
        ) from error
    for task in found.values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return dict(found)


def _manager(name: str, include_path: str | None) -> TaskManager:
    """Reads the user's folder alone where the task is in it: the harness's own tasks take seconds."""
    folder = str(Path(name).parent) if Path(name).is_file() else include_path
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if Path(name).is_file() or name in own.all_tasks:
            return own
    return TaskManager(include_path=include_path)


class Runner:
    """Tasks of lm-evaluation-harness on one model, a document at a time.

    Requests are built all at once, in lm-evaluation-harness's order, so that few-shot examples are those of its runs.
    """

    def __init__(self, lm: LanguageModel, tasks: dict[str, Any], limit: int | None, batch: int, chat: bool) -> None:
        self.lm, self.tasks = lm, tasks
        self.harness = HeadscopeLM(lm, batch_size=batch)
        self.requests: dict[tuple[str, int], list[Any]] = {}
        for name, task in tasks.items():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            template = {"chat_template": self.harness.apply_chat_template} if chat else {}
            task.build_all_requests(limit=limit, rank=0, world_size=1, apply_chat_template=chat, **template)
            for request in task.instances:
                self.requests.setdefault((name, request.doc_id), []).append(request)
        for own in self.requests.values():
            own.sort(key=lambda request: request.idx)

    def metrics(self, name: str, document: int) -> tuple[dict[str, Any], list[Any]]:
        """What a document's metrics are on the model as it is now, before they are aggregated, and every response."""
        task, own = self.tasks[name], self.requests[name, document]
        for request in own:
            request.resps, request.filtered_resps = [], {}
        for kind in dict.fromkeys(request.request_type for request in own):
            asked = [request for request in own if request.request_type == kind for _ in range(request.repeats or 1)]
            for request, answer in zip(asked, getattr(self.harness, kind)(asked, disable_tqdm=True), strict=True):
                request.resps.append(answer)
        for each in task._filters:
            each.apply(own)
        chosen = next(iter(own[0].filtered_resps))
        kept = [request.filtered_resps[chosen] for request in own]
        return task.process_results(own[0].doc, kept), kept

    def size(self, name: str, document: int) -> tuple[int, int]:
        """Tokens that a document's requests read, and the most that they generate."""
        read = new = 0
        for request in self.requests[name, document]:
            read += len(self.harness.tok_encode("".join(part for part in request.args if isinstance(part, str))))
            if request.request_type == "generate_until":
                new += int(request.args[1].get("max_gen_toks", self.harness.max_gen_toks))
        return read, new


def plain(value: Any) -> Any:
    """A metric's value as JSON has it."""

    def known(other: Any) -> Any:
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.loads(json.dumps(value, default=known))


def score(metric: str, value: Any) -> float:
    """A document's value as a number whose direction is that of the metric.

    Perplexities have a log-likelihood and its words or bytes: minus their ratio, in nats a word or byte; the perplexity
    of a target has the log-likelihood alone: minus it, in nats.

    Raises:
        HeadscopeError: a value that is no number.
    """
    if metric in PER_WORD:
        return -float(value[0]) / max(float(value[1]), 1.0)
    if isinstance(value, bool | int | float):
        return -float(value) if metric == "perplexity" else float(value)
    raise HeadscopeError(f"a document has no number for {metric!r}, but {value!r:.60}: choose another metric")
