"""What every registered edit promises. A new edit joins by its line in EDITS and one in ``EXAMPLES``.

Tolerance between cached and uncached passes: float32 attention in another order of summation, 1e-5 of the largest logit
(see test_ablate.py).
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary
from headscope.interp.registry import settings
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import is_attached
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import Composed, Edit, ScaleHeads, apply, load_intervention
from headscope.interventions.edits import EDITS
from headscope.interventions.positions.position_edit import PositionEdit

LAYERS, HEADS, D_HEAD = 2, 4, 8
PICKED = [(0, 1), (1, 0), (1, 3)]
MEANS = torch.randn(LAYERS, HEADS, D_HEAD, generator=torch.Generator().manual_seed(5))
ADDED = torch.randn(2, HEADS * D_HEAD, generator=torch.Generator().manual_seed(7))
SAMPLES = torch.randn(LAYERS, HEADS, 6, D_HEAD, generator=torch.Generator().manual_seed(6))

SINKS = {"span": (0, 4), "dimensions": (0, 1, 2), "tau": 1.2, "layers": (0, 1)}
VISUAL = {**SINKS, "rho": 0.1, "share": 0.9, "least": 0.1}

# name -> settings that act on a tiny model of 2 layers of 4 heads of width 8; the first of an edit's is its usual form
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "ablate_heads": [
        {"heads": PICKED},
        {"heads": PICKED, "how": "mean", "means": MEANS},
        {"heads": PICKED, "how": "uniform"},
        {"heads": PICKED, "how": "resample", "samples": SAMPLES},
    ],
    "scale_heads": [{"heads": PICKED, "factor": -0.5}],
    "edit_value_vectors": [
        {"neurons": ((0, 3), (1, 7), (1, 30)), "factor": -2.0},
        {"neurons": ((1, 7), (0, 3)), "factor": 0.0, "add": ADDED},
    ],
    "scale_sinks": [
        {"heads": PICKED},
        {"factor": 0.3, "sinks": (1, 3), "renormalise": False, "layers": (1,)},
        {"detect": 0.3},
    ],
    "calibrate_attention": [{"heads": PICKED}, {"beta": 0.0, "threshold": 0.2}],
    "redistribute_sinks": [
        {"heads": PICKED, **VISUAL, "layers": (0, 1)},
        {**VISUAL, "meaning": "code", "rho": 0.9, "share": 0.2, "tau": (1.2, 1.0)},
    ],
    "scale_image_sinks": [{"heads": PICKED, **SINKS, "tau": 1.4}],
    "prune_tokens": [{"heads": PICKED, "span": (0, 4), "layer": 1, "keep": 1}],
    "swap_keys": [{"heads": PICKED}, {"first": (0, 1), "second": (3, 4)}],
    "force_pattern": [{"heads": PICKED, "onto": [[(0, 1), (2, 4)]]}, {"onto": (1, 2), "layers": (1,)}],
    "boost_recent": [
        {"heads": PICKED, "beta": 2.0, "window": 3, "previous": "all"},
        {"beta": 1.0, "previous": "all", "renormalise": True},
    ],
    "knock_out": [{"heads": PICKED, "span": (1, 3)}, {"span": [(0, 2)], "layers": (1,)}],
    "emphasize_span": [
        {"heads": PICKED, "span": (1, 3), "outside": 0.01},
        {"span": [[(0, 1), (2, 4)]], "inside": 30.0},
    ],
    "spotlight": [{"heads": PICKED, "span": (1, 3), "target": 0.6}],
    "scale_span_logits": [{"heads": PICKED, "span": (1, 4), "factor": 2.0, "at": "all"}],
    "adapt_span_logits": [{"heads": PICKED, "span": (1, 4), "at": "all", "threshold": 0.3, "unsure": 3.0, "sure": 0.2}],
    "reinforce_heads": [{"span": (1, 4), "layers": (0, 1), "factor": 3.0}],
    "raise_span_logits": [{"heads": PICKED, "span": (1, 4), "amount": 0.9}],
    "head_temperature": [{"temperature": 3.0}, {"heads": PICKED[:2], "temperature": (0.3, 2.0)}],
    "decay_beyond_window": [
        {"heads": PICKED, "window": 2, "factor": 0.1},
        {"window": 1, "factor": 0.5, "bands": [(2, 3, 0.1)], "positive_only": False},
    ],
    "evict_keys": [
        {"policy": "knorm", "budget": 2, "read": 4},
        {"heads": PICKED, "policy": "h2o", "budget": 0.5, "options": {"recent_share": 0.0}, "read": 4},
        {"policy": "streaming_llm", "budget": 3, "options": {"sink": 1}},
    ],
    "pine": [
        {"documents": [(1, 3), (3, 5)]},
        {"heads": PICKED, "documents": [(0, 1), (1, 4), (4, 5)], "strength": 0.7},
    ],
    "rescale_rope": [
        {"linear": 2.0, "truncate": 40},
        {"heads": PICKED, "ntk": 8.0, "base": 300.0, "layers": (0, 1)},
    ],
    "concentric_positions": [
        {"span": (1, 5), "grid": (2, 2)},
        {"heads": PICKED, "span": [(0, 5)], "grid": (5, 1), "strength": 0.7},
    ],
    "parallel_contexts": [
        {"contexts": [(1, 3), (3, 5)]},
        {"heads": PICKED, "contexts": [(0, 1), (1, 4), (4, 5)], "mode": "HR", "strength": 0.7},
    ],
    "select_contexts": [
        {"contexts": [(1, 2), (2, 4), (4, 5)], "keep": 1, "top": 1},
        {"heads": PICKED, "contexts": [(0, 1), (1, 4), (4, 5)], "keep": 1, "over": "heads"},
    ],
    "add_to_heads": [{"heads": PICKED, "vectors": MEANS}, {"heads": PICKED, "vectors": MEANS, "sigma": MEANS[..., 0]}],
    "affine_heads": [{"heads": PICKED, "A": MEANS, "v": MEANS - 1}, {"heads": PICKED, "v": MEANS}],
    "project_heads": [{"heads": PICKED, "directions": MEANS}],
    "clamp_heads": [
        {"heads": PICKED, "directions": MEANS, "low": -0.5, "high": 0.7},
        {"heads": PICKED, "directions": MEANS, "high": MEANS[..., 1] - 1},
    ],
    "patch_heads": [
        {"heads": PICKED, "z": SAMPLES[:, :, :3], "positions": [[(1, 3), (5, 6)]]},
    ],
}
OF_PICTURES = ("paint",)  # need a vision tower: tests/interventions/vision
ROTARY = [name for name in EXAMPLES if issubclass(EDITS[name], PositionEdit)]
SPANNED = [name for name in EXAMPLES if "span" in settings(EDITS[name])]
# (edit, field) -> another value that is not found by itself, or None where the field changes with another
OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("ablate_heads", "how"): {"how": "uniform"},
    ("ablate_heads", "means"): {"how": "mean", "means": MEANS + 1},
    ("edit_value_vectors", "neurons"): {"neurons": ((0, 3), (1, 7), (1, 31))},
    ("edit_value_vectors", "add"): {"add": ADDED[0]},
    ("scale_sinks", "detect"): {"detect": 0.5},
    ("calibrate_attention", "beta"): {"beta": 0.5},
    ("calibrate_attention", "threshold"): {"threshold": 0.5},
    ("calibrate_attention", "sets"): {"sets": "pass"},
    ("scale_image_sinks", "dimensions"): {"dimensions": (0, 1)},
    ("scale_image_sinks", "tokens"): {"tokens": "random"},
    ("prune_tokens", "by"): {"by": "random"},
    ("prune_tokens", "sigma"): {"by": "debiased", "sigma": 1.0},
    ("prune_tokens", "padding"): {"by": "debiased", "padding": (0, 1)},
    ("redistribute_sinks", "span"): {"span": (0, 3)},
    ("redistribute_sinks", "dimensions"): {"dimensions": (0, 1)},
    ("redistribute_sinks", "rho"): {"rho": 0.2},
    ("redistribute_sinks", "share"): {"share": 0.8},
    ("redistribute_sinks", "least"): {"least": 0.2},
    ("redistribute_sinks", "meaning"): {"meaning": "code"},
    ("swap_keys", "first"): {"first": (4, 5)},
    ("swap_keys", "second"): {"second": (4, 5)},
    ("force_pattern", "onto"): {"onto": (4, 5)},
    ("boost_recent", "previous"): {"previous": "output"},
    ("spotlight", "target"): {"target": 0.3},
    ("spotlight", "over"): {"over": "layer"},
    ("scale_span_logits", "at"): {"at": "last"},
    ("adapt_span_logits", "at"): {"at": "last"},
    ("adapt_span_logits", "confidence"): {"confidence": "logit"},
    ("reinforce_heads", "zero_outliers"): {"zero_outliers": False},
    ("reinforce_heads", "text_stream"): {"text_stream": "plain"},
    ("reinforce_heads", "choose"): {"choose": "random"},
    ("decay_beyond_window", "bands"): {"bands": [(3, 4, 0.5)]},
    ("decay_beyond_window", "positive_only"): {"positive_only": False},
    ("evict_keys", "policy"): {"policy": "keydiff"},
    ("evict_keys", "options"): {"options": {"sink": 1}},
    ("pine", "documents"): {"documents": "document"},
    ("rescale_rope", "base"): {"base": 500.0},
    ("concentric_positions", "grid"): {"grid": (4, 1)},
    ("parallel_contexts", "contexts"): {"contexts": "document"},
    ("parallel_contexts", "mode"): {"mode": "AE"},
    ("select_contexts", "contexts"): {"contexts": "document"},
    ("select_contexts", "over"): {"over": "heads"},
    **{(name, "span"): {"span": "needle"} for name in SPANNED},
    ("ablate_heads", "samples"): {"how": "resample", "samples": SAMPLES + 1},
    ("add_to_heads", "vectors"): {"vectors": MEANS + 1},
    ("add_to_heads", "sigma"): {"sigma": MEANS[..., 0]},
    ("add_to_heads", "after"): {"during": "decode", "after": 2},
    ("affine_heads", "A"): {"A": MEANS + 1},
    ("affine_heads", "v"): {"v": MEANS + 1},
    ("project_heads", "directions"): {"directions": MEANS + 1},
    ("clamp_heads", "directions"): {"directions": MEANS + 1},
    ("clamp_heads", "low"): {"low": -0.4},
    ("patch_heads", "z"): {"z": SAMPLES[:, :, 3:]},
    ("patch_heads", "positions"): {"positions": (0, 3)},
    ("patch_heads", "length"): {"length": 6},
    ("patch_heads", "prompt"): {"prompt": "w1 w5"},
    ("patch_heads", "taken"): {"taken": (0, 3)},
}
SHARED = {
    "during": "prefill",
    "strength": 0.5,
    "positions": (0, 3),
    "heads": HeadSet.of(PICKED[:2]),
    "layers": (0,),
}
BAD = [
    ({"during": "sometimes"}, "during must be"),
    ({"strength": float("nan")}, "strength must be"),
    ({"strength": "much"}, "strength must be"),
]

CASES = [pytest.param(name, given, id=f"{name}-{i}") for name in EXAMPLES for i, given in enumerate(EXAMPLES[name])]


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, shared: Callable[[str], LanguageModel]) -> LanguageModel:
    """As in conftest.py, but one for all: what every edit promises is to leave it as it was."""
    return shared(request.param)


@pytest.fixture
def llama(shared: Callable[[str], LanguageModel]) -> LanguageModel:
    """The llama alone, where the architecture does not matter."""
    return shared("llama")


def made(name: str, given: dict[str, Any]) -> Edit:
    edit: Edit = EDITS[name](**given)  # type: ignore[assignment]
    return edit


def tokens() -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded to the left."""
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def logits(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=position, **options).logits
    return found


