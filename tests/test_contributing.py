"""CONTRIBUTING.md's examples, put in place as it says, are found by the command line, run, and give what they say.

Tolerance: float32 through two layers with scores up to about 10: 1e-5, as derived in tests/interp/heads/test_heads.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.models.language_model import LanguageModel

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "interp", "probes", "interventions")
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    match[1]: match[0] for match in re.findall(r"^```python\n(# (\S+\.py)\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}
LINES = re.findall(r'The line, in `(\S+)`: `("(\w+)": "([\w.]+):(\w+)",)`', PAGE)
KINDS = ("methods", "statistics", "edits", "tasks", "variants")
WORDS = "w1 w5 w9 w2 w7 w7 w3 w1 w5 w4 w8 w8 w2 w6 w1 w1 w1 w0 w3 w2".split()
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(3)]
TOLERANCE = 1e-5

# What a user does with what was added, in one process: the lists, a discovery, an evaluation, a report, an experiment.
SESSION = """
import contextlib, io, json, sys
from headscope.interp.cli import main

def run(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(list(arguments))
        except SystemExit as stop:
            assert not stop.code, (arguments, stop.code)
    return out.getvalue()

model, pages = sys.argv[1:]
found = {kind: json.loads(run("list", kind, "--json"))[kind] for kind in KINDS}
run("discover", NAMES[0], "-m", model, "--text", "texts.txt", "--set", "length=12", "--out", "runs/heads", "--json")
run("trace", "-m", model, "-p", TEXT, "--statistics", NAMES[1], "--out", "runs/trace", "--json")
run("intervene", NAMES[2], "-m", model, "--heads", "L0H1,L1H3", "--out", "runs/edit.safetensors")
task = json.dumps([TEXT])
run("evaluate", NAMES[3], "-m", model, "--with", "runs/edit.safetensors", "--controls", "2", "--set", f"texts={task}",
    "--out", "runs/evaluation", "--json")
run("report", "runs")
few = [f"--set={x}" for x in ("positions=", "steps=1", "samples=4", "width=16", "keys=4", f"variants={NAMES[4]}")]
run("lab", "variants", *few, "--seeds", "0", "--device", "cpu", "--out", "runs/lab")
run("list", "--write", pages)
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(24)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0")
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    common = dict(vocab_size=24, num_hidden_layers=2, initializer_range=0.3, max_position_embeddings=64)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=None, **sizes, **common)).eval()
    return LanguageModel.wrap(model, tokenizer, name="tiny llama")


