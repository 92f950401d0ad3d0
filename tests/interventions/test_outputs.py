"""Edits of heads' outputs against the same change of z made by hand, with plain PyTorch hooks on the output projection.

Tolerance: as derived in test_ablate.py, 1e-5 of the largest logit; that every edit moves logits by more than 1e-2 of
that size is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.statistics import HeadOutput
from headscope.interp.statistics.spans import published_spans
from headscope.interventions import (
    AblateHeads,
    AddToHeads,
    AffineHeads,
    ClampHeads,
    Edit,
    PatchHeads,
    ProjectHeads,
    ScaleHeads,
    apply,
    head_samples,
)

TOLERANCE = 1e-5
PICKED = [(0, 1), (1, 3), (1, 0)]
LAYERS, HEADS, D_HEAD = 2, 4, 8
Change = Callable[[int, int, Tensor, Tensor], Tensor]  # layer, head, z (batch, query, d_head), positions -> z


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, A, U = (noise(seed, LAYERS, HEADS, D_HEAD) for seed in (1, 2, 3))
SIGMA = noise(4, LAYERS, HEADS).abs()
BANK = noise(5, LAYERS, HEADS, 7, D_HEAD)
Z = noise(6, LAYERS, HEADS, 3, D_HEAD)
LOW = noise(7, LAYERS, HEADS)


def unit(layer: int, head: int) -> Tensor:
    return U[layer, head] / U[layer, head].norm()


def along(layer: int, head: int, z: Tensor, low: float, high: float) -> Tensor:
    """z with its coordinate along U brought between two numbers."""
    c = z @ unit(layer, head)
    return z + (c.clamp(low, high) - c)[..., None] * unit(layer, head)


def sample(at: Tensor, seed: int) -> Tensor:
    """The numbers that the docstring of ``drawn`` names, one by one in Python."""

    def one(p: int) -> int:
        x = (p + (0x9E3779B9 * (seed + 1))) % 2**32
        for _ in range(2):
            x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
        return (x ^ (x >> 16)) % BANK.shape[2]

    return torch.tensor([[one(p) for p in row] for row in at.tolist()])


def patched(i: int, h: int, z: Tensor, at: Tensor) -> Tensor:
    z = z.clone()
    for source, position in enumerate((5, 1, 2)):
        z[at == position] = Z[i, h, source]
    return z


def by_place(table: Tensor) -> Tensor:
    return torch.stack([table[layer, head] for layer, head in PICKED])


# name -> the edit, and what it does to z at strength 1
BY_HAND: dict[str, tuple[Edit, Change]] = {
    "resample": (
        AblateHeads(PICKED, "resample", samples=BANK, seed=3),
        lambda i, h, z, at: BANK[i, h][sample(at, 3)],
    ),
    "add": (AddToHeads(PICKED, V), lambda i, h, z, at: z + V[i, h]),
    "add, sigma": (
        AddToHeads(PICKED, by_place(V), sigma=by_place(SIGMA)),
        lambda i, h, z, at: z + SIGMA[i, h] * V[i, h],
    ),
    "affine": (AffineHeads(PICKED, A=A, v=V), lambda i, h, z, at: (1 + A[i, h]) * z + V[i, h]),
    "affine, A": (AffineHeads(PICKED, A=by_place(A)), lambda i, h, z, at: (1 + A[i, h]) * z),
    "project": (ProjectHeads(PICKED, 3 * U), lambda i, h, z, at: z - (z @ unit(i, h))[..., None] * unit(i, h)),
    "clamp": (ClampHeads(PICKED, U, low=-0.1, high=0.2), lambda i, h, z, at: along(i, h, z, -0.1, 0.2)),
    "clamp, low": (ClampHeads(PICKED, U, low=LOW), lambda i, h, z, at: along(i, h, z, float(LOW[i, h]), 1e9)),
    "patch": (PatchHeads(PICKED, Z, positions=[[(5, 6), (1, 3)]]), patched),
}
CASES = [pytest.param(*case, id=name) for name, case in BY_HAND.items()]


@contextmanager
def hooked(model: Any, change: Change, heads: Any = PICKED, strength: float = 1.0) -> Iterator[None]:
    """``change`` of z before the output projection; positions are those that the model itself is given."""
    at: list[Tensor] = []

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        at[:] = [kwargs["position_ids"]]

    def hook_of(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            for head in (head for where, head in heads if where == layer):
                place = slice(head * D_HEAD, (head + 1) * D_HEAD)
                z = x[..., place].clone()
                x[..., place] = z + strength * (change(layer, head, z, at[0]) - z)
            return (x, *args[1:])

        return hook

    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    leaves = [block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj for block in blocks]
    hooks = [leaf.register_forward_pre_hook(hook_of(layer)) for layer, leaf in enumerate(leaves)]
    hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def tokens() -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded to the left."""
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=at, **options).logits
    return found


