"""The exact loss of policies at budgets, layer by layer and head by head, over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.measuring import AHEAD, Ahead, Measuring
from headscope.interp.cache.policy import Policy
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.cache import MEASURES, NAME, CacheLosses, plain
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.rotary import rotations
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sweeps.batches import Prompts

At = Literal["decode", "prefill"]


def lose(
    lm: Loadable,
    policies: str | Policy | Iterable[str | Policy],
    budgets: Iterable[int | float | str | Budget],
    prompts: Any,
    *,
    answer: int = 64,
    at: At = "decode",
    first: int = 0,
    layers: Sequence[int] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> CacheLosses:
    """What each policy loses at each budget, exactly, with no query x key tensor.

    ``at="decode"``: of each text the last ``answer`` tokens stand for the answer, and what is before them is the
    prompt. Keys are chosen when the prompt was read; the rows of the answer see what was kept, and all keys since. One
    pass over the text gives the same rows as a prefill and decoding steps. ``at="prefill"``: the whole text is the
    prompt, and its own rows are measured: what a sparse mask would lose while reading. A policy that chooses keys once,
    at the end, is then held to rows that it was chosen from.

    Args:
        lm: load_model's result, or what load_model takes.
        policies: names of ``POLICIES`` or declarations with their settings.
        budgets: numbers of keys, or shares of the prompt's tokens.
        prompts: texts, or sequences of token ids, one trial each.
        answer: rows that are measured at the end of each text.
        first: with ``at="prefill"``, the first row that is measured.
        layers: only these (by default all that attend).
        out: folder for ``cache.json``, ``cache.parquet`` and the journal that makes a killed run resume.

    Raises:
        HeadscopeError: no policy or two of one name, no prompt or one twice, one not longer than ``answer``, a prompt
            too short or a budget too small for a policy (``Policy.check``), or a model that cannot be traced exactly.

    Warns where a budget holds every prompt whole, and of policies that had nothing to choose or dropped nothing.
    """
    folder, lm, chosen = folder_of(out), load_model(lm), _named(policies)
    asked = _budgets(budgets)
    _check(lm, chosen, at, answer, first, layers)
    given = Prompts(lm, prompts)
    _check_lengths(given.lengths, at, answer, first)
    _check_each_once(given)
    _check_policies(chosen, asked, _prompt_tokens(given.lengths, at, answer))
    config: dict[str, Any] = {
        "policies": list(chosen),
        "settings": [_settings(policy) for policy in chosen.values()],
        "budgets": [str(budget) for budget in asked],
        "prompts_sha256": given.sha256,
        "measures": list(MEASURES),
        **{"at": at, "answer": answer, "first": first, "layers": layers},
    }
    made = provenance(lm, **config)
    files = [f"{NAME}.{end}" for end in ("json", "parquet", "trials.jsonl")] if folder else []
    turned = rotations(lm, None) if any("rotation" in policy.needs for policy in chosen.values()) else {}
    passes = 1 + sum("ahead" in policy.needs for policy in chosen.values())
    announce(((n, 0) for n in given.lengths for _ in range(passes)), files)

    def step(index: int) -> dict[str, Any]:
        ids = given.batch([index])["input_ids"]
        prompt = _prompt_tokens([ids.shape[1]], at, answer)[0]
        measured = prompt if at == "decode" else first, ids.shape[1]
        handler = Measuring(list(chosen.values()), asked, prompt, measured, turned)
        handler.ahead = {i: _ahead(lm, policy, ids[:, :prompt]) for i, policy in enumerate(chosen.values())}
        with attached(lm, handler, layers=layers), torch.no_grad():
            lm.forward(ids, logits=1)
        found = {name: plain(x) for name, x in handler.full(lm.info.layers, lm.info.heads).items()}
        return {"tokens": ids.shape[1], "prompt": prompt, **found}

    path = None if folder is None else folder / f"{NAME}.trials.jsonl"
    with opened(path, {"model": made.get("model"), **config}) as journal:
        results = run_steps(journal, len(given), step, "prompts", progress=progress)
    values = {name: np.stack([np.array(one[name], dtype=np.float64) for one in results], axis=2) for name in MEASURES}
    common = np.stack([np.array(one["overlap"], dtype=np.float64) for one in results], axis=-1)
    details = tuple({"tokens": one["tokens"], "prompt": one["prompt"]} for one in results)
    found = CacheLosses(tuple(chosen), tuple(str(b) for b in asked), values, common, made, details)
    _say_whole(found, asked)
    if folder is not None:
        found.save(folder)
    return found


def _check(
    lm: LanguageModel, policies: dict[str, Policy], at: str, answer: int, first: int, layers: Sequence[int] | None
) -> None:
    """Refuse what cannot be asked of any text."""
    if answer is None or first is None:
        raise HeadscopeError("answer and first are whole numbers; leave them out for their defaults")
    check_counts(1, answer=answer)
    check_counts(0, first=first)
    if at not in ("decode", "prefill"):
        raise HeadscopeError(f"at must be 'decode' or 'prefill', not {at!r}")
    whole = _several(layers) and all(isinstance(x, Integral) and not isinstance(x, bool) for x in layers or ())
    if layers is not None and not (whole and layers and len(set(layers)) == len(layers)):
        raise HeadscopeError(f"layers is a list of different layers, [0, 5], or None for all, not {layers!r:.60}")
    tower_size(lm, None).check_layers(layers or ())
    if getattr(lm.model.config, "is_encoder_decoder", False):
        raise HeadscopeError(f"{lm.name} reads with an encoder: keys are kept of one sequence, in a decoder alone")
    for name, policy in policies.items():
        if layers is not None and "carried" in policy.needs:
            raise HeadscopeError(f"{name} goes by what it decided in the layers below: measure all layers (no layers=)")


def _check_lengths(lengths: Sequence[int], at: str, answer: int, first: int) -> None:
    """Refuse texts that are too short for what is measured of them."""
    shortest = min(lengths)
    if at == "decode" and shortest <= answer:
        raise HeadscopeError(
            f"a prompt has {shortest} tokens, of which the last {answer} are the answer: give longer ones, or a "
            "smaller answer="
        )
    if first >= shortest or (first and at == "decode"):
        raise HeadscopeError(f"first={first} is a row of at='prefill', and the shortest text has {shortest} tokens")


def _prompt_tokens(lengths: Sequence[int], at: str, answer: int) -> list[int]:
    """How many tokens of texts are the prompt."""
    return [n - answer if at == "decode" else n for n in lengths]


def _check_each_once(given: Prompts) -> None:
    """Refuse a text that is there twice: the interval would take it for two that agree."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(len(given)):
        first = seen.setdefault(tuple(given.batch([i])["input_ids"][0].tolist()), i)
        if first != i:
            raise HeadscopeError(
                f"prompt {i} is prompt {first} again, and would count as one more: give each prompt once"
            )