@pytest.fixture(scope="module")
def saved(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder."""
    folder = tmp_path_factory.mktemp("model")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def session(work: Path, path: list[Path], model: Path, names: list[str]) -> dict[str, Any]:
    """Run SESSION in ``work`` with ``path`` before every other; what the lists hold."""
    (work / "texts.txt").write_text(TEXTS[0])
    shutil.copytree(ROOT / "docs/catalogue", work / "catalogue")
    code = f"KINDS = {KINDS!r}\nNAMES = {names!r}\nTEXT = {TEXTS[0]!r}\n{SESSION}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(model), "catalogue"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    return found


def patterns(lm: LanguageModel, text: str) -> np.ndarray:
    """The untouched model's own weights: (layer, head, query, key)."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**lm.encode(text), output_attentions=True).attentions
    return torch.cat(found).double().numpy()


def top_one(lm: LanguageModel, factor: float) -> float:
    """The task's score by hand; the outputs of heads L0H1 and L1H3 are multiplied by ``factor``."""

    def by_hand(head: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = args[0].clone()
            z[..., head * 8 : head * 8 + 8] *= factor
            return (z,)

        return hook

    blocks = lm.model.model.layers
    hooks = [blocks[i].self_attn.o_proj.register_forward_pre_hook(by_hand(head)) for i, head in ((0, 1), (1, 3))]
    ids = lm.encode(TEXTS[0])["input_ids"]
    with torch.no_grad():
        said = lm.model(ids).logits[0, :-1].argmax(-1)
    for hook in hooks:
        hook.remove()
    return float((said == ids[0, 1:]).double().mean())


def check_results(lm: LanguageModel, work: Path, method: str, statistic: str, task: str, variant: str) -> None:
    """What the session wrote, against the untouched model's eager attention and a plain hook."""
    from headscope.interp import load_record
    from headscope.interp.results.evaluation import Evaluation
    from headscope.interp.results.scores import HeadScores

    p = patterns(lm, " ".join(TEXTS[0].split()[:12]))
    scores = HeadScores.load(work / "runs/heads" / f"{method}.json")
    np.testing.assert_allclose(scores.mean, p[:, :, 1:, 0].mean(-1), atol=TOLERANCE)
    p = patterns(lm, TEXTS[0])
    expected = np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum(-1))
    record = load_record(work / "runs/trace")[statistic].isel(example=0).transpose("layer", "head", "query")
    np.testing.assert_allclose(record.to_numpy(), expected, rtol=2 * TOLERANCE)
    assert expected.min() >= 1 and expected[..., -1].max() > 2
    trials = Evaluation.load(work / "runs/evaluation").trials
    means = trials.groupby("kind")["score"].mean()
    assert means["baseline"] == top_one(lm, 1.0) and means["intervention"] == top_one(lm, -1.0)
    assert (trials["task"] == task).all() and set(trials["kind"]) == {"baseline", "intervention", "control"}
    lab = json.loads((work / "runs/lab/variants/findings.json").read_text())["outcomes"][0]
    assert list(lab["curves"]) == [variant] and 0 <= lab["numbers"][f"{variant} accuracy"] <= 1
    report = (work / "runs/report.html").read_text()
    assert method.replace("_", " ") in report and "Mean mass that queries put on the first token" in report


def has_page(catalogue: Path, kind: str, name: str) -> bool:
    """Whether it is in the registry's table, with a page."""
    linked = f"| [`{name}`]({name}.md) |" in (catalogue / kind / "index.md").read_text()
    assert linked == (catalogue / kind / f"{name}.md").exists()
    return linked


def test_there_is_an_example_of_each_kind_with_its_line() -> None:
    assert [Path(name).parts[1] for name in EXAMPLES] == ["heads", "statistics", "outputs", "tasks", "laboratory"]
    assert [len(code.splitlines()) <= 50 for code in EXAMPLES.values()] == [True] * 5
    assert [line[2] for line in LINES] == ["first_token", "effective_keys", "negate_heads", "top_one", "cosine"]


def test_the_variant_is_its_formula() -> None:
    """In float64, of eight positions."""
    from headscope.interp.laboratory.decoder import Shape

    scope: dict[str, Any] = {"__name__": "cosine"}
    exec(next(code for name, code in EXAMPLES.items() if "variants" in name), scope)
    layer = scope["Cosine"](Shape(width=16, heads=2, positions="none"), 0).double()
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    cosine = (q @ k.mT) / q.norm(dim=-1, keepdim=True) / k.norm(dim=-1)[:, :, None]
    p = (10 * cosine).masked_fill(~torch.ones(8, 8).tril().bool(), -torch.inf).softmax(-1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.out((p @ v).transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


def test_one_file_and_one_line_are_enough(lm: LanguageModel, saved: Path, tmp_path: Path) -> None:
    """The examples in a copy of the repository: listed, run, reported, and with a page each."""
    skipped = shutil.ignore_patterns("__pycache__", "benchmarks", "*.md", "*.json", "*.svg")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / "headscope" / room, ignore=skipped)
    for name, code in EXAMPLES.items():
        (tmp_path / "headscope" / name).write_text(code)
    for file, line, *_ in LINES:
        path = tmp_path / "headscope" / file
        before = path.read_text()
        place = re.search(r"Registry\(\n(?: +\"[^\n]*\",\n)+ +\{\n", before)
        assert place is not None, f"{file} has no registry"
        path.write_text(before[: place.end()] + f"        {line}\n" + before[place.end() :])
    names = [line[2] for line in LINES]
    found = session(tmp_path, [tmp_path], saved, names)
    for kind, name, file in zip(KINDS, names, EXAMPLES, strict=True):
        row = next(row for row in found[kind] if row["name"] == name)
        assert row["file"] == file and row["summary"] and row["unit"] is not None
        assert has_page(tmp_path / "catalogue", kind, name) and not has_page(ROOT / "docs/catalogue", kind, name)
    check_results(lm, tmp_path, "first_token", "effective_keys", "top_one", "cosine")


def test_a_package_of_ones_own_joins_through_entry_points(lm: LanguageModel, saved: Path, tmp_path: Path) -> None:
    """The same classes in somebody else's package, through the public API alone."""
    package, made = tmp_path / "site/theirs", tmp_path / "site/theirs-1.0.dist-info"
    package.mkdir(parents=True), made.mkdir()
    (package / "__init__.py").write_text("")
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points, names = [], []
    for kind, (name, code), line in zip(KINDS, EXAMPLES.items(), LINES, strict=True):
        own = f"their_{line[2]}"
        (package / Path(name).name).write_text(code.replace(f'"{line[2]}"', f'"{own}"'))
        points.append(f"[headscope.{kind}]\n{own} = theirs.{Path(name).stem}:{line[4]}\n")
        names.append(own)
    (made / "entry_points.txt").write_text("\n".join(points))
    here = [tmp_path / "site", *(Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    found = session(tmp_path, here, saved, names)
    for kind, name in zip(KINDS, names, strict=True):
        assert any(row["name"] == name and row["file"].endswith(".py") for row in found[kind])
        assert has_page(tmp_path / "catalogue", kind, name)
    check_results(lm, tmp_path, names[0], names[1], names[3], names[4])


def test_the_table_of_what_was_reproduced_is_true() -> None:
    from headscope.interp.cli.listing import registries
    from headscope.interp.reports.tables import rewritten

    name = "interp/heads/README.md"
    page = (ROOT / name).read_text(encoding="utf-8")
    assert rewritten(page, registries()) == page, f"run `headscope list --write {name}`"


def test_what_the_page_names_exists() -> None:
    """Files and folders of the repository that the text mentions, apart from the examples' own."""
    named = set(re.findall(r"`((?:interp|kernels|probes|interventions|tests)/[\w/.]*)`", PAGE)) - set(EXAMPLES)
    assert len(named) > 8
    assert {name for name in named if not (ROOT / name).exists()} == set()