def assert_equal(found: Tensor, expected: Tensor, untouched: Tensor | None = None) -> None:
    scale = float(expected.abs().max())
    if untouched is not None:
        assert float((expected - untouched).abs().max()) > 1e-2 * scale, "the edit hardly changes anything"
    assert float((found - expected).abs().max()) <= TOLERANCE * scale


# -- the same by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(("edit", "change"), CASES)
def test_it_is_the_change_of_z_by_hand(wide_lm: LanguageModel, edit: Edit, change: Change, strength: float) -> None:
    """Grouped key/value heads, transposed projections, a sliding window; left padding, and generation from a cache."""
    (ids, mask), model = tokens(), wide_lm.model
    edit, real = edit.with_settings(strength=strength), mask.bool()
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    untouched = logits(model, ids, mask)
    with hooked(model, change, strength=strength):
        expected = logits(model, ids, mask)
        written = model.generate(ids, attention_mask=mask, **options)
    with apply(model, edit):
        assert_equal(logits(model, ids, mask)[real], expected[real], untouched[real])
        found = model.generate(ids, attention_mask=mask, **options)
    assert found.sequences.tolist() == written.sequences.tolist()
    assert_equal(torch.stack(found.logits), torch.stack(written.logits))


@pytest.mark.parametrize("strength", [-2.0, 15.0])
@pytest.mark.parametrize("name", ["add", "affine"])
def test_strengths_below_0_and_above_1(llama: LanguageModel, name: str, strength: float) -> None:
    edit, change = BY_HAND[name]
    ids = tokens()[0]
    with hooked(llama.model, change, strength=strength):
        expected = logits(llama.model, ids)
    with apply(llama, edit.with_settings(strength=strength)):
        assert_equal(logits(llama.model, ids), expected, logits(llama.model, ids) * 0)
    for other in ("project", "clamp", "patch", "resample"):
        with pytest.raises(HeadscopeError, match="strength must be a Python number between 0 and 1"):
            BY_HAND[other][0].with_settings(strength=strength)


def test_positions_and_phases_choose_the_rows(llama: LanguageModel) -> None:
    ids = tokens()[0]
    with hooked(llama.model, lambda i, h, z, at: torch.where(((at >= 2) & (at < 4))[..., None], z + V[i, h], z)):
        expected = logits(llama.model, ids)
    with apply(llama, AddToHeads(PICKED, V, positions=(2, 4))):
        assert_equal(logits(llama.model, ids), expected, logits(llama.model, ids) * 0)
    iti = AddToHeads(PICKED, V, sigma=SIGMA, strength=2.0, during="answer")  # the rows that choose a token
    with hooked(llama.model, lambda i, h, z, at: torch.where((at >= 8)[..., None], z + 2 * SIGMA[i, h] * V[i, h], z)):
        expected = logits(llama.model, ids)
    with apply(llama, iti), prompt_boundary(ids.shape[1]):
        assert_equal(logits(llama.model, ids), expected)


