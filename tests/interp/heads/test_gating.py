"""Trained gates: gradients against hooks on the untouched model in float64, heads with known roles, what is left.

Tolerance: float32 through two layers, logits up to about 10: 1e-5 of them, 1e-4 for log-probabilities and gradients.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.contrastive_gating import ContrastiveGating
from headscope.interp.heads.causal.gates import Gates, Stage, fit, gated, log_probabilities, shuffled, start
from headscope.interp.heads.causal.head_gating import HeadGating, role_of, role_scores, role_table
from headscope.interp.heads.causal.settings import tokenized
from headscope.interp.heads.causal.toggling import toggle
from headscope.interp.models import LanguageModel
from headscope.interp.prompts.patterns import load_pairs, pattern_pairs
from headscope.interp.sites import handlers_on
from headscope.interp.sites.huggingface.route import is_attached

WORDS = 20
SEED = 2  # whose four starts draw no gate beyond the clip, where the penalty does not move it
BATCH = [([3, 7, 5], [9]), ([4, 8, 2, 6, 1], [11, 12]), ([5, 5], [2])]


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


@pytest.fixture
def llama() -> LanguageModel:
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    common = dict(vocab_size=WORDS, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, max_position_embeddings=64, **sizes, **common))
    return load_model(model.eval(), tokenizer=tokenizer())


def planted(writes: list[list[float]]) -> LanguageModel:
    """A GPT-2 of one layer whose head h adds ``writes[h][t]`` times the direction of word t, whatever it reads.

    Directions are pairs of coordinates (1, -1), so that the final norm's centring leaves them alone; every word's
    embedding is the last one.
    """
    width, count = 16, len(writes)
    config = GPT2Config(
        n_layer=1, n_head=count, n_embd=width, n_positions=16, vocab_size=WORDS, tie_word_embeddings=False
    )
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        d = width // count
        for h, row in enumerate(writes):
            model.transformer.h[0].attn.c_attn.bias[2 * width + h * d] = 1.0  # the value's first coordinate
            for t, strength in enumerate(row):
                model.transformer.h[0].attn.c_proj.weight[h * d, 2 * t] = strength
                model.transformer.h[0].attn.c_proj.weight[h * d, 2 * t + 1] = -strength
        for t in range(len(writes[0])):
            model.lm_head.weight[t, 2 * t], model.lm_head.weight[t, 2 * t + 1] = 0.5, -0.5
        model.transformer.wte.weight[:, -2], model.transformer.wte.weight[:, -1] = 2.0, -2.0
    return load_model(model, tokenizer=tokenizer())


def by_hooks(lm: LanguageModel, values: torch.Tensor, x: list[int], y: list[int]) -> torch.Tensor:
    """Mean log-probability of y after x with z scaled at the input of every output projection: float64, eager."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    hooks = []
    for i, layer in enumerate(model.model.layers):

        def scale(module, args, i=i):
            z = args[0].view(*args[0].shape[:2], 4, 8) * values[i][None, None, :, None]
            return (z.reshape(args[0].shape),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(scale))
    log_p = model(torch.tensor([[*x, *y]])).logits.log_softmax(-1)[0]
    return torch.stack([log_p[len(x) - 1 + i, token] for i, token in enumerate(y)]).mean()


def test_log_probabilities_and_gradients_are_those_of_scaled_projection_inputs(llama: LanguageModel) -> None:
    """Pairs of different lengths in one padded batch, two masks at once."""
    theta = start(0, [0, 1], 2, 4).requires_grad_(True)
    with gated(llama) as gates:
        gates.values = theta.sigmoid()
        found = log_probabilities(llama, gates, BATCH)
        (grad,) = torch.autograd.grad(found.sum(), theta)
    reference = theta.detach().double().requires_grad_(True)
    expected = [[by_hooks(llama, reference[m].sigmoid(), *pair) for pair in BATCH] for m in range(2)]
    total = torch.stack([one for row in expected for one in row]).sum()
    (wanted,) = torch.autograd.grad(total, reference)
    for row, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.detach(), torch.stack(want).detach(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-4)
    assert wanted.abs().min() > 0 and wanted.abs().max() > 100 * 1e-4


def test_open_gates_are_the_model(llama: LanguageModel) -> None:
    with gated(llama) as gates:
        free = log_probabilities(llama, gates, BATCH)
        gates.values = torch.ones(1, 2, 4)
        torch.testing.assert_close(log_probabilities(llama, gates, BATCH), free)


def test_nothing_stays_on_the_model(llama: LanguageModel) -> None:
    frozen = llama.model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    HeadGating(starts=1, updates=2, pairs=[("w1 w2", "w3")]).score(llama, {"sample": 0})
    with pytest.raises(ZeroDivisionError), gated(llama):
        1 / 0  # noqa: B018
    for name, p in llama.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad == (p is not frozen)
    assert not is_attached(llama.model) and not handlers_on(llama)


