"""Context activation, LOCOS and its controls: by hand, and against dense eager weights in float64.

Tolerance of LOCOS: a contribution is a sum of n <= 700 products of float32 numbers of at most about 10 each (values,
projection and unembedding of wide tiny models), with an attention weight that is itself good to 1e-5 (see
``test_heads``): 1e-4 of the largest contribution.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import heads
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads import context_activation, locos, locos_contrastive, retrieval
from headscope.interp.heads.recall.answer_rows import answer_steps
from headscope.interp.heads.recall.locos import Locos
from headscope.interp.heads.recall.locos_contrastive import LocosContrastive
from headscope.interp.models import LanguageModel
from headscope.interp.models.writing import HeadWrites, unembedding_rows
from headscope.interp.sites import attached

SETTINGS = {"lengths": [260], "depths": [50], "needles": 1, "progress": False}
SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer(byte_level) -> PreTrainedTokenizerFast:
    return byte_level(600)


def build(tokenizer, kind: str = "llama") -> LanguageModel:
    common = dict(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=0, initializer_range=0.3)
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES, **common))
    else:
        types = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(num_hidden_layers=2, layer_types=types, sliding_window=120, **SIZES, **common)
        model = Gemma3ForCausalLM(config)
    return LanguageModel.wrap(model.eval(), tokenizer, name=f"tiny {kind}")


def say(lm: LanguageModel, emitted: list[int], prompt: int) -> None:
    """The model says these tokens after a prompt of so many."""

    def hook(module, args, kwargs, output):
        cache = output.past_key_values
        step = -1 if cache is None else cache.get_seq_length() - prompt
        if output.logits.shape[1] == 1 and 0 <= step < len(emitted):
            output.logits = torch.nn.functional.one_hot(torch.tensor([[emitted[step]]]), output.logits.shape[-1]) * 1.0
        return output

    lm.model.register_forward_hook(hook, with_kwargs=True)


def eager_weights(lm: LanguageModel, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention weights (1, head, query, key) and values (key, kv head x d_head) of every layer: eager, float64."""
    model = copy.deepcopy(lm.model).double()
    model._forward_hooks.clear()
    model.set_attn_implementation("eager")
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        patterns = model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    for hook in hooks:
        hook.remove()
    return list(patterns), values


def dense(lm: LanguageModel, ids: list[int], needle: tuple[int, int], rows: range, name: str = "locos") -> np.ndarray:
    """LOCOS, or a control of it, by its formula: (layer, head)."""
    patterns, values = eager_weights(lm, ids)
    model = copy.deepcopy(lm.model).double()
    first, stop = needle
    unembedding, found = model.lm_head.weight.detach(), []
    for layer, (pattern, value) in enumerate(zip(patterns, values, strict=True)):
        w_o = model.model.layers[layer].self_attn.o_proj.weight.detach().view(32, 4, 8)  # (d_model, head, d_head)
        v = value.view(len(ids), 2, 8).repeat_interleave(2, dim=1)  # (key, head, d_head)
        steps = []
        for t in rows:
            written = torch.einsum("khd,mhd,m->hk", v, w_o, unembedding[ids[t + 1]])
            written = torch.ones_like(written) if name == "locos_attention" else written
            phi = (pattern[0, :, t] * written)[:, : t + 1]  # (head, key)
            inside = phi[:, first:stop].sum(-1)
            share = -1.0 if name == "locos_dla" else (stop - first) / (t + 1 - (stop - first))
            steps.append(inside - share * (phi.sum(-1) - inside))
        found.append(torch.stack(steps).mean(0))
    return torch.stack(found).numpy()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", ["locos", "locos_attention", "locos_dla"])
def test_locos_is_its_formula_on_eager_weights(tokenizer, kind: str, forced: bool, name: str) -> None:
    lm = build(tokenizer, kind)
    method = Locos(lengths=[260], depths=[50], needles=1)
    prompt = method.task.build(lm, method.trials(lm)[0])
    answer = list(prompt.ids[slice(*prompt.span)])
    lead = [] if forced else tokenizer("Well then:")["input_ids"]
    if not forced:
        say(lm, [*lead, *answer, 0], len(prompt.ids))  # a lead whose steps do not count, and the end of the text
    scores = heads.method(name)(lm, forced=forced, **SETTINGS)
    start = len(prompt.ids) - 1 + len(lead)
    ids = [*prompt.ids, *lead, *answer]
    expected = dense(lm, ids, prompt.needle_span, range(start, start + len(answer)), name)
    scale = abs(expected).max()
    np.testing.assert_allclose(scores.mean, expected, rtol=0, atol=1e-5 if name == "locos_attention" else 1e-4 * scale)
    assert scores.details[0]["answer_steps"] == len(answer)
    late = name == "locos_dla"  # for which all keys are one; the others are given the answer in the needle's place
    rows = range(start + late, start + len(answer))
    beside = dense(lm, ids, prompt.needle_span if late else prompt.span, rows, name)
    assert abs(beside - expected).max() > 1e-3 * scale


