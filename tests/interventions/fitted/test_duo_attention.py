"""DuoAttention's gates against the authors' own form of it: a batch of two, in plain PyTorch, on a tiny grouped model.

In float64: both sides then differ by a few thousand roundings of 1e-16, so that 1e-9 leaves room; another rate, order,
mask or penalty moves the gates by 1e-3 and more.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headlists import to_duo_attention
from headscope.interp.sites import is_attached
from headscope.interventions import EvictKeys, apply, load_intervention
from headscope.interventions.fitted.duo_attention import DuoAttention
from headscope.interventions.fitted.passkeys import ORDINALS, QUESTION, passkeys

LAYERS, KV, GROUP = 2, 2, 2
SINK, RECENT, STEPS = 1, 3, 11
ROWS = [
    {
        "prompt": " ".join(f"w{(7 * i + 3 * j) % 60}" for j in range(9 + i)),
        "response": " ".join(f"w{(11 * i + j) % 60}" for j in range(2 + i % 3)),
    }
    for i in range(4)
]
SMALL: dict[str, Any] = {"sink": SINK, "recent": RECENT, "updates": STEPS, "rate": 0.1}
SMALL |= {"keep_sink": 1, "keep_recent": 2}


@pytest.fixture
def double(llama: LanguageModel) -> LanguageModel:
    llama.model.double()
    return llama


def two_streams(gates: Tensor) -> Any:
    """Attention over a batch of the whole stream and the streaming one, in place of the model's eager attention."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        n = q.shape[2]
        k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        seen = (j <= i) & ((j >= i - RECENT + 1) | (j < SINK))
        shown = torch.stack([j <= i, seen])[:, None]
        z = (q @ k.transpose(2, 3) * scaling).masked_fill(~shown, -torch.inf).softmax(-1) @ v
        whole = z[0].detach()
        gate = gates[module.layer_idx].clamp(0, 1).repeat_interleave(GROUP)[:, None, None]
        return torch.stack([whole, gate * whole + (1 - gate) * z[1]]).transpose(1, 2), None

    return attention


def by_hand(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[float]]:
    """Gates (layer, kv_head) and losses of their training loop."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    gates = torch.ones(LAYERS, KV, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", two_streams(gates))
    optimizer = torch.optim.AdamW([gates], lr=SMALL["rate"], weight_decay=0)
    fifth = STEPS // 5
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, max((s + 1) / fifth, 0.1), max((STEPS - s) / fifth, 0.1))
    )
    draw = torch.Generator().manual_seed(42)
    order = [i for _ in range(3) for i in torch.randperm(len(ROWS), generator=draw).tolist()][:STEPS]
    losses = []
    for i in order:
        with torch.no_grad():
            gates.clamp_(0, 1)
        prompt, response = (lm.tokenizer(ROWS[i][name])["input_ids"] for name in ("prompt", "response"))
        h = model.model(torch.tensor([prompt + response] * 2)).last_hidden_state[:, len(prompt) :]
        distilled = (h[0] - h[1]).pow(2).mean(-1).mean()
        (distilled + 0.05 * gates.abs().mean()).backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(distilled.item())
    monkeypatch.undo()
    return gates.detach().clamp(0, 1), losses


def test_the_gates_are_those_of_their_loop(
    double: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {name: x.clone() for name, x in double.model.state_dict().items()}
    wanted, losses = by_hand(double, monkeypatch)
    found = DuoAttention(**SMALL).fit(double, ROWS, progress=False)
    gates = found.gates.mean.reshape(LAYERS, KV, GROUP)
    assert (gates == gates[..., :1]).all() and np.abs(gates[..., 0] - wanted.numpy()).max() < 1e-9
    assert max(abs(a["loss"] - b) for a, b in zip(found.curve, losses, strict=True)) < 1e-9
    assert losses[0] == 0 and max(losses) > 1e-3 and len(set(wanted.flatten().tolist())) == LAYERS * KV
    assert not is_attached(double.model) and not double.model.model._forward_hooks
    assert all(torch.equal(x, before[name]) for name, x in double.model.state_dict().items())
    full = wanted >= np.quantile(wanted.numpy(), 0.5)
    streaming = [(layer, 2 * g + i) for layer, g in (~full).nonzero().tolist() for i in range(GROUP)]
    assert isinstance(found.edit, EvictKeys) and sorted(found.edit.heads or ()) == streaming
    path = found.save(tmp_path / "duo", double)
    record = json.loads((tmp_path / "duo.json").read_text())
    assert record["gates"] == found.gates.mean.tolist() and len(record["summary"]["heads"]) == len(streaming)
    assert load_intervention(path, double).heads == found.edit.heads
    to_duo_attention(found.gates, tmp_path / "theirs", sink_size=1, recent_size=2, group=GROUP)


def test_streaming_heads_see_sinks_and_the_last_and_the_others_all(
    double: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit, against hard gates in the reference (1 whole, 0 streaming), whose first stream is the model's own."""
    ids = torch.arange(3, 15)[None]
    hard = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()  # a layer below, the streams are still alike
    model = copy.deepcopy(double.model)
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", two_streams(hard))
    outputs: list[Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda m, x, out: outputs.append(out[0]))
    with torch.no_grad():
        model.model(ids.repeat(2, 1))
    hook.remove(), monkeypatch.undo()
    edit = EvictKeys("L0H0,L0H1", policy="streaming_llm", budget=SINK + RECENT, options={"sink": SINK})
    hook = double.model.model.layers[0].self_attn.register_forward_hook(lambda m, x, out: outputs.append(out[0]))
    with apply(double, edit), torch.no_grad():
        double.model(ids)
    hook.remove()
    torch.testing.assert_close(outputs[-1][0], outputs[0][1], atol=1e-9, rtol=0)
    assert float((outputs[0][0] - outputs[0][1]).abs().max()) > 1e-3


