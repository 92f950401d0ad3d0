"""Losses over prompts: equal to the untouched model's own attention, summed; kept, resumed and read again."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.interp.cache import POLICIES, lose
from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.results.cache import MEASURES, CacheLosses
from headscope.interp.runs.estimate import dry_run
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import EvictKeys

PROMPTS = [list(range(5, 35)), list(range(40, 2, -2))]
SIX = [[*PROMPTS[0], last] for last in range(6)]
ANSWER = 5


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.wrap(tiny_model("llama"), None, name="tiny", revision="seed")


def eager(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    """The model's own weights in float64: (layer, head, query, key)."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions, 1)[0]


def test_recall_is_the_dense_sum(lm: LanguageModel) -> None:
    """Weights of float32 differ by 1e-6 each; a recall sums at most 35 of them."""
    found = lose(lm, ["h2o", "oracle", "top_k", "streaming_llm"], [8, 0.5], PROMPTS, answer=ANSWER, progress=False)
    assert found.policies == ("h2o", "oracle", "top_k", "streaming_llm") and found.budgets == ("8", "0.5")
    heads = lm.info.heads
    group = heads // int(lm.model.config.num_key_value_heads)
    for i, ids in enumerate(PROMPTS):
        p, n = eager(lm, ids), len(ids) - ANSWER
        rows, later = p[:, :, n:], p[:, :, n:, n:].sum(-1)
        for j, kept in enumerate((8, n // 2)):
            recent = kept // 2
            sums = {"h2o": p[:, :, :n, :n].sum(2), "oracle": rows[..., :n].sum(2)}
            for name, x in sums.items():
                score = x.unflatten(1, (-1, group)).mean(2)
                if name == "h2o":
                    score[..., n - recent :] = torch.inf
                best = score.topk(kept).indices.repeat_interleave(group, 1)
                mass = rows[..., :n].gather(-1, best[:, :, None].expand(-1, -1, ANSWER, -1))
                at = found.policies.index(name)
                recall = mass.sum(-1) + later
                assert np.abs(found.values["recall"][at, j, i] - recall.mean(-1).numpy()).max() < 1e-5
                assert np.abs(found.values["divergence"][at, j, i] + recall.log().mean(-1).numpy()).max() < 1e-4
                held = mass.sum(2).sort(-1, descending=True).values
                needed = (held.cumsum(-1) < 0.95 * held.sum(-1, keepdim=True) - 1e-9).sum(-1) + 1
                assert np.array_equal(found.values["needed"][at, j, i], needed.numpy())
                assert (found.values["kept"][at, j, i] == kept).all()
            at = torch.arange(n, len(ids))[:, None]
            seen = (torch.arange(n) < 4) | (at - torch.arange(n) < kept - 4)  # of the prompt: its own row's come after
            assert found.values["kept"][3, j, i] == pytest.approx(float(seen.sum(-1).double().mean()))
            best = rows[..., :n].topk(kept).values.sum(-1) + later
            assert np.abs(found.values["recall"][2, j, i] - best.mean(-1).numpy()).max() < 1e-5
    recall = found.mean()
    assert (recall[2] >= recall[1] - 1e-6).all()
    common = found.overlap[..., 0].mean(-1)
    assert common[0, 0] == common[1, 1] == 1 and 0 < common[0, 1] < 1 and np.isnan(common[2:]).all()
    assert np.isnan(found.values["needed"][2:]).all()


def test_while_reading_the_whole_text_is_measured(lm: LanguageModel) -> None:
    found = lose(lm, POLICIES["streaming_llm"](sink=2), 6, PROMPTS[:1], at="prefill", progress=False)
    p = eager(lm, PROMPTS[0])
    at = torch.arange(p.shape[-1])
    shown = (at < 2)[None, :] | (at[:, None] - at[None, :] < 4)
    wanted = (p * shown).sum(-1).mean(-1).numpy()
    assert found.policies == ("streaming_llm(sink=2)",)
    assert found.mean("kept")[0, 0] == pytest.approx(float((shown & (p[0, 0] > 0)).sum(-1).double().mean()))
    assert np.abs(found.mean()[0, 0] - wanted).max() < 1e-5


def test_every_policy_runs_and_none_beats_the_ceilings(lm: LanguageModel) -> None:
    small = {"snapkv": {"window": 4}, "ems": {"window": 4}, "dapq": {"tokens": 4}}
    small |= {"moba": {"block": 4}, "block_sparse": {"block": 2}, "flexprefill": {"block": 4}}
    small |= {"longheads": {"chunk": 2, "begin": 4}, "critiprefill": {"segment": 4, "block": 2, "begin": 4}}
    small |= {"rectified_spaattn": {"block": 4}, "routed": {"sparse": "knorm", "window": 4}}
    small |= {"s3": {"encoder": lambda x, layer: torch.cat([x, -x], -1), "active": 4}}
    every = [POLICIES[name](**small.get(name, {})) for name in POLICIES]
    found = lose(lm, every, [8], PROMPTS[:1], answer=ANSWER, progress=False)
    recall = dict(zip([policy.name for policy in every], found.mean()[:, 0], strict=True))
    group = lm.info.heads // int(lm.model.config.num_key_value_heads)
    for policy in every:
        mine = recall[policy.name]
        assert ((mine > 0) & (mine <= 1 + 1e-6)).all()
        if isinstance(policy, KeyPolicy):  # rules of rows may hide keys that come after the prompt, or show more
            assert (mine <= recall["top_k"] + 1e-6).all()
            means = [x.reshape(x.shape[0], -1, group).mean(-1) for x in (mine, recall["oracle"])]
            assert (means[0] <= means[1] + 1e-6).all()


def test_a_run_is_kept_resumed_and_read_again(lm: LanguageModel, tmp_path: Path) -> None:
    first = lose(lm, "knorm", [4], SIX, answer=ANSWER, out=tmp_path, progress=False)
    lines = (tmp_path / "cache.trials.jsonl").read_text().splitlines()
    (tmp_path / "cache.trials.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = lose(lm, "knorm", [4], SIX, answer=ANSWER, out=tmp_path, progress=False)
    read = CacheLosses.load(tmp_path)
    for name in MEASURES:
        np.testing.assert_array_equal(first.values[name], again.values[name])
        np.testing.assert_array_equal(first.values[name], read.values[name])
    np.testing.assert_array_equal(first.overlap, read.overlap)
    frame = read.to_frame()
    assert len(frame) == 1 and frame["ci_low_recall"][0] < frame["recall"][0] < frame["ci_high_recall"][0]
    assert not read.few and frame["prompts"][0] == 6 and frame["kept"][0] == 4
    assert len(read.heads_frame()) == lm.info.layers * lm.info.heads
    document = json.loads((tmp_path / "cache.json").read_text())
    assert document["provenance"]["parameters"]["policies"] == ["knorm"]
    (tmp_path / "cache.json").write_text(json.dumps({**document, "level": 0.5}))
    with pytest.raises(HeadscopeError, match="changed after it was written"):
        CacheLosses.load(tmp_path)
    few = lose(lm, "knorm", [4], SIX[:5], answer=ANSWER, progress=False)
    assert few.few.startswith("5 prompts: no intervals") and few.to_frame()["ci_low_recall"].isna().all()
    assert few.heads_frame()["ci_high"].isna().all() and (few.heads_frame()["n"] == 5).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policies": []}, "name at least one policy"),
        ({"policies": "snapvk"}, "did you mean 'snapkv'"),
        ({"policies": "snapkv", "budgets": [80]}, "longer than its window of 64"),
        ({"policies": [POLICIES["snapkv"](window=8)]}, "always keeps 8 keys"),
        ({"policies": "streaming_llm"}, "leaves none"),
        ({"budgets": []}, "at least one budget"),
        ({"answer": 30}, "of which the last 30 are the answer"),
        ({"first": 3}, "is a row of at='prefill'"),
        ({"policies": "s3"}, "which only Python can give"),
        ({"policies": "critiprefill", "layers": [1]}, "measure all layers"),
        ({"at": "never"}, "'decode' or 'prefill'"),
        ({"layers": [1.5]}, "layers is a list of different layers"),
        ({"layers": [7]}, "layer 7 does not exist"),
        ({"answer": None}, "answer and first are whole numbers"),
        ({"budgets": None}, "at least one budget"),
        ({"budgets": "8,16"}, "a budget is a number of keys"),
        ({"policies": 3}, "policies are names or declarations"),
        ({"policies": POLICIES["snapkv"]}, "policies are names or declarations"),
        ({"prompts": None}, "prompts are texts or sequences of token ids"),
        ({"prompts": [*PROMPTS, PROMPTS[0]]}, "prompt 2 is prompt 0 again"),
        ({"policies": POLICIES["neighbourhood"](dilation=9)}, "reach over 28 tokens, and a prompt has 14"),
        ({"policies": POLICIES["neighbourhood"](stride=14), "budgets": [20]}, "reaches over a whole prompt of 14"),
        ({"policies": "routed"}, "decides by the last 64 rows of a prompt, and one has 14"),
        ({"policies": POLICIES["routed"](window=4)}, "routed runs streaming_llm as it is.* leaves none of 4"),
        ({"policies": POLICIES["expected_attention"](sink=20), "budgets": [20]}, "a prompt of more than 20 tokens"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(lm: LanguageModel, given: dict, said: str) -> None:
    """Of a dry run too, which stops before anything is read."""
    settings = {"policies": "knorm", "budgets": [4], "prompts": PROMPTS, "answer": ANSWER, "progress": False} | given
    with pytest.raises(HeadscopeError, match=said) as error, dry_run():
        lose(lm, **settings)
    assert "\n" not in str(error.value)


def test_where_nothing_is_left_to_choose_it_is_said(lm: LanguageModel) -> None:
    asked = {"budgets": [8, 9], "prompts": PROMPTS, "answer": ANSWER, "progress": False}
    with (
        pytest.warns(UserWarning, match=r"snapkv\(window=8\) at a budget of 8: it always keeps 8 first or") as said,
        dry_run(),
    ):
        lose(lm, POLICIES["snapkv"](window=8), **asked)
    assert len(said) == 1  # a budget of 9 has one key to choose
    with pytest.warns(UserWarning, match="a budget of 25 holds every prompt whole"), dry_run():
        lose(lm, "knorm", **asked | {"budgets": 25})
    with pytest.warns(UserWarning, match="EvictKeys: snapkv at a budget of 64: it always keeps 64"):
        EvictKeys(policy="snapkv", budget=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvictKeys(policy="snapkv", budget=65)


@pytest.mark.parametrize(
    ("policy", "given", "why"),
    [
        ("streaming_llm", {"sink": -5}, "sink is 0 or more, not -5"),
        ("h2o", {"recent": -1}, "recent is 0 or more"),
        ("block_sparse", {"block": 0}, "block is 1 or more, not 0"),
        ("moba", {"block": -16}, "block is 1 or more"),
        ("routed", {"window": 0}, "window is 1 or more"),
        ("expected_attention", {"covariance": "no"}, "covariance is true or false, not 'no'"),
    ],
)
def test_settings_that_count_are_counted(policy: str, given: dict[str, int], why: str) -> None:
    with pytest.raises(HeadscopeError, match=why):
        POLICIES[policy](**given)
    with pytest.raises(HeadscopeError, match="options are settings by name"):
        EvictKeys(options=["window"])


def test_what_cannot_be_asked_is_one_line(lm: LanguageModel, tmp_path: Path) -> None:
    ids = [list(range(3, 33))]
    for given, why in (
        ({"answer": 1.5}, "answer is a whole number"),
        ({"answer": "4"}, "answer is a whole number"),
        ({"layers": []}, "layers is a list of different layers"),
        ({"layers": 1}, "layers is a list of different layers"),
        ({"layers": [True]}, "layers is a list of different layers"),
        ({"layers": [1, 1]}, "layers is a list of different layers"),
        ({"budgets": float("inf")}, "a budget is a number"),
    ):
        with pytest.raises(HeadscopeError, match=why):
            lose(lm, **{"policies": "h2o", "budgets": 8, "prompts": ids, "answer": 4, "progress": False} | given)
    with pytest.raises(HeadscopeError, match="reads with an encoder"):
        lose(LanguageModel.wrap(tiny_model("t5", "encoder-decoder"), None), "h2o", 8, ids, answer=4, progress=False)
    with pytest.raises(HeadscopeError, match="window of 64"):
        lose(lm, "snapkv", 8, ids, answer=4, out=tmp_path, progress=False)
    found = lose(lm, "h2o", 8, ids, answer=4, out=tmp_path, progress=False)  # the first left nothing finished behind
    assert 0 < found.mean().min() < 1
    with pytest.warns(UserWarning, match="longheads dropped nothing at a budget of 8"):
        lose(lm, "longheads", 8, ids, answer=4, progress=False)