@pytest.fixture(autouse=True)
def _positions_are_rotary(request: pytest.FixtureRequest) -> None:
    """Edits of positions say that GPT-2 has no RoPE (see the test below), and are held to the rest on the llama."""
    given = getattr(request.node, "callspec", None)
    if given is not None and given.params.get("lm") == "gpt2" and given.params.get("name") in ROTARY:
        pytest.skip("positions are edited in RoPE models alone")


@pytest.mark.parametrize("name", ROTARY)
def test_positions_are_edited_in_models_with_rope_alone(name: str) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64, n_positions=16)).eval()
    with (
        pytest.raises(HeadscopeError, match="has no rotary position embedding"),
        apply(gpt2, made(name, EXAMPLES[name][0])),
    ):
        raise AssertionError("entered")


def test_every_edit_has_an_example() -> None:
    assert {*EXAMPLES, *OF_PICTURES} == set(EDITS)
    for name in EDITS:
        assert EDITS[name].source and EDITS[name].__doc__ and EDITS[name].unit


@pytest.mark.parametrize(("name", "given"), CASES)
def test_it_acts_and_nothing_of_it_stays(lm: LanguageModel, name: str, given: dict[str, Any]) -> None:
    ids, mask = tokens()
    before = logits(lm.model, ids, mask)
    edit = made(name, given)
    with apply(lm, edit):
        inside = logits(lm.model, ids, mask)
    real = mask.bool()
    assert float((inside - before)[real].abs().max()) > 1e-3 * float(before.abs().max()), "the example does nothing"
    assert torch.equal(logits(lm.model, ids, mask), before) and not is_attached(lm)
    with pytest.raises(KeyboardInterrupt), apply(lm, edit):
        logits(lm.model, ids, mask)
        raise KeyboardInterrupt
    assert torch.equal(logits(lm.model, ids, mask), before) and not is_attached(lm)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_strength_zero_is_the_unedited_model_to_the_bit(lm: LanguageModel, name: str, given: dict[str, Any]) -> None:
    ids, mask = tokens()
    before = logits(lm.model, ids, mask)
    edit = made(name, given).with_settings(strength=0.0)
    with apply(lm, edit):
        assert torch.equal(logits(lm.model, ids, mask), before)