def test_a_head_that_writes_nothing_closes_as_fast_as_the_penalty_pulls(double: LanguageModel) -> None:
    """No loss holds its gate: AdamW's steps are the rate's whole length, so that it is 1 - their sum, cut at 0."""
    with torch.no_grad():
        double.model.model.layers[1].self_attn.v_proj.weight[8:] = 0.0
    found = DuoAttention(**{**SMALL, "rate": 0.05}).fit(double, ROWS, progress=False)
    schedule = [min(1, max((s + 1) / 2, 0.1), max((STEPS - s) / 2, 0.1)) for s in range(STEPS)]
    gate = found.gates.mean[1, 2]
    assert abs(gate - (1 - 0.05 * sum(schedule))) < 1e-6 and gate == np.nanmin(found.gates.mean)  # AdamW's epsilon


def test_passkeys_stand_in_order_and_are_asked_for(llama: LanguageModel) -> None:
    words = [f"w{i % 60}" for i in range(80)]
    rows = passkeys(llama, [50, 70], needles=3, words=2, text=" ".join(words), seed=1)
    assert len(rows) == 2
    for row in rows:
        asked = row["response"].split("\n\n")[:-1]
        for ordinal, one in zip(ORDINALS[:3], asked, strict=True):
            question, key = QUESTION.format(ordinal), one.rsplit(": ", 1)[1]
            assert one == question + key and len(key.split()) == 2
            assert f"it's the {ordinal} passkey to the vault: {key}\n\n" in row["prompt"]
        assert [row["prompt"].index(f"the {o} passkey") for o in ORDINALS[:3]] == sorted(
            row["prompt"].index(f"the {o} passkey") for o in ORDINALS[:3]
        )
    prose = rows[1]["prompt"].replace("<book> ", "<book>\n\n").replace(" </book>", "\n\n</book>").split("\n\n")[1::2]
    assert " ".join(prose).split()[:70] == words[:70]
    with pytest.raises(HeadscopeError, match="lengths of 1 to 80"):
        passkeys(llama, [90], text=" ".join(words))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sparsity": 1.0}, "sparsity lies between 0 and 1"),
        ({"updates": 0}, "are 1 or more"),
        ({"sink": 30}, "a text has 11 tokens, and streaming heads see 33"),
        ({"sparsity": 0.01}, ""),
    ],
)
def test_what_cannot_be_trained_gets_one_line(llama: LanguageModel, given: dict[str, Any], said: str) -> None:
    if not said:  # 1 % of four key heads is the lowest one
        found = DuoAttention(**{**SMALL, **given, "updates": 1}).fit(llama, ROWS, progress=False)
        assert len(found.edit.heads or ()) == 2
        return
    with pytest.raises(HeadscopeError, match=said) as error:
        DuoAttention(**{**SMALL, **given}).fit(llama, ROWS, progress=False)
    assert "\n" not in str(error.value)
