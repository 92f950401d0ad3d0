"""CONTRIBUTING.md's examples run as they stand and give what they say, against eager attention and plain hooks.

Tolerance: float32 through two layers with scores up to about 10: 1e-5, as derived in tests/interp/test_heads.py.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import heads, trace
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.statistics import exactness as support
from headscope.interventions import EDITS, TASKS, TextLoss, apply, evaluate, load_intervention

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    match[1]: match[0] for match in re.findall(r"^```python\n(# (\S+\.py)\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
}
TEXTS = ["w1 w5 w9 w2 w7 w7 w3 w1 w5", "w4 w8 w8 w2", "w6 w1 w1 w1 w0 w3"]
TOLERANCE = 1e-5


@pytest.fixture
def lm() -> LanguageModel:
    vocabulary = {f"w{i}": i for i in range(24)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0")
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    common = dict(vocab_size=24, num_hidden_layers=2, initializer_range=0.3, max_position_embeddings=64)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=None, **sizes, **common)).eval()
    return LanguageModel.wrap(model, tokenizer, name="tiny llama")


@pytest.fixture
def example() -> Iterator[Any]:
    """Import an example as the module its first line names, and forget it afterwards."""
    made: list[str] = []

    def load(path: str) -> types.ModuleType:
        name = "headscope.example." + Path(path).stem
        module = types.ModuleType(name)
        sys.modules[name] = module
        made.append(name)
        exec(compile(EXAMPLES[path], path, "exec"), module.__dict__)
        return module

    yield load
    for name in made:
        del sys.modules[name]


def patterns(lm: LanguageModel, text: str) -> np.ndarray:
    """The untouched model's own weights: (layer, head, query, key)."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**lm.encode(text), output_attentions=True).attentions
    return torch.cat(found).double().numpy()


def test_there_is_an_example_of_each_kind() -> None:
    edit, task = "interventions/outputs/negate.py", "interventions/tasks/repeats.py"
    assert list(EXAMPLES) == ["interp/heads/first_token.py", "interp/statistics/rows.py", edit, task]
    assert not (ROOT / edit).exists() and not (ROOT / task).exists()


def test_the_head_method(lm: LanguageModel, example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("interp/heads/first_token.py")
    line = re.search(r'`"(first_token)": "([\w.]+)",`', PAGE)
    assert line is not None and line[2] == "headscope.interp.heads.first_token"
    monkeypatch.setitem(heads.METHODS, line[1], module.__name__)
    scores = heads.method("first-token")(lm, texts=TEXTS, out=tmp_path, progress=False)
    expected = np.stack([patterns(lm, text)[:, :, 1:, 0].mean(-1) for text in TEXTS])
    np.testing.assert_allclose(scores.trials, expected, atol=TOLERANCE)
    assert expected.std() > 0.01
    assert (tmp_path / "first_token.json").exists() and (scores.n == len(TEXTS)).all()


def test_the_statistic(lm: LanguageModel, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("interp/statistics/rows.py")
    assert '`"EffectiveKeys": {},`' in PAGE
    monkeypatch.setitem(support.REFUSED, "EffectiveKeys", {})
    with trace(lm, [module.EffectiveKeys()]) as tracer:
        lm(TEXTS[0])
    found = tracer.record["effective_keys"].isel(example=0).transpose("layer", "head", "query").to_numpy()
    p = patterns(lm, TEXTS[0])
    expected = np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum(-1))
    np.testing.assert_allclose(found, expected, rtol=2 * TOLERANCE)
    assert expected.min() >= 1 and expected[..., -1].max() > 2


def registered(monkeypatch: pytest.MonkeyPatch, registry: Any, module: Any, line: str) -> Any:
    """Add the page's line to a registry, for the example's module."""
    found = re.search(r'`"(\w+)": "([\w.]+):(\w+)",`', line)
    assert found is not None and line in PAGE
    monkeypatch.setitem(registry.places, found[1], f"{module.__name__}:{found[3]}")
    return registry[found[1]]


def test_the_edit(lm: LanguageModel, example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = example("interventions/outputs/negate.py")
    cls = registered(monkeypatch, EDITS, module, '`"negate_heads": "outputs.negate:NegateHeads",`')
    edit = cls([(0, 1), (1, 3)], 0.75)
    before = lm(TEXTS[0]).logits
    with apply(lm, edit):
        found = lm(TEXTS[0]).logits
    with apply(lm, load_intervention(edit.save(tmp_path / "edit", lm), lm)):
        assert torch.equal(lm(TEXTS[0]).logits, found)
    assert torch.equal(lm(TEXTS[0]).logits, before)

    def by_hand(head: int) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = args[0].clone()
            z[..., head * 8 : head * 8 + 8] *= -0.5
            return (z,)

        return hook

    blocks = lm.model.model.layers
    for layer, head in edit.heads:
        blocks[layer].self_attn.o_proj.register_forward_pre_hook(by_hand(head))
    expected = lm(TEXTS[0]).logits
    scale = float(expected.abs().max())
    assert float((expected - before).abs().max()) > 1e-2 * scale
    assert float((found - expected).abs().max()) <= TOLERANCE * scale
    row = next(row for row in EDITS.rows() if row["name"] == "negate_heads")
    assert row["summary"] == "Turn the outputs z of ``heads`` around" and row["unit"] == "share of z"


def test_the_task_and_the_edits_controls(lm: LanguageModel, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task_module, edit_module = example("interventions/tasks/repeats.py"), example("interventions/outputs/negate.py")
    cls = registered(monkeypatch, TASKS, task_module, '`"repeats": "repeats:RepeatLoss",`')
    task = cls(samples=2, length=6)
    trial = task.trials(lm)[0]
    twice = torch.tensor([trial["ids"] * 2])
    logits = lm.model(twice).logits[0].double().detach().log_softmax(-1)
    expected = -sum(float(logits[i, twice[0, i + 1]]) for i in range(6, 11)) / 5
    assert task.run(lm, trial)["score"] == pytest.approx(expected, rel=1e-6)
    edit = edit_module.NegateHeads(HeadSet(((0, 1),)), 0.5)
    result = evaluate(
        lm, [task, TextLoss(passages=2, length=8, text=" ".join(TEXTS))], edit, controls=3, progress=False
    )
    assert list(result.contrasts()["controls"]) == [3, 3]
    assert result.provenance["conditions"][2]["edits"][0]["share"] == 0.5
    assert result.higher_is_better["repeats"] is False


def test_what_the_page_names_exists() -> None:
    """Files and folders of the repository that the text mentions, apart from the examples' own."""
    named = set(re.findall(r"`((?:interp|kernels|probes|interventions|tests)/[\w/.]*)`", PAGE)) - set(EXAMPLES)
    assert len(named) > 8
    assert {name for name in named if not (ROOT / name).exists()} == set()
