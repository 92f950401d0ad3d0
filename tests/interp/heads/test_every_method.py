"""What holds of every registered head method: a new one is tested here by its line in ``METHODS``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod, Measured
from headscope.interp.heads.discovery import discover
from headscope.interp.models import LanguageModel
from headscope.interp.registry import make, settings
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.estimate import dry_run

NAMES = list(heads.METHODS)
# The smallest run of a method that is slow at its defaults; every other runs with two samples.
SMALL = {
    "retrieval": {"lengths": [260], "depths": [50], "needles": 1, "max_new_tokens": 3, "threshold": -1.0},
    "retrieval_paraphrased": {"lengths": [260], "depths": [50], "needles": 1},
    "qrhead": {"samples": 2, "batch": 2, "documents": 2, "length": 60},
    "head_gating": {"starts": 2, "updates": 2, "batch": 2, "examples": 3},
    "contrastive_gating": {"starts": 2, "updates": 2, "batch": 2, "examples": 3},
    "ablation_importance": {"samples": 2, "length": 12},
    "gradient_importance": {"samples": 2, "length": 12},
    "context_divergence": {"samples": 2, "batch": 2, "length": 40},
    "pattern_divergence": {"samples": 2, "batch": 2, "length": 40},
    "locos": {"lengths": [260], "depths": [50], "needles": 1, "forced": True},
    "locos_attention": {"lengths": [260], "depths": [50], "needles": 1, "forced": True},
    "locos_dla": {"lengths": [260], "depths": [50], "needles": 1, "forced": True},
    "locos_contrastive": {"lengths": [260], "depths": [50], "needles": 1, "forced": True, "gate": 0.0},
    "context_activation": {"lengths": [260], "depths": [50], "needles": 1, "max_new_tokens": 3, "threshold": -1.0},
}


def small(name: str) -> HeadMethod:
    cls = heads.METHODS[name]
    given = SMALL.get(name) or {key: value for key, value in (("samples", 2), ("batch", 2)) if key in settings(cls)}
    return make(cls, name, given)


@pytest.fixture(scope="module")
def lm(byte_level) -> LanguageModel:
    """A tiny llama with grouped heads, wide weights and a byte-level tokenizer."""
    config = LlamaConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    tokenizer = byte_level(700)
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


@pytest.fixture
def read_by(lm: LanguageModel, vision_lm, name: str) -> LanguageModel:
    """The model that a method can read: one of images and text where it needs one."""
    return vision_lm("llava") if heads.METHODS[name].reads == "images" else lm


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    cls = heads.METHODS[name]
    assert cls.name == name and issubclass(cls, HeadMethod) and dataclasses.is_dataclass(cls)
    assert cls.unit and cls.source, "unit and source"
    assert "does not show" in (cls.__doc__ or ""), "what the score does not show"
    tests = Path(__file__).parents[1] / cls.tests
    assert cls.reproduced and name in tests.read_text(), "what was reproduced, and the tests that say so"
    said = inspect.getdoc(heads.method(name)) or ""
    missing = [key for key, one in settings(cls).items() if not one.meaning]
    assert not missing and "Raises:" in said and all(f"    {key}: " in said for key in settings(cls))


def test_every_file_of_a_family_is_registered() -> None:
    """A class with a ``name`` of its own, in a file that no line of METHODS names, could not be found by anyone."""
    root = Path(inspect.getfile(heads)).parent
    found = set()
    for path in sorted(root.glob("*/*.py")):
        for node in ast.parse(path.read_text()).body:
            targets = [x.target.id for x in getattr(node, "body", ()) if isinstance(x, ast.AnnAssign)]
            if isinstance(node, ast.ClassDef) and "name" in targets:
                found.add(f"headscope.interp.heads.{path.parent.name}.{path.stem}:{node.name}")
    assert found and found == {place for place in heads.METHODS.places.values() if place.startswith("headscope.")}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_of_every_head_and_can_be_kept(read_by: LanguageModel, name: str, tmp_path: Path) -> None:
    lm, method = read_by, small(name)
    scores = discover([method], lm, out=tmp_path, progress=False)[0]
    assert scores.mean.shape == (2, 4) and np.isfinite(scores.mean).all() and scores.method == name
    low, high = method.range or (-np.inf, np.inf)
    assert ((scores.trials >= low - 1e-6) & (scores.trials <= high + 1e-6)).all()
    made = scores.provenance
    assert made["unit"] == method.unit and made["source"] == method.source and made["seed"] == 0
    json.dumps(method.parameters(lm)), json.dumps(list(method.trials(lm)))
    again = discover([method], lm, out=tmp_path, progress=False)[0]  # read back
    np.testing.assert_array_equal(again.trials, scores.trials)
    np.testing.assert_array_equal(HeadScores.load(tmp_path / f"{name}.json").trials, scores.trials)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_counts_its_passes_and_runs_none(read_by: LanguageModel, name: str) -> None:
    lm = read_by

    def forward(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    method = small(name)
    hook = lm.model.register_forward_pre_hook(forward)
    try:
        with dry_run() as work:
            discover([method], lm, progress=False)
    finally:
        hook.remove()
    assert len(work.passes) >= len(method.trials(lm)) and all(tokens > 0 for tokens, _ in work.passes)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_it_does_not_have_is_one_line(lm: LanguageModel, name: str) -> None:
    with pytest.raises(HeadscopeError, match=f"^{name} has no setting 'sampels'.*it takes ") as error:
        heads.method(name)(lm, sampels=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(heads.METHODS[name], Measured)])
def test_batches_change_nothing(read_by: LanguageModel, name: str) -> None:
    """Rounding alone: float32 sums of one row in another order (see ``test_heads.TOLERANCE``), of scores above 1 in
    their size."""
    method = dataclasses.replace(small(name), samples=3)
    both = [dataclasses.replace(method, batch=batch) for batch in (1, 3)]
    one, three = (discover([each], read_by, progress=False)[0] for each in both)
    size = max(1.0, float(np.nanmax(np.abs(one.trials))))
    np.testing.assert_allclose(one.trials, three.trials, rtol=0, atol=1e-5 * size)
    with pytest.raises(HeadscopeError, match="batch=0"):
        dataclasses.replace(method, batch=0)


def test_methods_that_read_the_same_samples_share_their_passes(lm: LanguageModel, tmp_path: Path) -> None:
    names = ("induction", "previous_token", "duplicate_token", "sinks")
    given = {"samples": 5, "batch": 5}
    methods = [make(heads.METHODS[name], name, given) for name in names]
    alone = [discover([method], lm, progress=False)[0] for method in methods]
    passes: list[int] = []
    hook = lm.model.register_forward_hook(lambda module, args, output: passes.append(1))
    together = discover(methods, lm, out=tmp_path, progress=False)
    hook.remove()
    assert len(passes) == 2  # three methods on repeated tokens, and the sinks' passages
    for one, other in zip(alone, together, strict=True):
        assert one.method == other.method and one.details == other.details
        np.testing.assert_array_equal(one.trials, other.trials)
    for name in names:  # one more method joins: only what is missing is run
        (tmp_path / f"{name}.json").unlink()
    (tmp_path / "duplicate_token.trials.jsonl").unlink()
    hook = lm.model.register_forward_hook(lambda module, args, output: passes.append(1))
    again = discover(methods, lm, out=tmp_path, progress=False)
    hook.remove()
    assert len(passes) == 3
    np.testing.assert_array_equal(again[2].trials, alone[2].trials)


def test_two_methods_of_one_name_are_refused(lm: LanguageModel) -> None:
    method = small("induction")
    with pytest.raises(HeadscopeError, match="each once"):
        discover([method, method], lm)
    with pytest.raises(HeadscopeError, match="at least one"):
        discover([], lm)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_defaults_fit_together_on_a_real_model(smollm2, vision_lm, name: str) -> None:
    """Trials of a default size can be made: what is bundled suffices for them."""
    assert heads.METHODS[name]().trials(vision_lm("llava") if heads.METHODS[name].reads == "images" else smollm2)