@pytest.mark.parametrize("during", ["always", "prefill", "decode", "answer"])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_cached_generation_is_generation_without_a_cache(
    lm: LanguageModel, name: str, given: dict[str, Any], during: str
) -> None:
    """Grouped key/value heads, left padding, and every phase."""
    ids, mask = tokens()
    if during not in EDITS[name].phases:
        with pytest.raises(HeadscopeError, match="during must be"):
            made(name, given).with_settings(during=during)
        return
    edit = made(name, given).with_settings(during=during)
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    plain = lm.model.generate(ids, attention_mask=mask, **options)
    with apply(lm, edit):
        cached = lm.model.generate(ids, attention_mask=mask, **options)
        again = lm.model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert cached.sequences.tolist() == again.sequences.tolist()
    one, two, three = (torch.stack(output.logits, 1) for output in (cached, again, plain))
    assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())
    assert float((one - three).abs().max()) > 1e-3 * float(two.abs().max())


@pytest.mark.parametrize(("name", "given"), CASES)
def test_padding_changes_nothing(lm: LanguageModel, name: str, given: dict[str, Any]) -> None:
    ids, mask = tokens()
    with apply(lm, made(name, given)):
        together = logits(lm.model, ids, mask)[1, 3:]
        alone = logits(lm.model, ids[1:, 3:], mask[1:, 3:])[0]
    assert float((together - alone).abs().max()) <= 1e-5 * float(alone.abs().max())


