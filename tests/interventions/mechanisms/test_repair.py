"""Forcing equals hooks that replace z by hand, in padded prompts of grouped heads; roles come from planted circuits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions.mechanisms.repair import circuit_roles, force_heads
from headscope.probes.patching.pairs import Pairs
from headscope.probes.patching.path import path_patching


def pairs(lengths: list[int]) -> Pairs:
    draw = torch.Generator().manual_seed(1)
    size = (len(lengths), max(lengths))
    clean, corrupt = torch.randint(2, 60, (2, *size), generator=draw)
    answers, others = torch.randint(2, 60, (2, size[0]), generator=draw)
    one, two = ([(at, at + 1) for at in places] for places in ((1, 2, 0), (3, 4, 2)))
    spans = {"one": one, "two": two}
    return Pairs(clean, corrupt, torch.tensor(lengths), answers, others, torch.zeros(size[0], dtype=torch.long), spans)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_forcing_is_the_mean_of_the_keys_values(shared: Callable[[str], LanguageModel], strength: float) -> None:
    lm, held = shared("llama"), pairs([8, 6, 7])
    heads = ((0, 1), (1, 2))
    found = force_heads(lm, held, "L0H1,L1H2", ("one", "two"), strength=strength, randoms=2, progress=False)
    hooks, values = [], dict[int, torch.Tensor]()
    for layer, block in enumerate(lm.model.model.layers):
        mine = [head for at, head in heads if at == layer]

        def keep(module: object, args: object, output: torch.Tensor, layer: int = layer) -> None:
            values[layer] = output[0]

        def put(module: object, args: tuple[torch.Tensor], layer: int = layer, mine: list[int] = mine) -> object:
            z = args[0].clone()
            for head in mine:
                v = values[layer][:, 8 * (head // 2) : 8 * (head // 2) + 8]  # four heads share two keys
                own = z[0, -1, 8 * head : 8 * head + 8]
                z[0, -1, 8 * head : 8 * head + 8] = (1 - strength) * own + strength * v[keys].mean(0)
            return (z,)

        hooks += [block.self_attn.v_proj.register_forward_hook(keep)]
        hooks += [block.self_attn.o_proj.register_forward_pre_hook(put)]
    for i, n in enumerate(held.lengths.tolist()):
        keys = [held.spans[name][i][0] for name in ("one", "two")]
        with torch.no_grad():
            logits = lm.model(input_ids=held.clean[i : i + 1, :n]).logits[0, -1]
        expected = float(logits[held.answers[i]] - logits[held.others[i]])
        assert found.edited[i, 0] == pytest.approx(expected, abs=1e-4)
        assert found.edited[i, 1] == float(logits.argmax() == held.answers[i])
    for hook in hooks:
        hook.remove()
    assert not np.allclose(found.edited[:, 0], found.plain[:, 0], atol=1e-3)
    table = found.to_frame().set_index("measure")
    row = table.loc["logit difference"]
    assert row["change"] == pytest.approx((found.edited - found.plain)[:, 0].mean())
    assert row["random_low"] <= row["random"] <= row["random_high"] and row["p"] in (1 / 3, 2 / 3, 1.0)


def test_roles_are_the_strongest_of_path_patching(shared: Callable[[str], LanguageModel]) -> None:
    lm, held = shared("llama"), pairs([7, 7, 7])
    corrupt = held.clean.clone()
    corrupt[:, 1:3] = held.corrupt[:, 1:3]  # heads alone bring this to the last token
    held = replace(held, corrupt=corrupt, answers=held.others, others=held.answers)
    roles = circuit_roles(lm, held, movers=3, inhibition=2, progress=False)
    direct = path_patching(lm, held, progress=False)
    assert roles.movers.heads == direct.top(3).heads and roles.movers.weights == pytest.approx(direct.top(3).weights)
    lowest = np.unravel_index(np.nanargmin(direct.mean), direct.mean.shape)
    assert roles.negative.heads == (tuple(map(int, lowest)),) and roles.negative.weights[0] > 0
    scores = path_patching(lm, held, roles.movers, "q", progress=False)
    through = scores.top(int((scores.n > 0).sum())) - roles.movers - roles.negative
    best = [head for head, weight in zip(through, through.weights, strict=True) if weight > 0][:2]
    assert list(roles.inhibition) == best and list(roles.four) == [*best, *roles.negative]


def test_bad_settings_are_refused(shared: Callable[[str], LanguageModel]) -> None:
    lm, held = shared("llama"), pairs([7, 7, 7])
    with pytest.raises(HeadscopeError, match="have one, two"):
        force_heads(lm, held, "L0H1", ("wrong",))
    beyond = replace(held, spans={"far": [(1, 2), (7, 9), (1, 2)]})
    with pytest.raises(HeadscopeError, match="beyond prompt 1 of 7 tokens"):
        force_heads(lm, beyond, "L0H1", ("far",), progress=False)
    with pytest.raises(HeadscopeError, match="no spans 'wrong_0'"):
        force_heads(lm, held, "L0H1", "wrong_0")
    with pytest.raises(HeadscopeError, match="no spans were named in onto"):
        force_heads(lm, held, "L0H1", [])
    with pytest.raises(HeadscopeError, match="at least one set"):
        force_heads(lm, held, "L0H1", ("one",), randoms=0)
