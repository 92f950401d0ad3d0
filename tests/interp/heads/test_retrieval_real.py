"""Retrieval scores of a real model: against eager attention maps, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

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


RUN = """
import sys
from headscope.interp import load_model
from headscope.interp.heads import retrieval
retrieval(load_model("smollm2-135m"), lengths=[240], depths=2, needles=2, out=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_where_it_stopped(smollm2, tmp_path):
    journal = tmp_path / "retrieval.trials.jsonl"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "retrieval.json").exists()
    kept = journal.read_bytes()
    finished = kept.count(b"\n") - 1
    assert 1 <= finished < 4
    with open(journal, "ab") as file:
        file.write(b'{"trial": 3, "resu')  # a line that the kill cut short
    settings = {"lengths": [240], "depths": 2, "needles": 2, "progress": False}
    resumed = retrieval(smollm2, out=tmp_path, **settings)
    lines = journal.read_bytes()
    assert lines.startswith(kept) and lines.count(b"\n") == 5
    assert [json.loads(line)["trial"] for line in lines.splitlines()[1:]] == list(range(4))
    whole = retrieval(smollm2, **settings)
    np.testing.assert_allclose(resumed.trials, whole.trials)
    assert [d["response"] for d in resumed.details] == [d["response"] for d in whole.details]