@pytest.mark.parametrize(("name", "given"), CASES)
def test_saved_loaded_equal(llama: LanguageModel, name: str, given: dict[str, Any], tmp_path: Path) -> None:
    edit = made(name, given)
    again = load_intervention(edit.save(tmp_path / "edit", llama), llama)
    assert again == edit and hash(again) == hash(edit) and again.describe() == edit.describe()
    assert repr(again) == repr(edit) and type(edit).__name__ in repr(edit) and "\n" not in repr(edit)
    ids, mask = tokens()
    with apply(llama, edit):
        expected = logits(llama.model, ids, mask)
    with apply(llama, again):
        assert torch.equal(logits(llama.model, ids, mask), expected)
    both = edit + ScaleHeads([(1, 2)], 2.0)
    assert load_intervention(both.save(tmp_path / "both")) == both


def test_loaded_in_another_process(tmp_path: Path) -> None:
    """Every example, one after the other, on a model that both processes make from its seed."""
    model, ids = tiny_model("llama"), torch.arange(5, 15)[None]
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    width = model.config.hidden_size // heads

    def fitted(value: Any) -> Any:
        """A table of the examples' size, cut or made longer for this model."""
        if not isinstance(value, Tensor):
            return value
        if value is ADDED:
            return torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(5))
        whole = torch.Size([layers, heads, *value.shape[2:-1], width] if value.shape[-1] == D_HEAD else [layers, heads])
        return torch.randn(whole, generator=torch.Generator().manual_seed(5))

    expected = []
    for name, examples in EXAMPLES.items():
        for given in examples:
            own = {key: fitted(value) for key, value in given.items()}
            edit = made(name, {**own, "heads": [(0, 1), (1, 0)]} if "heads" in given else own)
            edit = edit.with_settings(strength=0.5)
            edit.save(tmp_path / f"{len(expected):03d}", model)
            with apply(model, edit), torch.no_grad():
                expected.append(model(ids).logits)
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from headscope.interp.survey.tiny import tiny_model\n"
        "from headscope.interventions import apply, load_intervention\n"
        "model = tiny_model('llama')\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    with apply(model, load_intervention(path, model)), torch.no_grad():\n"
        "        sys.stdout.write(model(torch.arange(5, 15)[None]).logits.numpy().tobytes().hex())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(logits.numpy().tobytes().hex() for logits in expected)


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_the_description_changes_with_every_field(name: str) -> None:
    base = made(name, EXAMPLES[name][0])
    for field in fields(base):
        value = getattr(base, field.name)
        if (name, field.name) in OTHERS:
            other = replace(base, **OTHERS[name, field.name])
        elif field.name in SHARED:
            other = replace(base, **{field.name: SHARED[field.name]})
        else:
            assert isinstance(value, int | float), f"give another value of {field.name} in OTHERS"
            other = replace(base, **{field.name: value + 1})
        assert other.describe() != base.describe() and other != base, field.name
        json.dumps(other.describe(), allow_nan=False)
        assert getattr(base, field.name) is value, "the edit itself changed"


