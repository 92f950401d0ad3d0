"""LoFiT against the same training with plain PyTorch hooks on the output projections of a tiny grouped-heads model.

In float64, so that AdamW, whose steps divide by the root of squared gradients, does not blow rounding up: both sides
then differ by a few thousand roundings of 1e-16; 1e-9 of the largest number leaves room, and a wrong rate, order, loss
or penalty moves the tables by 1e-4 of it and more (asserted).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites import is_attached
from headscope.interventions import AffineHeads, apply, load_intervention
from headscope.interventions.fitted import FITS
from headscope.interventions.fitted.lofit import LoFiT
from headscope.interventions.fitted.losses import dpo_loss, l1, sft_loss

LAYERS, HEADS, D_HEAD = 2, 4, 8
EVERY = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
ROWS = [
    {
        "prompt": " ".join(f"w{(7 * i + j) % 60}" for j in range(2 + i % 4)),
        "response": " ".join([f"w{3 * i}", f"w{i % 5}", "w7"][: 1 + i % 3]),
    }
    for i in range(11)
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": f"w{i} w30"} for i, r in enumerate(ROWS)]
SMALL = {"top": 3, "batch": 4, "epochs": 2}


@pytest.fixture
def double(llama: LanguageModel) -> LanguageModel:
    llama.model.double()
    return llama


@contextmanager
def hooked(model: Any, scales: Tensor | None, offsets: Tensor | None) -> Iterator[None]:
    """z' = (1 + A) z + v by hooks, tables (layer, head, d_head)."""

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (HEADS, D_HEAD))
            z = z if scales is None else (1 + scales[layer]) * z
            z = z if offsets is None else z + offsets[layer]
            return (z.flatten(-2), *args[1:])

        return hook

    layers = enumerate(model.model.layers)
    handles = [layer.self_attn.o_proj.register_forward_pre_hook(hook_of(i)) for i, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def labelled(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids, mask and labels (-100 outside responses)."""
    width = max(len(x) + len(y) for x, y in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for b, (x, y) in enumerate(rows):
        ids[b, : len(x + y)], mask[b, : len(x + y)] = torch.tensor(x + y), 1
        labels[b, len(x) : len(x + y)] = torch.tensor(y)
    return ids, mask, labels


def nll(model: Any, rows: list[tuple[list[int], list[int]]], reduction: str) -> Tensor:
    """The trainer's cross-entropy over labels ("mean"), or each row's sum."""
    ids, mask, labels = labelled(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    if reduction == "mean":
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    each = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return each.sum(-1)


def tokens(lm: LanguageModel, row: dict[str, str], key: str) -> tuple[list[int], list[int]]:
    return tuple(lm.tokenizer(row[k])["input_ids"] for k in ("prompt", key))  # type: ignore[return-value]


class Tiny:
    """LoFiT written out: the loop of a trainer, over tables of all heads of which some are trained."""

    def __init__(self, lm: LanguageModel, rows: list[dict[str, str]], loss: str, reference: str = "initial") -> None:
        self.model, self.loss, self.reference = lm.model, loss, reference
        keys = ("response",) if loss == "sft" else ("chosen", "rejected")
        self.rows = [[tokens(lm, row, key) for row in rows] for key in keys]

    def step(self, heads: list[tuple[int, int]], what: str, rate: float, penalty: float) -> tuple[Tensor, list[float]]:
        start = torch.randn(len(heads), D_HEAD, generator=torch.Generator().manual_seed(42)) * 1e-3
        leaf = start.double().requires_grad_(True)
        optimizer = torch.optim.AdamW([leaf], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        order = torch.Generator().manual_seed(42)
        orders = [torch.randperm(len(ROWS), generator=order).tolist() for _ in range(2)]
        batches = [o[i : i + 4] for o in orders for i in range(0, len(o), 4)]
        decay = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
        at = torch.zeros(LAYERS, HEADS, dtype=torch.long)
        for i, (layer, head) in enumerate(heads):
            at[layer, head] = i
        chosen = torch.zeros(LAYERS, HEADS, 1, dtype=torch.float64)
        for layer, head in heads:
            chosen[layer, head] = 1
        losses = []
        kept = None
        if self.loss == "dpo":
            with (
                torch.no_grad(),
                hooked(self.model, None, leaf[at] * chosen * (self.reference == "initial"))
                if (what == "v")
                else hooked(self.model, leaf[at] * chosen * (self.reference == "initial"), None),
            ):
                kept = [-nll(self.model, rows, "sum") for rows in self.rows]
        for batch in batches:
            table = leaf[at] * chosen
            with hooked(self.model, table if what == "A" else None, table if what == "v" else None):
                if kept is None:
                    loss = nll(self.model, [self.rows[0][i] for i in batch], "mean")
                else:
                    c, r = (-nll(self.model, [rows[i] for i in batch], "sum") for rows in self.rows)
                    ratio = (c - r) - (kept[0] - kept[1])[batch]
                    loss = -torch.log(torch.sigmoid(0.5 * ratio)).mean()
            optimizer.zero_grad()
            (loss + penalty * leaf.abs().sum()).backward()
            torch.nn.utils.clip_grad_norm_([leaf], 1.0)
            optimizer.step()
            decay.step()
            losses.append(loss.item())
        return leaf.detach(), losses


CASES = [("sft", "mquake", "initial"), ("dpo", "truthfulqa", "initial"), ("dpo", "truthfulqa", "unedited")]


@pytest.mark.parametrize(("loss", "preset", "reference"), CASES)
def test_both_steps_are_the_training_written_out(double: LanguageModel, loss: str, preset: str, reference: str) -> None:
    rows, tiny = (ROWS if loss == "sft" else PAIRS), Tiny(double, ROWS if loss == "sft" else PAIRS, loss, reference)
    fit = LoFiT(preset=preset, reference=reference, **SMALL)
    found = fit.fit(double, rows, progress=False)
    tuned = fit.tuned
    for p in double.model.parameters():
        p.requires_grad_(False)
    scales, first = tiny.step(EVERY, "A", tuned["scale_rate"], tuned["penalty"])
    norms = scales.norm(dim=-1).view(LAYERS, HEADS)
    order = sorted(EVERY, key=lambda head: -norms[head])
    offsets, second = tiny.step(order[:3], "v", tuned["offset_rate"], 0.0)

    def close(a: Any, b: Any) -> None:
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()

    assert found.norms is not None and list(found.heads) == order[:3] == list(found.norms.top(3))
    close(found.norms.mean, norms.numpy())
    close([x["loss"] for x in found.curves["scales"]], first)
    close([x["loss"] for x in found.curves["offsets"]], second)
    close(found.edit.v, offsets)
    for wrong in (
        {"penalty": 2 * tuned["penalty"]},
        {"scale_rate": 2 * tuned["scale_rate"]},
        {"seed": 43},
        {"clip": 0.1},
    ):
        other = LoFiT(preset=preset, reference=reference, **{**SMALL, **wrong}).fit(double, rows, progress=False)
        assert abs(other.norms.mean - norms.numpy()).max() > 1e-6 * norms.max()  # type: ignore[union-attr]


def test_its_edit_is_the_hand_made_hook_in_a_pass_and_in_cached_generation(llama: LanguageModel) -> None:
    """Float32: 1e-5 of the largest logit, as derived in test_ablate.py."""
    found = LoFiT(offset_rate=0.5, **SMALL).fit(llama, ROWS, progress=False)
    table = torch.zeros(LAYERS, HEADS, D_HEAD)
    for (layer, head), row in zip(found.heads, found.edit.v, strict=True):
        table[layer, head] = row
    batch = llama.encode([row["prompt"] for row in ROWS[:3]], padding_side="left")
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    plain = llama.model.generate(**batch, **options)
    with hooked(llama.model, None, table):
        expected = llama.model.generate(**batch, **options)
    with apply(llama, found.edit):
        got = llama.model.generate(**batch, **options)
    e, g, p = (torch.stack(x.logits) for x in (expected, got, plain))
    assert (e[0] - p[0]).abs().max() > 1e-2 * e.abs().max()
    assert (g - e).abs().max() <= 1e-5 * e.abs().max() and torch.equal(got.sequences, expected.sequences)


def test_the_model_is_bitwise_as_it_was_also_after_an_exception(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = llama.model
    model.train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    def state() -> Any:
        flags = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
        return flags, [(n, m.training) for n, m in model.named_modules()]

    before, weights = state(), copy.deepcopy(model.state_dict())
    LoFiT(**SMALL).fit(llama, ROWS, progress=False)
    import headscope.interventions.fitted.training as training

    def broken(said: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "sft_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        LoFiT(**SMALL).fit(llama, ROWS, progress=False)
    assert state() == before and torch.is_grad_enabled() and not is_attached(model)
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


def test_seeds_heads_and_shares(llama: LanguageModel) -> None:
    one, same = (LoFiT(**SMALL).fit(llama, ROWS, progress=False) for _ in range(2))
    assert one.edit == same.edit and one.curves == same.curves
    assert LoFiT(**SMALL, seed=1).fit(llama, ROWS, progress=False).edit != one.edit
    assert one.trained == {"scales": LAYERS * HEADS * D_HEAD, "offsets": 3 * D_HEAD}
    given = LoFiT(batch=4, epochs=2, heads="L1H2,L0H0").fit(llama, ROWS, progress=False)
    assert given.norms is None and list(given.heads) == [(1, 2), (0, 0)] and given.trained == {"offsets": 2 * D_HEAD}
    assert len(LoFiT(share=0.49, epochs=1).fit(llama, ROWS, progress=False).heads) == 3  # int(3.92)
    with pytest.raises(HeadscopeError, match="top=32 is 32 of 8 heads"):
        LoFiT().fit(llama, ROWS)


def test_what_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    for given, words in (
        ({"preset": "x"}, "no preset 'x'"),
        ({"heads": "L0H0", "share": 0.5}, "nothing to choose"),
        ({"loss": "x"}, "loss is 'sft' or 'dpo'"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"penalty": -1.0}, "penalty is 0 or more"),
        ({"epochs": "many"}, "epochs must be a whole number"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            LoFiT(**given)  # type: ignore[arg-type]
    bad = tmp_path / "bad.jsonl"
    for text, words in (
        ("", "holds no rows"),
        ("[1]", "holds no rows"),
        ("{", "cannot read"),
        ('{"prompt": "w1"}', "row 1: give strings"),
        ('{"prompt": "w1 w2", "response": "' + "w3 " * 500 + '"}', "502 tokens"),
    ):
        bad.write_text(text)
        with pytest.raises(HeadscopeError, match=words):
            LoFiT(top=3).fit(llama, bad)
    with pytest.raises(HeadscopeError, match="chosen"):
        LoFiT(top=3, loss="dpo").fit(llama, ROWS)
    with pytest.raises(HeadscopeError, match="lower the rate"):
        LoFiT(**SMALL, penalty=1e39).fit(llama, ROWS, progress=False)


def test_the_losses_are_their_formulas() -> None:
    said = [torch.tensor([-1.0, -2.0]), torch.tensor([-6.0])]
    assert sft_loss(said).item() == pytest.approx(3.0)
    one = dpo_loss(*(torch.tensor([x], dtype=torch.float64) for x in (-1.0, -2.0, -1.5, -1.0)), beta=0.5)
    assert one.item() == pytest.approx(-torch.tensor(0.75, dtype=torch.float64).sigmoid().log().item())
    assert l1([torch.tensor([-1.0, 2.0]), torch.tensor([[3.0]])]).item() == 6


def test_it_is_saved_as_an_edit_with_its_record_and_never_overwrites(llama: LanguageModel, tmp_path: Path) -> None:
    found = FITS["lofit"](**SMALL).fit(llama, ROWS, progress=False)
    path = found.save(tmp_path / "edits" / "one", llama)
    assert load_intervention(path, llama) == found.edit and isinstance(found.edit, AffineHeads)
    record = json.loads(path.with_name("one.json").read_text())
    assert record["summary"]["trained"] == 3 * D_HEAD and len(record["curves"]["offsets"]) == 6
    assert record["provenance"]["steps"]["scales"]["steps"] == 6 and record["provenance"]["seed"] == 42
    with pytest.raises(HeadscopeError, match="is there already"):
        found.save(path, llama)
