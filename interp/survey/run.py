"""Every model type of the installed transformers: traced right, refused by name, or not buildable so small.

    python -m headscope.interp.survey.run            # everything; rewrites SUPPORT.* and the README's table
    python -m headscope.interp.survey.run llava bert # these types, printed only
    python -m headscope.interp.survey.run --update llava bert  # these types anew, the other rows as they stand
    python -m headscope.interp.survey.run --tables   # the tables again, from SUPPORT.json

"Right" means that at every attention call the model's own attention function, fed one-hot values, gave the pattern that
we compute (``sites.huggingface.verify``); that the logits under tracing equal those without; and that every recorded
statistic equals the one computed from the weights of the model's eager code, wherever that runs. What was compared
beside that one padded pass (``survey.further``) stands in each row; a type that fails one of them is wrong.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import PreTrained
from headscope.interp.survey.table import Finding, Outcome, Support

_MAPPINGS = {
    "causal-lm": ("CAUSAL_LM",),
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "encoder": ("MASKED_LM", "TEXT_ENCODING", "IMAGE", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
}


def model_types(kind: str) -> list[str]:
    """The model types of transformers that have a model of this kind, sorted."""
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for name in _MAPPINGS[kind]:
        found |= set(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}))
    if kind == "encoder":
        found &= set(modeling_auto.MODEL_MAPPING_NAMES)
        for other in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
            names = set(getattr(modeling_auto, f"MODEL_FOR_{other}_MAPPING_NAMES"))
            found -= names - set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    return sorted(found)


def check_type(kind: str, model_type: str) -> Finding:
    """Build one tiny model and find out, in this process.

    A model of images and text that is refused with images, because of its vision tower, is looked at on text alone.
    """
    from headscope.interp.sites.inputs import example_inputs, given
    from headscope.interp.survey.tiny import tiny_model

    try:
        model = tiny_model(model_type, kind)  # type: ignore[arg-type]
        inputs = example_inputs(model)
    except HeadscopeError as error:
        return Finding(kind, model_type, "not buildable", str(error))
    found = check_model(kind, model_type, model, inputs, partial(tiny_model, model_type, kind))  # type: ignore[arg-type]
    if kind != "image-text" or found.outcome == "wrong":
        return found
    if "images" not in given(inputs):
        return _noted(found, "on text alone: none of our images fits it, so its other towers were not reached")
    if found.outcome == "refused":
        try:
            alone = check_model(kind, model_type, model, example_inputs(model, images=False))
        except HeadscopeError:
            return found
        return _noted(alone, f"on text alone; with images: {found.why}") if alone.outcome == "right" else found
    return found


def check_model(
    kind: str,
    model_type: str,
    model: PreTrained,
    inputs: dict[str, Any],
    rebuilt: Callable[..., Any] | None = None,
) -> Finding:
    """Verify and compare one model on ``inputs``; ``rebuilt(**sizes)`` makes it with other sizes."""
    from headscope.interp.sites import verify
    from headscope.interp.sites.inputs import given
    from headscope.interp.sites.towers import default_tower, tower_of
    from headscope.interp.survey.compare import compare_model
    from headscope.interp.survey.further import further

    words = given(inputs)
    try:
        found = verify(model, inputs)
        if not found.passed:
            why = found.problems[0] if found.problems else "its attention never calls transformers' interface"
            return Finding(kind, model_type, "refused", why, inputs=words)
        seen = compare_model(model, inputs, found.layers)
    except HeadscopeError as error:
        return Finding(kind, model_type, "refused", str(error), inputs=words)
    wrong = [f"{module}: {one.wrong}" for module, one in seen.items() if one.wrong]
    refused = [f"{module}: {one.refused}" for module, one in seen.items() if one.refused]
    main = default_tower(set(seen), model)
    outcome: Outcome = "wrong" if wrong else "right"
    if not wrong and any(one.refused for module, one in seen.items() if tower_of(module, model) == main):
        outcome = "refused"
    more = further(model, inputs, rebuilt) if outcome == "right" else []
    wrong += [str(one) for one in more if one.wrong]
    outcome = "wrong" if wrong else outcome
    notes = [f"{module}: layers {_and(one.kinds)} are a record each" for module, one in seen.items() if one.kinds]
    towers = {module: sorted(set(found.layers[module])) for module, one in seen.items() if not one.refused}
    why, eager = "; ".join(wrong or [*refused, *notes]), any(one.eager for one in seen.values())
    return Finding(kind, model_type, outcome, why, towers, words, eager, tuple(str(one) for one in more))


def _and(kinds: Sequence[list[int]]) -> str:
    return " and ".join(str(layers) for layers in kinds)


def _noted(finding: Finding, note: str) -> Finding:
    return replace(finding, why="; ".join(part for part in (finding.why, note) if part))


def _child(kind: str, model_type: str, pipe: Any) -> None:
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        found = check_type(kind, model_type)
    except Exception as error:  # a model that fails in a way nobody foresaw must not look supported
        lines = str(error).strip().splitlines() or [""]
        found = Finding(kind, model_type, "wrong", f"unexpected {type(error).__name__}: {lines[0][:200]}")
    pipe.send(found)


def check_apart(kind: str, model_type: str, timeout: float = 120.0) -> Finding:
    """``check_type`` in a process of its own that may crash or take too long."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, model_type, there))  # type: ignore[attr-defined]
    process.start()
    there.close()
    try:
        if here.poll(timeout):
            with suppress(EOFError):
                return here.recv()  # type: ignore[no-any-return]
            return Finding(kind, model_type, "not buildable", "the process that built it died (memory)")
        return Finding(kind, model_type, "not buildable", f"takes more than {timeout:.0f} s even when tiny")
    finally:
        process.kill()
        process.join()


def sweep(
    kinds: Sequence[str] = tuple(_MAPPINGS),
    types: Sequence[str] | None = None,
    *,
    timeout: float = 120.0,
    report: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Check every model type of ``kinds`` (only ``types``, if given), one at a time, each in a process of its own."""
    check_type("causal-lm", "llama")  # what this loads, the processes inherit
    found = []
    for kind, model_type in _todo(kinds, types):
        found.append(check_apart(kind, model_type, timeout))
        report(found[-1])
    return found


def _todo(kinds: Sequence[str], types: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    for kind in kinds:
        for model_type in model_types(kind):
            if types is None or model_type in types:
                yield kind, model_type


def main(arguments: Sequence[str]) -> int:
    """Sweep everything, or the types named, which are written only with ``--update``. ``--tables`` sweeps nothing."""
    if list(arguments) == ["--tables"]:
        Support.read().write_tables()
        return 0
    types = [name for name in arguments if name != "--update"]
    findings = sweep(
        types=types or None,
        report=lambda f: print(f.kind, f.model_type, f.outcome, f.why, *f.compared, sep=" | ", flush=True),
    )
    print(dict(Counter((f.kind, f.outcome) for f in findings)))
    if not types:
        Support.of(findings).write()
    elif len(types) < len(arguments):
        Support.read().updated(findings).write()
    return 1 if any(f.outcome == "wrong" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
