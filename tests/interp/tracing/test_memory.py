"""Memory of a long prompt: no logits that nobody asked for, and Gemma 3 at 8,192 tokens in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headscope.interp.models import language_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.survey.tiny import tiny_model

PROMPTS = ["w1 w2 w3 w4 w5 w6 w7", "w3 w1 w2 w9"]


@pytest.fixture
def lm() -> LanguageModel:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(40)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    return LanguageModel.wrap(tiny_model("llama"), tokenizer, name="tiny")


def test_logits_beyond_the_limit_are_of_the_last_positions_and_said_so(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = lm(PROMPTS).logits
    assert whole.shape[1] == 7
    monkeypatch.setattr(language_model, "LOGITS", whole.nbytes - 1)
    with pytest.warns(UserWarning, match="last 4 positions"):
        kept = lm(PROMPTS).logits
    torch.testing.assert_close(kept, whole[:, 3:])  # the shortest prompt's last token is at position 3
    with pytest.warns(UserWarning, match="last 1 positions"):
        assert lm(PROMPTS[0] + " w3" * 8).logits.shape[1] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(lm(PROMPTS, logits_to_keep=0).logits, whole)
        assert lm(PROMPTS, logits_to_keep=2).logits.shape[1] == 2


def test_logits_of_a_shorter_prompt_are_still_checked(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(LanguageModel, "check_finite", lambda self, logits: seen.append(logits))
    whole = lm(PROMPTS).logits
    monkeypatch.setattr(language_model, "LOGITS", 0)
    with pytest.warns(UserWarning):
        lm(PROMPTS)
    torch.testing.assert_close(seen[0], torch.stack([whole[0, 6], whole[1, 3]]))
    torch.testing.assert_close(seen[1], seen[0])


MEASURE = """
import json, sys, warnings
from pathlib import Path
from headscope.interp import load_model, trace
from headscope.interp.prompts import load_haystack
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass

def mebibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

lm = load_model("gemma3-270m")
tokens = lm.tokenizer(load_haystack(None), add_special_tokens=False)["input_ids"][:8191]
text = lm.tokenizer.decode(tokens)
statistics = [LogSumExp(), Entropy(), SinkMass(first=4), Distance(), KeyMass()]
with trace(lm, statistics):  # verified, and everything imported
    lm("a b c")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: loading has one of its own
before = mebibytes("VmRSS")
with trace(lm, statistics) as tracer, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm(text)
record = tracer.record
print(json.dumps({
    "queries": record.sizes["query"],
    "added": mebibytes("VmHWM") - before,
    "mass": [float(record["key_mass"].sum("key").min()), float(record["key_mass"].sum("key").max())],
    "windows": float(record["distance"].isel(layer=0).max()),
    "all": float(record["distance"].isel(layer=5).max()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_gemma3_at_8k_tokens_takes_less_than_3_gib_above_the_model() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["queries"] > 8000
    assert found["added"] < 3 * 1024
    # every query's masses sum to 1; a sum of 8,192 float32 masses is off by at most 8,192 roundings of 6e-8
    assert all(abs(mass / found["queries"] - 1) < 8192 * 6e-8 for mass in found["mass"])
    assert found["windows"] < 512 < found["all"]  # layer 0 sees 512 tokens, layer 5 all of them