NOTHING = {
    "add": AddToHeads(PICKED, 0 * V),
    "affine": AffineHeads(PICKED, A=0 * A, v=0 * V),
    "clamp": ClampHeads(PICKED, U, low=-1e6, high=1e6),
    "scale": ScaleHeads(PICKED, 1.0),
    "patch": PatchHeads(PICKED, Z, positions=[[], []]),
}


@pytest.mark.parametrize("name", list(NOTHING))
def test_settings_that_change_nothing_are_the_traced_model_to_the_bit(llama: LanguageModel, name: str) -> None:
    ids, mask = tokens()
    with attached(llama.model, Handler()):
        expected = logits(llama.model, ids, mask)
    spans: dict[str, Any] = {"positions": [[], []]} if name == "patch" else {}
    with apply(llama, NOTHING[name].with_settings(**spans)):
        assert torch.equal(logits(llama.model, ids, mask), expected)


def test_the_order_of_composition(llama: LanguageModel) -> None:
    ids = tokens()[0]
    add, scale = AddToHeads(PICKED, V), ScaleHeads(PICKED, -0.5)
    with hooked(llama.model, lambda i, h, z, at: -0.5 * (z + V[i, h])):
        first = logits(llama.model, ids)
    with hooked(llama.model, lambda i, h, z, at: -0.5 * z + V[i, h]):
        last = logits(llama.model, ids)
    with apply(llama, add + scale):
        assert_equal(logits(llama.model, ids), first, last)
    with apply(llama, scale + add):
        assert_equal(logits(llama.model, ids), last, first)


def test_a_small_offset_many_times_over_in_half_precision(llama: LanguageModel) -> None:
    """15 times a vector of a thousandth of z: added before the rounding, it stays within one rounding of the sum."""
    model, ids = llama.model.to(torch.bfloat16), tokens()[0]
    with trace(model, [HeadOutput((4,))]) as tracer:
        logits(model, ids)
    z = torch.from_numpy(tracer.record["z"].to_numpy().copy())[:, 0, 1, 0]  # (example, d_head) of L0H1
    small = z.abs().mean() * 1e-3 * V[:1, 1:2].sign().expand(LAYERS, HEADS, D_HEAD)
    with apply(model, AddToHeads([(0, 1)], small, strength=15.0)), trace(model, [HeadOutput((4,))]) as tracer:
        logits(model, ids)
    found = torch.from_numpy(tracer.record["z"].to_numpy().copy())[:, 0, 1, 0]
    expected = z + 15 * small[0, 1]
    assert bool(((found - expected).abs() <= 2.0**-8 * expected.abs()).all())  # half a unit of bfloat16
    assert float((expected - z).abs().mean()) > 1e-2 * float(z.abs().mean())


