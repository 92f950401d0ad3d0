"""Every model type of the installed transformers: traced right, refused by name, or not buildable so small.

    python -m headscope.interp.models.sweep            # rewrites SUPPORT.md and SUPPORT.json beside this file

"Right" means that at every attention call the model's own attention function, fed one-hot values, gave the pattern that
we compute (``headscope.interp.verify``); that the logits under tracing equal those without; and that every recorded
statistic equals the one computed from the weights of the model's eager code, wherever that runs.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headscope.interp.errors import HeadscopeError

Outcome = Literal["right", "refused", "not buildable", "wrong"]
_MAPPINGS = {
    "causal-lm": ("CAUSAL_LM",),
    "image-text": ("IMAGE_TEXT_TO_TEXT",),
    "encoder": ("MASKED_LM", "TEXT_ENCODING", "IMAGE", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
}


@dataclass(frozen=True)
class Finding:
    """What the sweep found of one model type. ``towers`` holds the layers that attended, by site."""

    kind: str
    model_type: str
    outcome: Outcome
    why: str = ""
    towers: dict[str, list[int]] | None = None
    eager: bool = False


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
    """Build one tiny model and find out, in this process."""
    from headscope.interp.models.compare import compare_model
    from headscope.interp.models.inputs import example_inputs
    from headscope.interp.models.tiny import tiny_model
    from headscope.interp.sites.towers import default_tower, tower
    from headscope.interp.verify import verify

    try:
        model = tiny_model(model_type, kind)  # type: ignore[arg-type]
        inputs = example_inputs(model)
    except HeadscopeError as error:
        return Finding(kind, model_type, "not buildable", str(error))
    try:
        found = verify(model, inputs)
        if not found.passed:
            why = found.problems[0] if found.problems else "its attention never calls transformers' interface"
            return Finding(kind, model_type, "refused", why)
        seen = compare_model(model, inputs, found.layers)
    except HeadscopeError as error:
        return Finding(kind, model_type, "refused", str(error))
    wrong = [f"{site}: {one.wrong}" for site, one in seen.items() if one.wrong]
    refused = [f"{site}: {one.refused}" for site, one in seen.items() if one.refused]
    main = default_tower(set(seen), model)
    outcome: Outcome = "right"
    if any(one.refused for site, one in seen.items() if tower(site, model) == main):
        outcome = "refused"
    notes = [f"{site}: layers see different windows, trace them by layers=" for site, one in seen.items() if one.alone]
    if kind == "image-text" and not any("pixel" in name or "image" in name for name in inputs):
        notes.append("on text alone: none of our images fits it, so its other towers were not reached")
    towers = {site: sorted(set(found.layers[site])) for site, one in seen.items() if not one.refused}
    why = "; ".join(wrong or [*refused, *notes])
    return Finding(kind, model_type, "wrong" if wrong else outcome, why, towers, any(o.eager for o in seen.values()))


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


def check_apart(kind: str, model_type: str, timeout: float = 60.0) -> Finding:
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
    timeout: float = 60.0,
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


def to_markdown(findings: Sequence[Finding]) -> str:
    """The support table."""
    import torch
    import transformers

    from headscope.interp.sites.support import table

    lines = [
        "# Which architectures are traced",
        "",
        f"Written by `python -m headscope.interp.models.sweep` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}; do not edit. Every model is built tiny with random weights.",
        "",
        "| | " + " | ".join(("right", "refused", "not buildable", "wrong")) + " |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(f.kind for f in findings):
        count = Counter(f.outcome for f in findings if f.kind == kind)
        cells = [str(count[o]) for o in ("right", "refused", "not buildable", "wrong")]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "## Statistics", "", table(), ""]
    for kind in dict.fromkeys(f.kind for f in findings):
        lines += [f"## {kind}", "", "| model type | outcome | towers or reason |", "|---|---|---|"]
        lines += [_row(f) for f in findings if f.kind == kind]
        lines.append("")
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    if finding.towers is not None and finding.outcome == "right":
        text = ", ".join(f"`{site}`" for site in finding.towers)
        text += f" ({finding.why})" if finding.why else ""
        text += "" if finding.eager else " (no eager weights to compare with: checked by pattern tiles)"
    else:
        text = finding.why.replace("|", "/").replace("<", "&lt;")
    return f"| {finding.model_type} | {finding.outcome} | {text} |"


def main(arguments: Sequence[str]) -> int:
    """Sweep everything, or the types named; only a whole sweep is written."""
    folder = Path(__file__).parent
    findings = sweep(
        types=arguments or None, report=lambda f: print(f.kind, f.model_type, f.outcome, f.why, flush=True)
    )
    print(dict(Counter((f.kind, f.outcome) for f in findings)))
    if not arguments:
        (folder / "SUPPORT.md").write_text(to_markdown(findings) + "\n")
        (folder / "SUPPORT.json").write_text(json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    return 1 if any(f.outcome == "wrong" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
