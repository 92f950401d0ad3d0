"""Retrieval scores of a real model: against eager attention maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp.heads import retrieval
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import NeedlePrompts

SETTINGS = {"lengths": [260], "depths": [50], "needles": 1, "progress": False}


def _reference(lm: LanguageModel, task: NeedlePrompts, steps: int) -> tuple[np.ndarray, list[int]]:
    """Eager attention maps of one growing prompt without a cache, and plain loops."""
    prompt = task.build(lm, task.trials(lm)[0])
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    first, stop = prompt.span
    ids, scores, said = list(prompt.ids), np.zeros((lm.info.layers, lm.info.heads)), []
    try:
        for _ in range(steps):
            with torch.no_grad():
                output = lm.model(torch.tensor([ids]), output_attentions=True, use_cache=False)
            token = int(output.logits[0, -1].argmax())
            for layer, pattern in enumerate(output.attentions):
                for head in range(lm.info.heads):
                    key = int(pattern[0, head, -1].argmax())
                    if first <= key < stop and ids[key] == token:
                        scores[layer, head] += 1 / (stop - first)
            said.append(token)
            ids.append(token)
            if token == lm.tokenizer.eos_token_id:
                break
    finally:
        lm.model.set_attn_implementation(before)
    return scores, said


@pytest.mark.slow
def test_smollm2_scores_equal_those_of_eager_maps(smollm2):
    task = NeedlePrompts(lengths=[260], depths=[50], needles=1)
    scores = retrieval(smollm2, **SETTINGS)
    expected, said = _reference(smollm2, task, 50)
    assert said[-1] == smollm2.tokenizer.eos_token_id and "Dolores" in smollm2.tokenizer.decode(said)
    np.testing.assert_allclose(scores.mean, expected, atol=1e-9)
    assert (scores.mean > 0.1).sum() >= 5 and (scores.mean == 0).mean() > 0.4  # sparse, as the paper finds