@pytest.mark.parametrize("top", [0, 5])
def test_the_answer_against_other_steps_is_its_formula_on_eager_weights(tokenizer, top: int) -> None:
    """Other steps stand before and after the answer; the last is that of the token which ends the text."""
    lm = build(tokenizer)
    method = LocosContrastive(lengths=[260], depths=[50], needles=1)
    prompt = method.task.build(lm, method.trials(lm)[0])
    answer, lead = list(prompt.ids[slice(*prompt.span)]), tokenizer("Well then:")["input_ids"]
    after = tokenizer(", they say")["input_ids"]
    said = [*lead, *answer, *after, 0]
    say(lm, said, len(prompt.ids))
    patterns, _ = eager_weights(lm, [*prompt.ids, *said[:-1]])
    first, stop = prompt.needle_span
    found = torch.stack([pattern[0, :, len(prompt.ids) - 1 :] for pattern in patterns])  # (layer, head, row, key)
    looks = found[..., first:stop].sum(-1)
    if top:
        keys = found.argsort(-1, descending=True)[..., :top]
        looks = ((keys >= first) & (keys < stop)).double().mean(-1)
    at = torch.zeros(len(said), dtype=torch.bool)
    at[len(lead) : len(lead) + len(answer)] = True
    contrast = (looks[..., at].mean(-1) - looks[..., ~at].mean(-1)).clamp(min=0).numpy()
    assert (contrast > 0).sum() > 1 and (contrast == 0).sum() > 1
    scores = locos_contrastive(lm, top=top, gate=0.0, **SETTINGS)
    bound = 0 if top else 1e-5 / contrast.sum()  # of masses that are good to 1e-5, divided by their sum
    np.testing.assert_allclose(scores.mean, contrast / (contrast.sum() + 1e-9), rtol=1e-6, atol=bound)
    uniform = (stop - first) / len(prompt.ids)
    reached = float(contrast.max() / uniform)
    locos_contrastive(lm, top=top, gate=0.99 * reached, **SETTINGS)
    with pytest.raises(HeadscopeError, match="none of 1 trials was kept"):
        locos_contrastive(lm, top=top, gate=1.01 * reached, **SETTINGS)
    with pytest.raises(HeadscopeError, match="at least 0"):
        LocosContrastive(top=-1)


def test_without_other_steps_the_answer_stands_alone(tokenizer) -> None:
    lm = build(tokenizer)
    prompt = (method := Locos(lengths=[260], depths=[50], needles=1)).task.build(lm, method.trials(lm)[0])
    answer = list(prompt.ids[slice(*prompt.span)])
    patterns, _ = eager_weights(lm, [*prompt.ids, *answer[:-1]])
    mass = [pattern[0, :, len(prompt.ids) - 1 :, slice(*prompt.needle_span)].sum(-1).mean(-1) for pattern in patterns]
    expected = torch.stack(mass).numpy()
    scores = locos_contrastive(lm, top=0, gate=0.0, forced=True, **SETTINGS)
    np.testing.assert_allclose(scores.mean, expected / expected.sum(), rtol=0, atol=1e-5 / expected.sum())


def test_a_head_writes_what_its_slice_of_the_projection_gives(tokenizer) -> None:
    lm = build(tokenizer)
    z = torch.randn(3, 4, 8)
    writes, w_o = HeadWrites(lm), lm.model.model.layers[1].self_attn.o_proj.weight
    expected = torch.einsum("nhd,mhd->nhm", z, w_o.view(32, 4, 8))
    torch.testing.assert_close(writes.of(1, z), expected)
    assert len(writes) == 2
    torch.testing.assert_close(unembedding_rows(lm, [5, 3]), lm.model.lm_head.weight[[5, 3]])