@pytest.mark.parametrize(("name", "given"), CASES)
def test_other_heads(llama: LanguageModel, name: str, given: dict[str, Any]) -> None:
    edit = made(name, given)
    if edit.heads is None:
        with pytest.raises(HeadscopeError, match="not driven by a head set"):
            edit.with_heads(HeadSet.of(PICKED))
        return
    drawn = edit.heads.matched_random(HEADS, 0)
    other = edit.with_heads(drawn)
    assert type(other) is type(edit) and list(other.heads or ()) == list(drawn) and other != edit
    assert other.with_heads(edit.heads) == edit
    beyond = edit.with_heads(HeadSet(((7, 0), *list(edit.heads)[1:])))
    with pytest.raises(HeadscopeError, match="L7H0 does not exist"), apply(llama, beyond):
        raise AssertionError("entered")


@pytest.mark.parametrize(("name", "given"), CASES)
def test_composed_is_nested(lm: LanguageModel, name: str, given: dict[str, Any]) -> None:
    ids, mask = tokens()
    first, second = made(name, given), ScaleHeads([(0, 1), (1, 2)], 3.0)
    results = []
    blocks: list[Callable[[], Any]] = [
        lambda: apply(lm, first + second),
        lambda: apply(lm, first, second),
        lambda: apply(lm, second + first),
    ]
    for block in blocks:
        with block():
            results.append(logits(lm.model, ids, mask))
    assert torch.equal(results[0], results[1])
    both = first + second
    assert both != second + first and both.describe() != (second + first).describe()
    assert both + first == Composed([first, second, first]) and both.parts == (first, second)


