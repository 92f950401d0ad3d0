"""The support tables: what a sweep found, as SUPPORT.json, SUPPORT.md and the short table in the README.

Only ``python -m headscope.interp.survey.run`` writes them; with ``--tables`` the two tables again, from SUPPORT.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headscope.interp.errors import HeadscopeError

Outcome = Literal["right", "refused", "not buildable", "wrong"]
OUTCOMES: tuple[Outcome, ...] = ("right", "refused", "not buildable", "wrong")
FOLDER = Path(__file__).resolve().parent
README = FOLDER.parents[1] / "README.md"
BEGIN, END = "<!-- support: written by `python -m headscope.interp.survey.run` -->", "<!-- end of support -->"

# The architectures that the README names: title, kind of the sweep, model types.
NAMED: tuple[tuple[str, str, str], ...] = (
    (
        "language",
        "causal-lm",
        "llama llama4 mistral mixtral qwen2 qwen3 qwen3_moe qwen3_next gemma2 gemma3 gemma3n_text gemma4 phi phi3 gpt2 "
        "opt gpt_neox gpt_bigcode starcoder2 cohere olmo2 granite smollm3 gpt_oss deepseek_v3 stablelm "
        "falcon bloom mpt gptj gpt_neo codegen",
    ),
    ("encoders", "encoder", "bert modernbert vit dinov2 siglip clip"),
    ("encoder-decoders, self- and cross-attention apart", "encoder-decoder", "whisper t5"),
    (
        "images and text",
        "image-text",
        "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl gemma3 idefics3 smolvlm paligemma",
    ),
)


@dataclass(frozen=True)
class Finding:
    """What the sweep found of one model type.

    ``compared``: what was compared beside a padded pass, in words. ``towers``
    holds the layers that attended and were compared, by pattern; ``inputs`` what the model was given;
    ``eager``: its own eager weights were there to compare with.
    """

    kind: str
    model_type: str
    outcome: Outcome
    why: str = ""
    towers: dict[str, list[int]] | None = None
    inputs: str = ""
    eager: bool = False
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Support:
    """A whole sweep: the versions it ran with and what it found."""

    versions: dict[str, str]
    findings: list[Finding]

    @classmethod
    def of(cls, findings: Sequence[Finding]) -> Support:
        """The findings of the libraries installed now."""
        import torch
        import transformers

        torch_version = torch.__version__.partition("+")[0]
        return cls({"transformers": transformers.__version__, "torch": torch_version}, list(findings))

    @classmethod
    def read(cls, path: Path = FOLDER / "SUPPORT.json") -> Support:
        """What the last whole sweep left."""
        held: dict[str, Any] = json.loads(path.read_text())
        return cls(
            held["versions"],
            [Finding(**{**entry, "compared": tuple(entry.get("compared", ()))}) for entry in held["findings"]],
        )

    def updated(self, findings: Sequence[Finding]) -> Support:
        """With these findings in the place of older ones, and the other rows as they are.

        Raises:
            HeadscopeError: other libraries are installed than those that the other rows are of.
        """
        new = Support.of(findings)
        if new.versions != self.versions:
            raise HeadscopeError(f"the other rows are of {self.versions}, not {new.versions}: sweep everything")
        found = {(f.kind, f.model_type): f for f in findings}
        return Support(self.versions, [found.get((f.kind, f.model_type), f) for f in self.findings])

    def write(self, folder: Path = FOLDER, readme: Path = README) -> None:
        """SUPPORT.json and SUPPORT.md in ``folder``, and the block between the marks of ``readme``, if there is one."""
        held = {"versions": self.versions, "findings": [asdict(finding) for finding in self.findings]}
        (folder / "SUPPORT.json").write_text(json.dumps(held, indent=1) + "\n")
        self.write_tables(folder, readme)

    def write_tables(self, folder: Path = FOLDER, readme: Path = README) -> None:
        """The two tables, without SUPPORT.json."""
        (folder / "SUPPORT.md").write_text(to_markdown(self) + "\n")
        if readme.exists():
            readme.write_text(with_block(readme.read_text(), readme_block(self)))


def readme_block(support: Support) -> str:
    """The README's table: the named architectures, then the count of all."""
    found = {(f.kind, f.model_type): f for f in support.findings}
    lines = [BEGIN, "| | traced right | refused by name |", "|---|---|---|"]
    for title, kind, names in NAMED:
        cells: dict[str, list[str]] = {"right": [], "refused": []}
        for name in names.split():
            finding = found.get((kind, name), Finding(kind, name, "not buildable"))
            cells.setdefault(finding.outcome, []).append(name + _partly(finding))
        listed = [f"{outcome}: {', '.join(cells[outcome])}" for outcome in OUTCOMES[2:] if outcome in cells]
        right = "; ".join([", ".join(cells["right"]), *listed])
        lines.append(f"| {title} | {right} | {', '.join(cells['refused'])} |")
    count = Counter(f.outcome for f in support.findings)
    everything = f"every model type of transformers {support.versions['transformers']}"
    rest = f"{count['not buildable']} could not be built or run tiny; silently wrong: {count['wrong']}"
    lines.append(f"| {everything} ({rest}) | {count['right']} | {count['refused']} |")
    return "\n".join([*lines, END])


def _partly(finding: Finding) -> str:
    """A model of images and text whose vision tower was not compared says so."""
    seen = finding.kind == "image-text" and finding.outcome == "right" and len(finding.towers or {}) < 2
    return " (language tower only)" if seen else ""


def with_block(text: str, block: str) -> str:
    """``text`` with what stands between the marks replaced.

    Raises:
        HeadscopeError: the marks are not there, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise HeadscopeError(f"the README needs the lines {BEGIN!r} and {END!r} around its support table")
    return before + block + after


def to_markdown(support: Support) -> str:
    """SUPPORT.md."""
    from headscope.interp.statistics.exactness import table

    findings, versions = support.findings, support.versions
    lines = [
        "# Which architectures are traced",
        "",
        f"Written by `python -m headscope.interp.survey.run` with transformers {versions['transformers']} and torch "
        f"{versions['torch']}; do not edit. Every model is built tiny with random weights; the last columns say what "
        "it was given, and what was compared beside a pass over a batch padded at both ends (logits with those of the "
        "untraced model, statistics with the weights of its own eager code).",
        "",
        "| | " + " | ".join(OUTCOMES) + " |",
        "|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys(f.kind for f in findings)
    for kind in kinds:
        count = Counter(f.outcome for f in findings if f.kind == kind)
        lines.append(f"| {kind} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + " |")
    lines += ["", "## Statistics", "", table(), ""]
    for kind in kinds:
        lines += [
            f"## {kind}",
            "",
            "| model type | outcome | towers or reason | inputs | also compared |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(f) for f in findings if f.kind == kind]
        lines.append("")
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    if finding.towers is not None and finding.outcome == "right":
        text = ", ".join(f"`{module}`" for module in finding.towers)
        text += f" ({finding.why})" if finding.why else ""
        text += "" if finding.eager else " (no eager weights to compare with: checked by pattern tiles)"
    else:
        text = finding.why.replace("|", "/").replace("<", "&lt;")
    return f"| {finding.model_type} | {finding.outcome} | {text} | {finding.inputs} | {'; '.join(finding.compared)} |"