def test_gradients_reach_what_is_trained(llama: LanguageModel) -> None:
    ids = tokens()[0]
    grads = []
    for _ in range(2):  # a second step must not find the first one's graph
        a, v = (x.clone().requires_grad_() for x in (A, V))
        edit = AffineHeads(PICKED, A=a, v=v)
        with apply(llama, edit, grad=True):
            for _ in range(2):
                llama.model(input_ids=ids).logits.square().mean().backward()
        grads.append((a.grad, v.grad))
    a, v = (x.clone().requires_grad_() for x in (A, V))
    with hooked(llama.model, lambda i, h, z, at: (1 + a[i, h]) * z + v[i, h]):
        at = torch.arange(ids.shape[1])[None]
        llama.model(input_ids=ids, position_ids=at).logits.square().mean().backward()
    for mine, hand in zip(grads[0], (a.grad, v.grad), strict=True):
        assert mine is not None and hand is not None
        assert float((mine - 2 * hand).abs().max()) <= 1e-4 * float(hand.abs().max())  # through backward, too
        assert all(float(hand[head].abs().max()) > 0 for head in PICKED) and not bool(mine[0, 0].any())


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_of_all_heads_and_of_the_chosen_ones(llama: LanguageModel) -> None:
    """They are one edit; of other heads the first has their own vectors, the second those of the heads they replace."""
    ids, others = tokens()[0], HeadSet.of([(0, 2), (1, 1), (1, 2)])
    whole, chosen = AddToHeads(PICKED, V), AddToHeads(PICKED, by_place(V))
    with apply(llama, whole):
        expected = logits(llama.model, ids)
    with apply(llama, chosen):
        assert torch.equal(logits(llama.model, ids), expected)
    pairs = dict(zip(others, PICKED, strict=True))
    with hooked(llama.model, lambda i, h, z, at: z + V[i, h], others):
        own = logits(llama.model, ids)
    with hooked(llama.model, lambda i, h, z, at: z + V[pairs[i, h]], others):
        taken = logits(llama.model, ids)
    with apply(llama, whole.with_heads(others)):
        assert_equal(logits(llama.model, ids), own, taken)
    with apply(llama, chosen.with_heads(others)):
        assert_equal(logits(llama.model, ids), taken, own)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddToHeads(PICKED, V.long()), r"vectors is int64 \(2, 4, 8\); it has to be a floating-point tensor"),
        (
            lambda: AddToHeads(PICKED, V[0, 0]),
            r"vectors is float32 \(8,\); .*\(layer, head, d_head\) or, .*\(3, d_head\)",
        ),
        (lambda: AddToHeads(PICKED, V[0]), "vectors has rows for 4 heads, but 3 are chosen"),
        (lambda: AddToHeads(PICKED, V / 0), "vectors holds numbers that are not finite"),
        (lambda: AddToHeads(PICKED, [1.0]), r"vectors must be a torch tensor, not \[1.0\]"),
        (lambda: AddToHeads(PICKED, None), "vectors must be a torch tensor, not None"),
        (lambda: AddToHeads(PICKED, V, sigma=2.0), "sigma must be a torch tensor, not 2.0"),
        (lambda: AddToHeads(PICKED, V, strength=float("inf")), "strength must be a finite number"),
        (lambda: AffineHeads(PICKED), "needs A .*, v .* or both"),
        (lambda: ClampHeads(PICKED, U), "needs a bound"),
        (lambda: ClampHeads(PICKED, U, low=1.0, high=0.5), "low is above high"),
        (lambda: ClampHeads(PICKED, U, low=float("nan")), "low must be a finite number"),
        (lambda: ClampHeads(PICKED, U, low="x"), "low must be a torch tensor, not 'x'"),
        (lambda: ClampHeads(PICKED, U, low=LOW, high=by_place(LOW)), r"low is \(2, 4\), high \(3,\)"),
        (lambda: PatchHeads(PICKED, Z), "needs positions"),
        (lambda: PatchHeads(PICKED, Z, positions=(0, 3), during="decode"), "'always' or 'prefill', not 'decode'"),
        (lambda: AblateHeads(PICKED, "resample"), r"needs samples=head_samples\(lm, texts\)"),
        (lambda: AblateHeads(PICKED, samples=BANK), "takes no samples"),
        (lambda: AblateHeads(PICKED, "resample", samples=BANK, seed=-1), "seed must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddToHeads(PICKED, V[:, :2]), r"vectors have the shape \(2, 2, 8\), the model needs \(2, 4, d_head\)"),
        (lambda: AffineHeads(PICKED, v=by_place(V)[:, :4]), "v have 4 dimensions a head, layer 0 has 8"),
        (lambda: ProjectHeads(PICKED, U * (torch.arange(4) != 1)[None, :, None]), "the direction of L0H1 is 0"),
        (lambda: PatchHeads(PICKED, Z, positions=(0, 2)), r"z has 3 positions, but the spans \[\(0, 2\)\] have 2"),
        (lambda: PatchHeads(PICKED, Z, positions=[[(0, 2), (1, 2)]]), "have 3, or overlap"),
        (lambda: PatchHeads(PICKED, Z, positions=(0, 2**31 - 1)), "have 2147483647, or overlap"),
        (lambda: PatchHeads(PICKED, Z, positions=(7, 10)), "are not all in this prompt of 9 tokens"),
        (lambda: PatchHeads(PICKED, Z, positions=(0, 3), length=8), "a prompt of 8 tokens, this one has 9"),
        (lambda: PatchHeads(PICKED, Z, positions="needle"), "no span is called 'needle'"),
    ],
)
def test_what_does_not_fit_the_model_or_the_prompt(llama: LanguageModel, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused, apply(llama, make()):
        logits(llama.model, tokens()[0])
    assert "\n" not in str(refused.value)


# -- patching ----------------------------------------------------------------------------------------------------------

SOURCE, TARGET = "w4 w8 w15 w16 w23 w42 w7", "w1 w5 w9 w2 w7 w3 w11"


def z_of(lm: LanguageModel, text: str) -> dict[tuple[int, int], Tensor]:
    """By hooks: what every head gives on a text, (position, d_head)."""
    seen: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, head: int, z: Tensor, at: Tensor) -> Tensor:
        seen[layer, head] = z[0].clone()
        return z

    with hooked(lm.model, keep, [(i, h) for i in range(LAYERS) for h in range(HEADS)]):
        logits(lm.model, lm.encode(text)["input_ids"])
    return seen


