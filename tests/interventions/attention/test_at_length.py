"""Edits of scores at length: memory at 32,768 tokens, FlexAttention's form of them, and a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headscope.interp import load_model
from headscope.interp.attention.call import AttentionCall, Mask
from headscope.interp.prompts import prompt_boundary
from headscope.interventions import (
    BoostRecent,
    DecayBeyondWindow,
    EmphasizeSpan,
    EvictKeys,
    ForcePattern,
    HeadTemperature,
    Intervention,
    KnockOut,
    RaiseSpanLogits,
    ScaleSpanLogits,
    SpotLight,
    SwapKeys,
    apply,
)
from headscope.kernels import flex, reference
from headscope.kernels.request import Request

MEASURE = """
import json, torch
from pathlib import Path
from headscope.interp.attention.call import AttentionCall, Mask
from headscope.interventions import EmphasizeSpan, KnockOut, ScaleSinks

def mebibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

def added(edit, queries, keys):
    q, k = torch.randn(1, 1, queries, 8), torch.randn(1, 1, keys, 8)
    call = AttentionCall(q, k, k, Mask.causal(keys - queries), 0.35, layer=0, module="m")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = mebibytes("VmRSS")
    with torch.no_grad():
        edit.edit(call).output()
    return mebibytes("VmHWM") - before

bias, edit = EmphasizeSpan(span=(100, 200), inside=3.0), KnockOut(span=(100, 200), positions=(32000, 32500))
moved = ScaleSinks(sinks=4) + ScaleSinks(sinks=(2, 300), factor=0.5, renormalise=False)
for one in (bias, edit, moved):
    added(one, 64, 256)  # everything imported
print(json.dumps([added(one, 2048, 32768) for one in (bias, edit, moved)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_no_tensor_of_queries_by_keys_at_32k_tokens() -> None:
    """The last 2,048 queries: one byte a pair would be 64 MiB, a score a pair 256 MiB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 32


EDITS: list[Intervention] = [
    KnockOut([(0, 1)], span=(3, 40), positions=(100, 150)),
    EmphasizeSpan([(0, 1)], span=(3, 40), inside=4.0, positions=(100, 150)),
    SpotLight(span=[[(3, 40)], [(0, 9)]], target=0.7),
    RaiseSpanLogits(span=(3, 40)),
    HeadTemperature([(0, 0), (0, 3)], temperature=(0.5, 2.0), positions=(20, 150)) + HeadTemperature(temperature=2.0),
    DecayBeyondWindow(window=9, factor=0.2, bands=[(60, 70, 0.1)]),
    DecayBeyondWindow(window=9, factor=0.2, positive_only=False),
    ScaleSpanLogits(span=(3, 40), factor=0.5, at="all"),
    BoostRecent(beta=0.5, window=7, previous="all", renormalise=True),
    SwapKeys(first=(4, 5), second=(9, 10), strength=0.3),
    ForcePattern(onto=(3, 9)),
    EvictKeys(policy="streaming_llm", budget=20, read=90),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_they_are_declared_and_flex_attention_takes_them(edit: Intervention) -> None:
    """The function that FlexAttention would compile on a GPU, in its dense form on a CPU, beside the definition.

    Tolerance: float32 scores of size 3 and softmax over 160 of them, 64 roundings.
    """
    q, k, v = (torch.randn(2, n, 160, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    mask = Mask(start=torch.tensor([0, 30]))
    edited = edit.edit(AttentionCall(q, k, v, mask, 0.25, layer=0, module="m", softcap=5.0))
    assert edited.score_edit is not None and edited.score_edit.in_kernels
    with torch.no_grad():
        expected = reference.attend(edited.inputs(), v, request=Request()).output
        found, _ = flex.attention(edited.inputs(), v)
    assert expected is not None
    assert torch.allclose(found, expected.float(), atol=64 * torch.finfo(torch.float32).eps * float(v.abs().max()))


@pytest.mark.slow
def test_smollm2_copies_through_the_edges_to_the_first_half() -> None:
    """Random tokens twice: what it copies it sees in the first half, and a mask of the model's own says the same."""
    lm = load_model("smollm2-135m")
    half = torch.randint(1000, 20000, (1, 40), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([half, half], 1)
    edit = KnockOut(span=(0, 40), positions=(40, 80))
    mask = torch.full((80, 80), torch.finfo(torch.float32).min).triu(1)
    mask[40:, :40] = torch.finfo(torch.float32).min
    with torch.no_grad(), prompt_boundary(80):
        plain, expected = lm.model(ids).logits, lm.model(ids, attention_mask=mask[None, None]).logits
        with apply(lm, edit):
            found = lm.model(ids).logits
        with apply(lm, HeadTemperature(temperature=1.0) + EmphasizeSpan(span=(0, 40))):
            assert torch.equal(lm.model(ids).logits, plain)
    # 30 layers of float32 in another order of summation: logits of the size of 20 agree to 1e-4 of it
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    losses = [float(torch.nn.functional.cross_entropy(x[0, 45:79], ids[0, 46:])) for x in (plain, found)]
    assert losses[0] < 2 < 8 < losses[1]
