"""Shares sum to the logit, ranks are those of the head's own lens, and scaling equals hooks by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions.mechanisms.suppression import MEASURES, PLAIN, study_suppression
from headscope.probes.lenses.recall import Capitals, answer_shares, capitals, topic_ranks

PROMPTS = ("w3 w1 w4 w1", "w5 w9 w2", "w6 w5 w3 w5 w8", "w9 w7 w9")


def test_shares_and_the_embedding_sum_to_the_logit_less_the_mean(shared: Callable[[str], LanguageModel]) -> None:
    lm = shared("llama")
    found = answer_shares(lm, PROMPTS, [12, 13, 14, 15], last=2)
    model = lm.model
    for i, (prompt, answer) in enumerate(zip(PROMPTS, (12, 13, 14, 15), strict=True)):
        with torch.no_grad():
            output = model(**lm.encode(prompt), output_hidden_states=True)
        x, logits = output.hidden_states[0][0, -1], output.logits[0, -1]
        block, last = model.model, {}
        hook = block.norm.register_forward_pre_hook(lambda module, args, last=last: last.update(x=args[0][0, -1]))
        with torch.no_grad():
            model(**lm.encode(prompt))
        hook.remove()
        scale = (last["x"].pow(2).mean() + block.norm.variance_epsilon).rsqrt()
        u = model.lm_head.weight[answer] - model.lm_head.weight.mean(0)
        entered = float(((x * scale * block.norm.weight) @ u).detach())
        whole = found.heads[i].sum() + found.mlps[i].sum() + entered
        assert whole == pytest.approx(float(logits[answer] - logits.mean()), abs=1e-4)
    table = found.to_frame()
    assert len(table) == 2 * (4 + 1) and table["share"].is_monotonic_increasing
    with pytest.raises(HeadscopeError, match="has 2 layers"):
        answer_shares(lm, PROMPTS, [12] * 4, last=3)


def test_ranks_of_a_topic_in_a_heads_own_lens(shared: Callable[[str], LanguageModel]) -> None:
    lm = shared("llama")
    found = topic_ranks(lm, PROMPTS[:1], [7])
    held: list[torch.Tensor] = []
    block = lm.model.model.layers[1].self_attn.o_proj
    hook = block.register_forward_pre_hook(lambda module, args: held.append(args[0][0, -1]))
    with torch.no_grad():
        lm.model(**lm.encode(PROMPTS[0]))
        written = block.weight[:, 16:24] @ held[0][16:24]  # head 2
        logits = lm.model.lm_head(lm.model.model.norm(written))
    hook.remove()
    assert found.trials[0, 1, 2] == int((logits > logits[7]).sum())


def test_scaling_is_a_hook_at_the_last_token(shared: Callable[[str], LanguageModel]) -> None:
    lm = shared("llama")
    prompts = tuple(f"{prompt} w{i}" for prompt in PROMPTS for i in (2, 4))
    groups = (0, 0, 1, 1, 2, 2, 3, 3)
    with torch.no_grad():  # what the model least expects has parts that write against it
        answers = tuple(int(lm.model(**lm.encode(prompt)).logits[0, -1].argmin()) for prompt in prompts)
    facts = Capitals(prompts, (7,) * 8, answers, groups, (0, 1) * 4)
    found = study_suppression(lm, facts, last=2, factor=0.5, controls=0, passages=1, length=8, progress=False)
    name = "heads and MLPs" if len(found.heads) and found.mlps else "heads" if len(found.heads) else "MLPs"
    hooks = []
    for layer, block in enumerate(lm.model.model.layers):
        heads = [head for at, head in found.heads if at == layer]

        def fewer(module: object, args: tuple[torch.Tensor], heads: list[int] = heads) -> object:
            z = args[0].clone()
            for head in heads:
                z[0, -1, 8 * head : 8 * head + 8] *= 0.5
            return (z,)

        def less(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output[:, :-1], 0.5 * output[:, -1:]], 1)

        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(fewer))
        if layer in found.mlps:
            hooks.append(block.mlp.register_forward_hook(less))
    judged = [i for i in range(8) if groups[i] in (1, 3)]
    for row, i in enumerate(judged):
        with torch.no_grad():
            said = lm.model(**lm.encode(prompts[i])).logits[0, -1].log_softmax(-1)
        assert found.values[name][row, 1] == pytest.approx(float(said[answers[i]]), abs=1e-4)
    for hook in hooks:
        hook.remove()
    table = found.to_frame()
    assert set(table["measure"]) == set(MEASURES) and (table[table["condition"] == PLAIN]["change"] == 0).all()
    assert found.values[PLAIN].shape == (4, 3) and np.isfinite(table["prose"]).all()
    with pytest.raises(HeadscopeError, match="four groups"):
        study_suppression(lm, Capitals(prompts[:2], (7, 7), answers[:2], (0, 1), (0, 0)))
    with pytest.raises(HeadscopeError, match="single tokens"):
        capitals(lm)