def test_from_prompt_takes_the_sources_rows(lm: LanguageModel) -> None:
    source, ids = z_of(lm, SOURCE), lm.encode(TARGET)["input_ids"]

    def by_hand(pairs: list[tuple[int, int]]) -> Change:
        def change(i: int, h: int, z: Tensor, at: Tensor) -> Tensor:
            z = z.clone()
            for taken, to in pairs:
                z[at == to] = source[i, h][taken]
            return z

        return change

    whole = PatchHeads.from_prompt(lm, SOURCE, PICKED)
    same = PatchHeads.from_prompt(lm, SOURCE, "L0H1,L1H3,L1H0", (2, 4), strength=0.5)
    mapped = PatchHeads.from_prompt(lm, SOURCE, PICKED, (2, 4), to=[[(6, 7), (0, 1)]])
    assert (whole.length, same.length, mapped.length) == (7, 7, None) and whole.prompt == SOURCE
    assert mapped.taken == [(2, 4)] and whole.taken is None
    everywhere = [(at, at) for at in range(7)]
    for edit, pairs in ((whole, everywhere), (same, [(2, 2), (3, 3)]), (mapped, [(2, 6), (3, 0)])):
        with hooked(lm.model, by_hand(pairs), strength=edit.strength):
            expected = logits(lm.model, ids)
        with apply(lm, edit):
            assert_equal(logits(lm.model, ids), expected, logits(lm.model, ids) * 0)
    with apply(lm, whole):  # from itself nothing changes
        assert_equal(logits(lm.model, lm.encode(SOURCE)["input_ids"]), logits_outside(lm, SOURCE))
    for bad in ((5, 8), (3, 3), (-1, 2)):
        with pytest.raises(HeadscopeError, match="the source prompt has tokens 0 to 6|is no span"):
            PatchHeads.from_prompt(lm, SOURCE, PICKED, bad)
    with pytest.raises(HeadscopeError, match="takes span= and to=, and measures positions itself"):
        PatchHeads.from_prompt(lm, SOURCE, PICKED, positions=(2, 4))


def logits_outside(lm: LanguageModel, text: str) -> Tensor:
    return logits(lm.model, lm.encode(text)["input_ids"])