def _check_policies(policies: Mapping[str, Policy], budgets: Sequence[Budget], prompts: Sequence[int]) -> None:
    """Refuse policies and budgets that do not fit prompts of so many tokens; warn where nothing is left to choose."""
    tokens = torch.tensor(prompts)
    for budget in budgets:
        kept = budget.count(tokens)
        for policy in policies.values():
            policy.check(tokens, kept)
        if bool((kept >= tokens).all()):
            _warn(f"a budget of {budget} holds every prompt whole (the longest has {max(prompts)} tokens)")
        for name, policy in policies.items():
            if why := policy.idle(tokens, kept):
                _warn(f"{name} at a budget of {budget}: {why}; give a larger budget, or smaller settings")


def _warn(line: str) -> None:
    """A warning of whoever called ``lose``."""
    warnings.warn(line, stacklevel=4)


def _say_whole(found: CacheLosses, budgets: Sequence[Budget]) -> None:
    """Warn of policies that dropped nothing, at budgets below every prompt."""
    prompts = torch.tensor([one["prompt"] for one in found.details])
    for j, budget in enumerate(budgets):
        for policy, error in zip(found.policies, found.values["error"][:, j], strict=True):
            if np.nanmax(error) < 1e-6 and bool((budget.count(prompts) < prompts).all()):
                _warn(
                    f"{policy} dropped nothing at a budget of {budget}: its settings reach beyond these prompts, or "
                    "its rule saw no need; this is no measure of what it loses"
                )


def _budgets(budgets: Any) -> list[Budget]:
    """One budget or several."""
    given = [budgets] if isinstance(budgets, int | float | str | Budget) else budgets
    asked = [Budget.of(x) for x in given] if _several(given) else []
    if not asked or len(set(asked)) < len(asked):
        raise HeadscopeError(f"give at least one budget, and each once, e.g. budgets=[64, 256], not {budgets!r:.60}")
    return asked


def _several(given: Any) -> bool:
    """Whether it is a collection, and no text."""
    return isinstance(given, Iterable) and not isinstance(given, str)


def _named(policies: str | Policy | Iterable[str | Policy]) -> dict[str, Policy]:
    """Policies by the names that results call them: that of the registry, and settings that differ from the default."""
    given = [policies] if isinstance(policies, str | Policy) else policies
    if not _several(given):
        raise HeadscopeError(
            f"policies are names or declarations, such as 'snapkv' or SnapKV(window=16), not {given!r:.60}"
        )
    made = [each if isinstance(each, Policy) else POLICIES[each]() for each in given]
    named = {_label(policy): policy for policy in made}
    if not named or len(named) < len(made):
        raise HeadscopeError("name at least one policy, and each once; `headscope list policies` shows them")
    return named


def _label(policy: Policy) -> str:
    other = {f.name: getattr(policy, f.name) for f in fields(policy) if getattr(policy, f.name) != f.default}
    other = {key: _told(value) for key, value in other.items()}
    return policy.name + (f"({', '.join(f'{key}={value}' for key, value in other.items())})" if other else "")


def _settings(policy: Policy) -> dict[str, Any]:
    """A policy's settings, JSON-able: a function is told by its name alone."""
    held = {field.name: getattr(policy, field.name) for field in fields(policy)}
    return {key: _told(value) for key, value in held.items()}


def _told(value: Any) -> Any:
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value


def _ahead(lm: LanguageModel, policy: Policy, ids: torch.Tensor) -> AHEAD:
    """The queries of the tokens that a policy wants read after the prompt ``ids`` (1, token), layer by layer."""
    more = policy.appended(ids[0].tolist())
    if not more:
        return {}
    handler = Ahead(ids.shape[1])
    with attached(lm, handler), torch.no_grad():
        lm.forward(torch.cat([ids, ids.new_tensor([more])], dim=1), logits=1)
    return handler.queries
