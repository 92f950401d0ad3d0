"""Head ablation against the same edit made by hand on the untouched model, and nothing left on the model after it.

Tolerance: the edited model computes attention by another algorithm than the reference. Both are float32, so outputs
differ by a few eps (1.2e-7) times the size of the terms summed (scores up to about 10, through 2 layers): 1e-5 relative
to the largest logit. An edit that is wrong in one head moves logits by more than 1e-2 of that size, asserted below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import is_attached
from headscope.interp.statistics import Entropy, HeadOutput, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, Intervention, apply, head_means

TOLERANCE = 1e-5
PICKED = [(0, 1), (1, 0), (1, 3)]
LAYERS, HEADS, D_HEAD = 2, 4, 8
PROMPT = "w1 w5 w9 w2 w7 w7 w3 w1 w5"
MEANS = torch.randn(LAYERS, HEADS, D_HEAD, generator=torch.Generator().manual_seed(5))


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(3))


def logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


def blocks(model: Any) -> list[Any]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def projection(block: Any) -> Any:
    """The module that reads the heads' outputs side by side."""
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


@contextmanager
def hooked(model: Any, change: Callable[[int, int, Tensor], Tensor], heads: list[tuple[int, int]]) -> Iterator[None]:
    """By hand: ``change(layer, head, z)`` before the output projection, with plain PyTorch hooks."""

    def hook_of(layer: int, mine: list[int]) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            for head in mine:
                place = slice(head * D_HEAD, (head + 1) * D_HEAD)
                x[..., place] = change(layer, head, x[..., place])
            return (x, *args[1:])

        return hook

    hooks = [
        projection(block).register_forward_pre_hook(hook_of(layer, [h for at, h in heads if at == layer]))
        for layer, block in enumerate(blocks(model))
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def eager_logits(lm: LanguageModel, ids: Tensor, heads: list[tuple[int, int]], keep: float) -> Tensor:
    """By hand: a copy of the model whose query weights of ``heads`` are scaled by ``keep``, with eager attention.

    The rotary embedding is linear, so scaled weights are a scaled query; zero is the paper's masking.
    """
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for layer, head in heads:
            rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
            block = blocks(model)[layer]
            if hasattr(block, "attn"):
                block.attn.c_attn.weight[:, rows] *= keep  # Conv1D: (in, out), the queries first
                block.attn.c_attn.bias[rows] *= keep
            else:
                block.self_attn.q_proj.weight[rows] *= keep
        return model(input_ids=ids).logits


def assert_equal(found: Tensor, expected: Tensor, untouched: Tensor) -> None:
    """Equal within the tolerance, and the edit was large enough for a mistake to show."""
    scale = float(expected.abs().max())
    assert float((expected - untouched).abs().max()) > 1e-2 * scale, "the edit hardly changes anything"
    assert float((found - expected).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_zero_is_a_zeroed_input_of_the_output_projection(lm: LanguageModel, strength: float) -> None:
    ids = tokens()
    untouched = logits(lm, ids)
    with hooked(lm.model, lambda layer, head, z: (1.0 - strength) * z, PICKED):
        expected = logits(lm, ids)
    with apply(lm, AblateHeads(PICKED, strength=strength)):
        assert_equal(logits(lm, ids), expected, untouched)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_mean_is_the_given_mean_before_the_output_projection(lm: LanguageModel, strength: float) -> None:
    ids = tokens()
    untouched = logits(lm, ids)
    with hooked(lm.model, lambda i, h, z: (1.0 - strength) * z + strength * MEANS[i, h], PICKED):
        expected = logits(lm, ids)
    with apply(lm, AblateHeads(PICKED, "mean", means=MEANS, strength=strength)):
        assert_equal(logits(lm, ids), expected, untouched)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_uniform_is_a_scaled_query(lm: LanguageModel, strength: float) -> None:
    ids = tokens()
    expected = eager_logits(lm, ids, PICKED, 1.0 - strength)
    with apply(lm, AblateHeads(PICKED, "uniform", strength=strength)):
        assert_equal(logits(lm, ids), expected, logits_outside(lm, ids))


def logits_outside(lm: LanguageModel, ids: Tensor) -> Tensor:
    """Logits of a copy that nothing is attached to, with eager attention."""
    return eager_logits(lm, ids, [], 1.0)


@pytest.mark.parametrize("how", ["zero", "mean", "uniform"])
def test_strength_zero_changes_nothing(lm: LanguageModel, how: Any) -> None:
    ids = tokens()
    with trace(lm, [Entropy()]):  # the same attention code, unedited
        expected = logits(lm, ids)
    with apply(lm, AblateHeads(PICKED, how, strength=0.0, means=MEANS if how == "mean" else None)):
        found = logits(lm, ids)
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_uniform_heads_attend_uniformly_and_others_do_not_change_in_the_first_layer(lm: LanguageModel) -> None:
    ids = tokens()
    with trace(lm, [Entropy()]) as tracer:
        logits(lm, ids)
    plain = tracer.record["entropy"].to_numpy()
    with apply(lm, AblateHeads([(0, 1)], "uniform")), trace(lm, [Entropy()]) as tracer:
        logits(lm, ids)
    edited = tracer.record["entropy"].to_numpy()
    visible = torch.arange(1, ids.shape[1] + 1, dtype=torch.float64)
    assert abs(edited[:, 0, 1] - visible.log().numpy()).max() < TOLERANCE
    assert abs(plain[:, 0, 1] - visible.log().numpy()).max() > 0.1
    assert (edited[:, 0, [0, 2, 3]] == plain[:, 0, [0, 2, 3]]).all()


# -- when ------------------------------------------------------------------------------------------------------------


def greedy(lm: LanguageModel, ids: Tensor, count: int, edit: dict[str, Callable[[], Any]]) -> tuple[Tensor, Tensor]:
    """Greedy decoding by hand with a cache, with ``edit["prefill"]`` and ``edit["decode"]`` around those passes."""
    seen, scores, cache, step = ids, [], None, ids
    for index in range(count):
        with edit["prefill" if index == 0 else "decode"](), torch.no_grad():
            output = lm.model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores.append(output.logits[:, -1])
        step = scores[-1].argmax(-1, keepdim=True)
        seen = torch.cat([seen, step], 1)
    return seen, torch.stack(scores, 1)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("during", ["always", "prefill", "decode"])
def test_during_acts_in_its_passes_only(lm: LanguageModel, during: Any) -> None:
    ids, count = tokens(1), 6

    def zeroed() -> Any:
        return hooked(lm.model, lambda layer, head, z: 0.0 * z, PICKED)

    edits = {phase: zeroed if during in ("always", phase) else nothing for phase in ("prefill", "decode")}
    expected_ids, expected = greedy(lm, ids, count, edits)
    options = dict(max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with apply(lm, AblateHeads(PICKED, during=during)):
        found = lm.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert_equal(torch.stack(found.logits, 1), expected, greedy(lm, ids, count, dict.fromkeys(edits, nothing))[1])
    assert found.sequences.tolist() == expected_ids.tolist()


def test_the_three_phases_differ(lm: LanguageModel) -> None:
    outputs = []
    for during in ("always", "prefill", "decode"):
        with apply(lm, AblateHeads(PICKED, during=during)):  # type: ignore[arg-type]
            ids = tokens(1)
            outputs.append(greedy(lm, ids, 4, dict.fromkeys(("prefill", "decode"), nothing))[1])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((outputs[first] - outputs[second]).abs().max()) > 1e-2


def test_uniform_while_decoding_leaves_the_prompt_alone(lm: LanguageModel) -> None:
    ids = tokens()
    with apply(lm, AblateHeads(PICKED, "uniform", during="decode")):
        found = logits(lm, ids)
    expected = logits_outside(lm, ids)
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


# -- together --------------------------------------------------------------------------------------------------------


def test_two_edits_are_one_edit_of_both_sets(lm: LanguageModel) -> None:
    ids = tokens()
    with apply(lm, AblateHeads(PICKED)):
        expected = logits(lm, ids)
    with apply(lm, AblateHeads(PICKED[:1]), AblateHeads(PICKED[1:])):
        together = logits(lm, ids)
    with apply(lm, AblateHeads(PICKED[:1])), apply(lm, AblateHeads(PICKED[1:])):
        nested = logits(lm, ids)
    assert torch.equal(together, expected) and torch.equal(nested, expected)


def test_edits_apply_in_order(lm: LanguageModel) -> None:
    ids, head = tokens(), [(1, 2)]
    zero, mean = AblateHeads(head), AblateHeads(head, "mean", means=MEANS)
    outputs = {}
    for name, edits in {"zero": [zero], "mean": [mean], "zero mean": [zero, mean], "mean zero": [mean, zero]}.items():
        with apply(lm, *edits):
            outputs[name] = logits(lm, ids)
    assert torch.equal(outputs["zero mean"], outputs["mean"])
    assert torch.equal(outputs["mean zero"], outputs["zero"])
    assert not torch.equal(outputs["mean"], outputs["zero"])


@pytest.mark.parametrize("tracer_first", [False, True])
def test_a_tracer_sees_the_edited_model(lm: LanguageModel, tracer_first: bool) -> None:
    ids = tokens()
    edit = AblateHeads([(0, 1)], "mean", means=MEANS)
    statistics = [HeadOutput((0, -1)), SinkMass(1)]
    tracing = trace(lm, statistics)
    if tracer_first:
        with tracing as tracer, apply(lm, edit):
            logits(lm, ids)
    else:
        with apply(lm, edit), tracing as tracer:
            logits(lm, ids)
    z = torch.from_numpy(tracer.record["z"].to_numpy().copy())  # example, layer, head, position, d_head
    assert torch.equal(z[:, 0, 1], MEANS[0, 1].expand(2, 2, D_HEAD))
    with trace(lm, statistics) as tracer:
        logits(lm, ids)
    plain = torch.from_numpy(tracer.record["z"].to_numpy().copy())
    assert torch.equal(z[:, 0, 0], plain[:, 0, 0]), "another head of the same layer changed"
    assert not torch.equal(z[:, 1], plain[:, 1]), "the next layer did not see the edit"


def test_the_vision_tower_is_another_tower() -> None:
    model = tiny_model("llava", "image-text")
    layers, heads = model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    edit = AblateHeads([(layer, head) for layer in range(layers) for head in range(heads)])
    vision = model.config.vision_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.get_image_features(pixels)
        with apply(model, edit):
            edited = model.get_image_features(pixels)
            ids = tokens(1) % model.config.text_config.vocab_size
            text = model(input_ids=ids).logits
        unedited_text = model(input_ids=ids).logits

    def tensors(x: Any) -> list[Tensor]:
        if isinstance(x, Tensor):
            return [x]
        parts = x.values() if hasattr(x, "values") else x
        return [y for part in parts if part is not None for y in tensors(part)]

    assert tensors(plain)
    for before, after in zip(tensors(plain), tensors(edited), strict=True):
        assert float((before - after).abs().max()) <= TOLERANCE * float(before.abs().max())
    assert float((text - unedited_text).abs().max()) > 1e-2


# -- nothing stays ---------------------------------------------------------------------------------------------------


def test_the_model_is_as_it_was(lm: LanguageModel) -> None:
    ids = tokens()
    before, implementation = logits(lm, ids), lm.model.config._attn_implementation
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())
    for how in ("zero", "mean", "uniform"):
        with apply(lm, AblateHeads(PICKED, how, means=MEANS if how == "mean" else None)):  # type: ignore[arg-type]
            assert is_attached(lm)
            assert not torch.equal(logits(lm, ids), before)
        assert torch.equal(logits(lm, ids), before)
    assert lm.model.config._attn_implementation == implementation
    assert not is_attached(lm)
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())
    assert after == hooks


def test_the_model_is_as_it_was_after_an_exception(lm: LanguageModel) -> None:
    ids = tokens()
    before = logits(lm, ids)

    class Broken(Intervention):
        def edit_output(self, call: Any, z: Tensor) -> Tensor:
            raise RuntimeError("inside the forward pass")

    for edits in ([Broken()], [AblateHeads(PICKED), Broken()], [Broken(), AblateHeads(PICKED)]):
        with pytest.raises(RuntimeError, match="inside the forward pass"), apply(lm, *edits):
            logits(lm, ids)
        assert not is_attached(lm)
        assert torch.equal(logits(lm, ids), before)
    with pytest.raises(KeyboardInterrupt), apply(lm, AblateHeads(PICKED)):
        raise KeyboardInterrupt
    assert torch.equal(logits(lm, ids), before)


def test_no_gradients_inside(lm: LanguageModel) -> None:
    with apply(lm, AblateHeads(PICKED)):
        assert not lm.model(input_ids=tokens()).logits.requires_grad
    assert lm.model(input_ids=tokens()).logits.requires_grad


# -- means -----------------------------------------------------------------------------------------------------------


def test_head_means_are_the_means_of_the_output_projections_input(lm: LanguageModel) -> None:
    texts = [PROMPT, "w9 w8 w3", "w2"]
    sums = torch.zeros(LAYERS, HEADS, D_HEAD, dtype=torch.float64)
    count = 0

    def keep(layer: int, head: int, z: Tensor) -> Tensor:
        sums[layer, head] += z.double().sum((0, 1))
        return z

    everything = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    for text in texts:
        with hooked(lm.model, keep, everything):
            lm(text)
        count += len(text.split())
    found = head_means(lm, texts)
    assert found.dtype == torch.float32 and found.shape == (LAYERS, HEADS, D_HEAD)
    assert float((found - sums / count).abs().max()) <= TOLERANCE * float((sums / count).abs().max())


def test_head_means_needs_text(llama: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="at least one text"):
        head_means(llama, [])


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(heads=[]), "no heads"),
        (dict(heads=PICKED, how="delete"), "'zero', 'mean', 'uniform' or 'resample', not 'delete'"),
        (dict(heads=PICKED, during="never"), "not 'never'"),
        (dict(heads=PICKED, strength=1.5), "between 0 and 1, not 1.5"),
        (dict(heads=PICKED, strength=float("nan")), "between 0 and 1"),
        (dict(heads=PICKED, how="mean"), "needs means"),
        (dict(heads=PICKED, how="zero", means=MEANS), "takes no means"),
        (dict(heads=PICKED, how="uniform", means=MEANS), "takes no means"),
        (dict(heads=[(0, 1), (0, 1)]), "names a head twice"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        AblateHeads(**arguments)


@pytest.mark.parametrize("head", [(LAYERS, 0), (0, HEADS), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist_are_refused_before_anything_runs(llama: LanguageModel, head: tuple[int, int]) -> None:
    with pytest.raises(HeadscopeError, match=rf"L{head[0]}H{head[1]} does not exist: .*layers 0-1 and heads 0-3"):
        with apply(llama, AblateHeads([head])):
            raise AssertionError("entered")
    assert not is_attached(llama)


@pytest.mark.parametrize("shape", [(LAYERS, HEADS), (LAYERS, HEADS + 1, D_HEAD), (LAYERS + 1, HEADS, D_HEAD), (1,)])
def test_means_of_another_model_are_refused(llama: LanguageModel, shape: tuple[int, ...]) -> None:
    known = r"make them with head_means on this model|means (has|is) .*\(layer, head, d_head\) or"
    with pytest.raises(HeadscopeError, match=known):
        with apply(llama, AblateHeads(PICKED, "mean", means=torch.zeros(shape))):
            raise AssertionError("entered")


@pytest.mark.parametrize("width", [1, D_HEAD + 1])
def test_means_of_another_width_are_refused(llama: LanguageModel, width: int) -> None:
    edit = AblateHeads(PICKED, "mean", means=torch.zeros(LAYERS, HEADS, width))
    with pytest.raises(HeadscopeError, match=f"means have {width} dimensions a head, layer 0 has {D_HEAD}"):
        with apply(llama, edit):
            logits(llama, tokens())


def test_uniform_is_refused_where_scores_have_a_position_bias() -> None:
    model = tiny_model("t5", "encoder-decoder")
    inputs = dict(input_ids=tokens(1) % model.config.vocab_size, decoder_input_ids=torch.tensor([[0, 1, 2]]))
    with pytest.raises(HeadscopeError, match="position bias"), apply(model, AblateHeads([(0, 0)], "uniform")):
        model(**inputs)
    with torch.no_grad():
        before = model(**inputs).logits
        with apply(model, AblateHeads([(0, 0)])):
            assert not torch.equal(model(**inputs).logits, before)


# -- what it says of itself ------------------------------------------------------------------------------------------


def test_description_decides_what_it_does() -> None:
    base = AblateHeads(PICKED, "mean", means=MEANS)
    same = AblateHeads(HeadSet.of(PICKED), "mean", means=MEANS.clone())
    assert base.describe() == same.describe()
    others = [
        AblateHeads(PICKED[:2], "mean", means=MEANS),
        AblateHeads(PICKED, "mean", means=MEANS + 1),
        AblateHeads(PICKED, "mean", means=MEANS, strength=0.5),
        AblateHeads(PICKED, "mean", means=MEANS, during="decode"),
        AblateHeads(PICKED, "zero"),
        AblateHeads(PICKED, "uniform"),
    ]
    for other in others:
        assert other.describe() != base.describe()


def test_the_same_ablation_of_other_heads() -> None:
    edit = AblateHeads(PICKED, "mean", means=MEANS, strength=0.5, during="decode")
    other = edit.with_heads(HeadSet.of([(0, 0)]))
    assert list(other.heads) == [(0, 0)]
    expected = {key: value for key, value in edit.describe().items() if key not in ("heads", "name")}
    assert {key: value for key, value in other.describe().items() if key not in ("heads", "name")} == expected


def test_an_intervention_without_heads_has_no_control() -> None:
    with pytest.raises(HeadscopeError, match="not driven by a head set"):
        Intervention().with_heads(HeadSet.of(PICKED))
    assert Intervention().describe() == {"name": "intervention", "heads": None}


def test_head_means_of_a_bare_model(llama: LanguageModel) -> None:
    texts = [PROMPT, "w9 w8 w3"]
    expected = head_means(llama, texts)
    ids = [llama.tokenizer(text)["input_ids"] for text in texts]
    assert torch.equal(head_means(llama.model, ids), expected)
    assert torch.equal(head_means(llama.model, texts, tokenizer=llama.tokenizer), expected)
    with pytest.raises(HeadscopeError, match="without a tokenizer"):
        head_means(llama.model, texts)
    with pytest.raises(HeadscopeError, match="as a list"):
        head_means(llama, PROMPT)


@pytest.mark.parametrize("heads", ["L1H3", (1, 3), [(1, 3)], ["L1H3"], HeadSet.of([(1, 3)])])
def test_heads_by_any_name(heads: Any) -> None:
    assert AblateHeads(heads) == AblateHeads([(1, 3)]) and list(AblateHeads(heads).heads) == [(1, 3)]


@pytest.mark.parametrize("heads", ["head three", 5, [(1, 2, 3)], None])
def test_what_names_no_head_is_refused_in_one_line(heads: Any) -> None:
    with pytest.raises(HeadscopeError, match="names no heads") as refused:
        AblateHeads(heads)
    assert "\n" not in str(refused.value)