def test_answer_steps_are_tokens_in_order_or_else_the_text(tokenizer) -> None:
    answer = tokenizer("sit in Dolores Park")["input_ids"]
    assert answer_steps(tokenizer, [7, *answer, 9, *answer], "sit in Dolores Park") == list(range(1, 1 + len(answer)))
    spaced = tokenizer(" Sit in Dolores Park.")["input_ids"]  # other tokens, other case
    found = answer_steps(tokenizer, spaced, "sit in Dolores Park")
    assert "sit in dolores park" in tokenizer.decode([spaced[i] for i in found]).lower()
    assert answer_steps(tokenizer, tokenizer("go to the beach")["input_ids"], "sit in Dolores Park") == []
    assert answer_steps(tokenizer, [], "sit") == []


def test_an_answer_that_is_not_said_does_not_count(tokenizer) -> None:
    lm = build(tokenizer)
    method = Locos(lengths=[260], depths=[50], needles=1)
    prompt = method.task.build(lm, method.trials(lm)[0])
    say(lm, [*tokenizer("eat and sit in a park on a day")["input_ids"], 0], len(prompt.ids))
    scored, details = method.score(lm, method.trials(lm)[0])
    assert scored is None and details["answer_steps"] == 0 and details["recall"] > 0.5


class Aim(Handler):
    """Heads look at chosen keys: (layer, head) -> the key of every decoding step; keys lie on a circle."""

    def __init__(self, targets: dict[tuple[int, int], list[int]], prompt: int) -> None:
        self.targets, self.prompt = targets, prompt

    def edit(self, call):
        def circle(position: torch.Tensor) -> torch.Tensor:
            a = position.float() * (2 * np.pi / 400)
            return torch.nn.functional.pad(torch.stack([a.cos(), a.sin()], -1), (0, call.query.shape[-1] - 2))

        step = call.mask.query_offset - (self.prompt - 1)
        if call.query.shape[2] > 1 or step < 0:
            return call
        paths = [self.targets.get((call.layer, head), []) for head in range(call.query.shape[1])]
        aims = torch.tensor([path[step] if step < len(path) else 0 for path in paths])
        keys = circle(torch.arange(call.key.shape[2])).expand(*call.key.shape)
        return call.with_(query=3e4 * circle(aims)[None, :, None], key=keys)


def test_activation_is_whether_a_head_copied_at_all(tokenizer) -> None:
    """Two contexts, the needle at two places: a head that looks at one place only, and one that looks at both."""
    given = {**SETTINGS, "depths": [0, 50], "threshold": -1.0}
    lm = build(tokenizer)
    method = Locos(lengths=[260], depths=[0, 50], needles=1)
    prompts = [method.task.build(lm, trial) for trial in method.trials(lm)]
    early, late = (prompt.span[0] for prompt in prompts)
    answer = list(prompts[0].ids[slice(*prompts[0].span)])
    assert answer == list(prompts[1].ids[slice(*prompts[1].span)]) and late > early + len(answer)
    say(lm, [*answer, 0], 260)
    targets = {(0, 1): [early, early + 1], (1, 2): [early, late + 1]}
    with attached(lm, Aim(targets, 260)):
        copied, fired = retrieval(lm, **given), context_activation(lm, **given)
    n = len(answer)
    expected = np.zeros((2, 2, 4))
    expected[0, 0, 1], expected[:, 1, 2] = 2 / n, 1 / n
    np.testing.assert_allclose(copied.trials, expected)
    np.testing.assert_array_equal(fired.trials, expected > 0)
    assert fired.mean[0, 1] == 0.5 and fired.mean[1, 2] == 1.0
    made = fired.provenance
    assert made["contexts"] == 2 and made["always"] == ["L1H2"] and made["sometimes"] == {"L0H1": 0.5}
    assert made["retrieval_score"] == pytest.approx({"L1H2": 1 / n, "L0H1": 1 / n})
    assert fired.details[0]["copied"] == pytest.approx({"L0H1": 2 / n, "L1H2": 1 / n})


@pytest.mark.slow
def test_smollm2_writes_from_the_needle_where_it_retrieves(smollm2) -> None:
    """Eager weights of the real model, on its own answer; its retrieval heads write more than other heads."""
    given = {"lengths": [260], "depths": [50], "needles": 1, "progress": False}
    scores, copied = locos(smollm2, **given), retrieval(smollm2, **given)
    fired = context_activation(smollm2, **given)
    np.testing.assert_array_equal(fired.mean, copied.mean > 0)
    assert scores.details[0]["answer_steps"] > 5
    some = copied.mean > 0.3
    assert scores.mean[some].mean() > 10 * abs(scores.mean[~some].mean())