@pytest.mark.parametrize(("given", "message"), BAD)
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_bad_settings_are_refused_with_one_line(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused:
        made(name, {**EXAMPLES[name][0], **given})
    assert "\n" not in str(refused.value)
    with pytest.raises(HeadscopeError, match="has no setting 'strenght'.*did you mean 'strength'"):
        made(name, EXAMPLES[name][0]).with_settings(strenght=1)
    assert "strength" in settings(EDITS[name]) and all(one.meaning for one in settings(EDITS[name]).values())


STEPS = 4


def generated(lm: LanguageModel, edit: Edit, **options: Any) -> Tensor:
    """Logits (batch, step, vocabulary) of a greedy generation with the edit, behind the padded prompts."""
    ids, mask = tokens()
    options |= dict(do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    with apply(lm, edit):
        found = lm.model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, **options)
    return torch.stack(found.logits, 1)


def unless_refused(edit: Edit, where: str, run: Callable[[], Tensor]) -> Tensor | None:
    """What ``run`` gives; None where the edit refuses, in one line, what it says that it refuses."""
    try:
        return run()
    except HeadscopeError as error:
        assert where in edit.refused and "\n" not in str(error), str(error)
        return None


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_every_cache_gives_the_same(shared: Any, kind: str, name: str, given: dict[str, Any]) -> None:
    """A static cache, and layers that keep a window of keys alone, against none; there rows of the answer are edited,
    of which a cache holds what was left alone."""
    lm, edit = shared(kind), made(name, given)
    if kind == "mistral" and "answer" in edit.phases:
        edit = edit.with_settings(during="answer")
    expected = unless_refused(edit, "layers with a window", lambda: generated(lm, edit, use_cache=False))
    if expected is None:
        assert kind == "mistral"
        return
    for options in ({"cache_implementation": "static"}, {"use_cache": True}):
        found = generated(lm, edit, **options)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(("name", "given"), CASES)
def test_a_prompt_in_chunks(shared: Any, kind: str, name: str, given: dict[str, Any]) -> None:
    lm, edit = shared(kind), made(name, given)
    ids, mask = tokens()

    def in_chunks() -> Tensor:
        cache, found = None, []
        for first, stop in ((0, 4), (4, 6), (6, ids.shape[1])):
            options = {"past_key_values": cache, "use_cache": True}
            at = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:stop]
            with torch.no_grad():
                output = lm.model(ids[:, first:stop], attention_mask=mask[:, :stop], position_ids=at, **options)
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, 1)[mask.bool()]

    with apply(lm, edit), prompt_boundary(ids.shape[1], padded=True):
        whole = unless_refused(edit, "layers with a window", lambda: logits(lm.model, ids, mask)[mask.bool()])
        found = None if whole is None else unless_refused(edit, "chunked prefill", in_chunks)
    assert whole is not None or kind == "mistral"
    assert found is None or float((found - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


@pytest.fixture(scope="module")
def bridge(shared: Any) -> Any:
    """A TransformerBridge of a copy of the llama: a bridge changes its model in place."""
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    own = copy.deepcopy(shared("llama").model)
    return builder.build_bridge_from_module(own, type(own).__name__, hf_config=own.config)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_through_transformer_lens(bridge: Any, llama: Any, name: str, given: dict[str, Any]) -> None:
    edit = made(name, given)
    ids, mask = tokens()
    with apply(llama, edit):
        expected = logits(llama.model, ids, mask)[mask.bool()]

    def run() -> Tensor:
        with apply(bridge, edit), torch.no_grad():
            whole: Tensor = bridge(ids, attention_mask=mask)
        return whole[mask.bool()]

    found = unless_refused(edit, "TransformerLens", run)
    assert not is_attached(bridge)
    assert found is None or float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("name", "given"), CASES)
def test_through_nnsight(llama: LanguageModel, name: str, given: dict[str, Any]) -> None:
    wrapper = pytest.importorskip("nnsight").NNsight(llama.model)
    edit = made(name, given)
    ids, mask = tokens()
    with apply(llama, edit):
        expected = logits(llama.model, ids, mask)
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    if "nnsight" in edit.refused:
        with pytest.raises(HeadscopeError, match="nnsight"), apply(wrapper, edit):
            raise AssertionError("entered")
        return
    with apply(wrapper, edit), wrapper.trace(input_ids=ids, attention_mask=mask, position_ids=at):
        found = wrapper.output.logits.save()
    assert torch.equal(found, expected)