def test_patching_behind_a_cached_prefix_and_in_padded_batches(llama: LanguageModel) -> None:
    """The prompt in one pass, in two pieces on a cache, and beside a longer one with spans of its own."""
    edit = PatchHeads.from_prompt(llama, SOURCE, PICKED, (2, 4), to=(4, 6))
    ids = llama.encode(TARGET)["input_ids"]
    with apply(llama, edit):
        expected = logits(llama.model, ids)
        assert float((expected - logits_outside(llama, TARGET + " w2")[:, :7]).abs().max()) < 1e-3  # patched, too
        with prompt_boundary(ids.shape[1]), torch.no_grad():
            first = llama.model(input_ids=ids[:, :5], use_cache=True)
            second = llama.model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
        assert_equal(torch.cat([first.logits, second.logits], 1), expected)
        with pytest.raises(HeadscopeError, match="not all in this prompt of 5 tokens; .* prompt_boundary"):
            llama.model(input_ids=ids[:, :5])
        with pytest.raises(HeadscopeError, match="does not know where this prompt ends; .* prompt_boundary"):
            llama.model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    with torch.no_grad():  # a prefix that was read outside the block
        prefix = llama.model(input_ids=ids[:, :4], use_cache=True)
        with apply(llama, edit), prompt_boundary(ids.shape[1]):
            rest = llama.model(input_ids=ids[:, 4:], past_key_values=prefix.past_key_values)
    assert_equal(rest.logits, expected[:, 4:])
    both = llama.encode([TARGET, "w9 w9 w1 w2 w3 w30 w31 w32 w33"], padding_side="left")
    with apply(llama, edit.with_settings(positions=[(4, 6), (1, 3)])):
        found = logits(llama.model, both["input_ids"], both["attention_mask"])
    assert_equal(found[0, 2:], expected[0])
    with apply(llama, edit.with_settings(positions="middle")), published_spans({"middle": (4, 6)}):
        assert torch.equal(logits(llama.model, ids), expected)


def test_random_heads_are_patched_with_their_own(llama: LanguageModel) -> None:
    others = HeadSet.of([(0, 3), (1, 1), (1, 2)])
    edit = PatchHeads.from_prompt(llama, SOURCE, PICKED, (2, 4))
    ids = llama.encode(TARGET)["input_ids"]
    with apply(llama, edit.with_heads(others)):
        found = logits(llama.model, ids)
    with apply(llama, PatchHeads.from_prompt(llama, SOURCE, others, (2, 4))):
        assert torch.equal(logits(llama.model, ids), found)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_samples_are_outputs_at_tokens_of_the_texts(lm: LanguageModel) -> None:
    texts = [SOURCE, TARGET, "w5"]
    seen = [z_of(lm, text) for text in texts]
    found = head_samples(lm, texts, samples=5, seed=1)
    assert found.shape == (LAYERS, HEADS, 5, D_HEAD) and found.dtype == torch.float32
    rows = [(text, at) for text in range(2) for at in range(1, 7)]
    places = []
    for n in range(5):
        near = [
            max(float((found[i, h, n] - seen[text][i, h][at]).abs().max()) for i in range(LAYERS) for h in range(HEADS))
            for text, at in rows
        ]
        places.append(rows[near.index(min(near))])
        assert min(near) < 1e-5 and sorted(near)[1] > 1e-3
    assert len(set(places)) == 5 and sorted(text for text, _ in places) == [0, 0, 0, 1, 1]
    assert torch.equal(head_samples(lm, texts, samples=5, seed=1), found)
    assert not torch.equal(head_samples(lm, texts, samples=5, seed=2), found)
    assert head_samples(lm, texts).shape[2] == 12  # all there are
    with pytest.raises(HeadscopeError, match="have no other"):
        head_samples(lm, ["w5"])
    with pytest.raises(HeadscopeError, match="at least one text"):
        head_samples(lm, [])


def test_a_draw_is_even_and_goes_by_the_seed() -> None:
    """10,000 draws of 10: each number is drawn 1,000 times, standard deviation 30; four of them are allowed."""
    from headscope.interventions.outputs.ablate import drawn

    at = torch.arange(10_000)[None]
    counts = torch.bincount(drawn(at, 0, 10)[0], minlength=10)
    assert int((counts - 1000).abs().max()) <= 120
    same = (drawn(at, 0, 10) == drawn(at, 1, 10)).double().mean()
    assert abs(float(same) - 0.1) <= 4 * 0.003  # two independent draws agree in a tenth
    after = (drawn(at, 0, 10)[:, 1:] == drawn(at, 0, 10)[:, :-1]).double().mean()
    assert abs(float(after) - 0.1) <= 4 * 0.003