def test_a_stage_by_hand() -> None:
    """A constant gradient moves Adam by the rate: the sum of a line from 0.5 to 0.1, as torch's LinearLR falls."""
    gates = Gates()

    def nothing(rng: np.random.Generator) -> torch.Tensor:
        assert gates.values is not None
        return 0 * gates.values.sum((1, 2))

    theta = torch.tensor([[[0.0, 6.0], [-6.0, 1.0]], [[-1.0, 4.5], [0.0, 0.0]]])
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for penalty in (0.1, -0.1):
        found = fit(gates, theta, nothing, Stage(5, 0.5, 0.1, penalty), np.random.default_rng(0))
        moved = np.sign(penalty) * sum(rates)  # outside the clip nothing pushes
        expected = torch.where(theta.abs() < 4, theta + moved, theta)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


def test_masks_that_train_together_do_not_know_of_each_other(llama: LanguageModel) -> None:
    theta, stage = start(3, [0, 1, 2], 2, 4), Stage(4, 0.5, 0.1, 0.1)

    def train(part: torch.Tensor) -> torch.Tensor:
        draw = shuffled(3, 2)
        with gated(llama) as gates:

            def objective(rng: np.random.Generator) -> torch.Tensor:
                return -log_probabilities(llama, gates, [BATCH[i] for i in draw(rng)]).mean(1)

            return fit(gates, part, objective, stage, np.random.default_rng(5))

    together = train(theta)
    for i in range(3):
        np.testing.assert_allclose(train(theta[i : i + 1])[0], together[i], rtol=0, atol=1e-3)
    assert not torch.equal(together[0], together[1])


def test_heads_with_known_roles() -> None:
    """Head 0 writes the target, head 1 against it, heads 2 and 3 nothing."""
    assert start(SEED, range(4), 1, 4).abs().max() < 4
    lm = planted([[3.0], [-3.0], [0.0], [0.0]])
    pairs = [("w1 w2 w3", "w0"), ("w4 w5", "w0")]
    scores = heads.head_gating(
        lm, pairs=pairs, starts=4, updates=150, batch=2, together=2, seed=SEED, penalty=0.1, progress=False
    )
    by_role = role_scores(scores)
    means = {role: one.mean[0] for role, one in by_role.items()}
    np.testing.assert_array_equal(scores.trials, by_role["facilitation"].trials)
    assert means["facilitation"][0] > 0.9 and (means["facilitation"][1:] < 0.1).all()
    assert means["interference"][1] > 0.9 and (np.delete(means["interference"], 1) < 0.1).all()
    assert (means["irrelevance"][2:] > 0.9).all() and (means["irrelevance"][:2] < 0.1).all()
    made = scores.provenance
    assert made["percent_of_heads_in_every_start"] == {"facilitation": 25, "interference": 25, "irrelevance": 50}
    assert made["inconsistent_percent"] == 0
    table = role_table(scores)
    row = table[(table["role"] == "interference") & (table["head"] == 1)].iloc[0]
    assert row["share"] == 1.0 and row["least"] <= row["mean"] <= row["largest"] and row["n"] == 4
    assert (table[(table["role"] == "irrelevance") & (table["head"] < 2)]["share"] == 0).all()


def test_toggling_is_hooks_that_close_and_open_the_first_heads(llama: LanguageModel) -> None:
    """The first heads of an order that is given, closed and open, all others at their gates."""
    rng = np.random.default_rng(0)
    retained, scores = rng.uniform(0.2, 0.8, (2, 4)), rng.uniform(0, 1, (2, 4))
    found = toggle(llama, retained, {"some": scores}, 3, BATCH)["some"]
    order = sorted(np.ndindex(2, 4), key=lambda at: -scores[at])
    expected = []
    for k in range(1, 4):
        both = []
        for value in (0.0, 1.0):
            gates = torch.from_numpy(retained.copy())
            for at in order[:k]:
                gates[at] = value
            both.append(torch.stack([by_hooks(llama, gates, *pair) for pair in BATCH]).mean().item())
        expected.append(both[0] - both[1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert min(map(abs, expected)) > 20 * 2e-4 and not handlers_on(llama)
    scores[0] = np.nan  # a layer without attention has no head to toggle
    retained[0] = np.nan
    assert len(toggle(llama, retained, {"some": scores}, 8, BATCH)["some"]) == 4


def test_heads_of_known_roles_are_validated() -> None:
    """Closed, the head that writes the target costs, the one against it pays, and those that write nothing do not."""
    lm = planted([[3.0], [-3.0], [0.0], [0.0]])
    given = dict(pairs=[("w1 w2 w3", "w0"), ("w4 w5", "w0")], starts=1, updates=60, batch=2, seed=SEED, penalty=0.1)
    made = heads.head_gating(lm, toggled=1, progress=False, **given).provenance
    delta = {role: one[0] for role, one in made["log_probability_gained_when_closed"].items()}
    assert delta["facilitation"] < -0.5 and delta["interference"] > 0.5 and abs(delta["irrelevance"]) < 1e-4
    assert "log_probability_gained_when_closed" not in heads.head_gating(lm, progress=False, **given).provenance


def test_contrast_closes_what_only_the_forgotten_task_needs() -> None:
    """Head 0 writes both targets alike, head 1 that of the task to forget, head 2 that of the task to retain."""
    lm = planted([[2.0, 2.0], [3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    forget, retain = [("w4 w5 w6", "w0"), ("w7 w8", "w0")], [("w4 w5 w6", "w1"), ("w7 w8", "w1")]
    given = dict(starts=2, updates=300, batch=2, seed=SEED, penalty=0.1, progress=False)
    closed = heads.contrastive_gating(lm, retain=retain, forget=forget, **given).mean[0]
    assert closed[1] > 0.8 and closed[2] < 0.1 and closed[3] < 0.3
    other = heads.contrastive_gating(lm, retain=forget, forget=retain, **given).mean[0]
    assert other[2] > 0.8 and other[1] < 0.1
    with pytest.raises(HeadscopeError, match="or neither"):
        heads.contrastive_gating(lm, retain=retain, **given)
    with pytest.raises(HeadscopeError, match="2 pairs to retain do not match 1"):
        heads.contrastive_gating(lm, retain=retain, forget=forget[:1], **given)


def test_roles_are_those_of_table_1() -> None:
    retained, removed = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 1.0])
    assert role_of("facilitation", retained, removed).tolist() == [1, 0, 0, 1]
    assert role_of("interference", retained, removed).tolist() == [0, 1, 0, 1]
    assert role_of("irrelevance", retained, removed).tolist() == [0, 0, 1, 0]


def test_starts_do_not_depend_on_what_trains_beside_them(llama: LanguageModel) -> None:
    assert torch.equal(start(7, [2], 2, 4)[0], start(7, [0, 1, 2], 2, 4)[2])
    draw, rng = shuffled(5, 3), np.random.default_rng(0)
    drawn = draw(rng) + draw(rng)
    assert sorted(drawn[:5]) == list(range(5))  # every example once before any again


def test_patterns_and_files(tmp_path: Path) -> None:
    aba, abb = pattern_pairs(3, "ABA", 0), pattern_pairs(3, "ABB", 0)
    for (x, y), (other, z) in zip(aba, abb, strict=True):
        lines = x.split("\n")
        assert len(lines) == 5 and all(line.split("^")[0] == line.split("^")[2] for line in lines[:4])
        assert lines[4] == f"{y}^{z}^" and other.split("\n")[4] == lines[4]
    assert pattern_pairs(3, "ABA", 0) == aba != pattern_pairs(3, "ABA", 1)
    (path := tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "target": "b"}\n\n')
    assert load_pairs(path) == [("a", "b")]
    for broken in ([], [("a",)], [("a", "")], tmp_path / "none.jsonl"):
        with pytest.raises(HeadscopeError, match="pair"):
            load_pairs(broken)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": "big"}, "size is"),
        ({"role": "x"}, "role is"),
        ({"starts": 0}, "at least 1"),
        ({"toggled": -1}, "toggled=-1"),
    ],
)
def test_bad_settings_are_one_line(given: dict, said: str) -> None:
    with pytest.raises(HeadscopeError, match=said):
        HeadGating(**given)


def test_the_published_size_is_a_name_away() -> None:
    assert HeadGating(size="published").weight == 0.1 and HeadGating(penalty=0.3).weight == 0.3
    assert HeadGating(size="published").sizes == {"starts": 10, "updates": 500, "batch": 64}
    assert HeadGating().sizes == {"starts": 3, "updates": 16, "batch": 2}
    assert ContrastiveGating().sizes == {"starts": 3, "updates": 24, "batch": 2}
    assert HeadGating(size="published", starts=20).sizes["starts"] == 20  # the paper's number for this task


@pytest.mark.slow
def test_smollm2_gates_do_what_they_are_fitted_for(smollm2) -> None:
    """The two penalties part the gates (by more than three standard errors over heads), and what was fitted helps
    pairs that were not seen, beside the gates it began with."""
    scores = heads.head_gating(smollm2, starts=1, updates=8, progress=False)
    retained, removed = (np.array(scores.details[0][stage]) for stage in ("retained", "removed"))
    apart = (retained - removed).ravel()
    assert apart.shape == (270,) and apart.mean() > 3 * apart.std(ddof=1) / np.sqrt(270)
    unseen = tokenized(smollm2, pattern_pairs(8, "ABA", 99))
    tables = [start(0, [0], 30, 9)[0].sigmoid(), torch.tensor(retained), torch.tensor(removed)]
    with gated(smollm2) as gates, torch.no_grad():
        gates.values = torch.stack([table.float() for table in tables])
        begun, opened, closed = log_probabilities(smollm2, gates, unseen).mean(1).tolist()
    assert opened > begun + 1 and closed > begun + 1  # nats
