"""The masking experiment: against the protocol by hand with hooks, and its draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.cli import main
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles
from headscope.interp.prompts.decoding import answer_text
from headscope.interp.results.headlists import to_retrieval_head
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.sites import is_attached
from headscope.interventions import masking
from headscope.interventions.evaluation.masking import LENGTHS, needle_task

RANKED = HeadSet(((1, 2), (0, 1), (1, 0)))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"])
    inner.train_from_iterator([load_haystack()[:20_000] + " ".join(n.needle for n in load_needles(10))], trainer)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    common = dict(vocab_size=600, eos_token_id=0, bos_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=1024, **sizes, **common)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


def small(lm: LanguageModel, **given):
    return needle_task(lm, **{"lengths": [260], "depths": [0, 50], "max_new_tokens": 6, **given})


def by_hand(lm: LanguageModel, ids: list[int], heads: list[tuple[int, int]]) -> str:
    """Their script: the prompt but its last token unmasked, then every step with the heads' queries at zero."""
    with torch.no_grad():
        cache = lm.model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
    hooks = []
    for layer, head in heads:

        def zero(module, args, output, head=head):
            output = output.clone()
            output[..., head * 8 : head * 8 + 8] = 0  # the rotary embedding leaves a zero query zero
            return output

        hooks.append(lm.model.model.layers[layer].self_attn.q_proj.register_forward_hook(zero))
    fed, said = ids[-1], []
    for _ in range(6):
        with torch.no_grad():
            logits = lm.model(torch.tensor([[fed]]), past_key_values=cache, use_cache=True).logits
        fed = int(logits[0, -1].argmax())
        said.append(fed)
        if fed == 0 or "\n" in lm.tokenizer.decode([fed]):
            break
    for hook in hooks:
        hook.remove()
    return answer_text(lm, said)


def test_it_is_the_protocol_by_hand(lm: LanguageModel) -> None:
    task = small(lm)
    result = masking(lm, RANKED, (1, 3), task=task, draws=2, progress=False)
    prompts = [list(task.build(lm, trial).ids) for trial in task.trials(lm)]
    table = result.trials.set_index(["condition", "trial"])
    random = [f"random {k} (draw {i})" for k in (1, 3) for i in range(2)]
    names = ["no edit", "top 1", *random[:2], "top 3", *random[2:]]
    assert list(dict.fromkeys(result.trials["condition"])) == names
    for name in names:
        for i, ids in enumerate(prompts):
            row = table.loc[(name, i)]
            masked = list(HeadSet.of(row["masked"])) if row["masked"] else []
            assert row["response"] == by_hand(lm, ids, masked), (name, i)
            assert len(masked) == (0 if name == "no edit" else int(name.split()[1]))
    assert table.loc[("top 3", 0), "masked"] == "L1H2,L0H1,L1H0"
    assert len(set(result.trials["response"])) > 3, "masks change nothing, so the test shows nothing"
    assert not is_attached(lm.model)
    contrasts = result.contrasts()
    assert list(contrasts["condition"]) == ["top 1", "top 3"] and list(contrasts["controls"]) == [2, 2]


def test_random_heads_are_drawn_anew_from_all(lm: LanguageModel) -> None:
    """As published a trial's draw may hold retrieval heads, of any layer, and another trial has another."""
    task = small(lm, depths=12, max_new_tokens=1)
    given = dict(task=task, draws=3, progress=False)
    table = masking(lm, RANKED, (2,), **given).trials
    drawn = [frozenset(HeadSet.of(one)) for one in table[table["kind"] == "control"]["masked"]]
    assert len(drawn) == 36 and len(set(drawn)) > 12 and all(len(one) == 2 for one in drawn)
    every = {head for one in drawn for head in one}
    assert every == {(layer, head) for layer in range(2) for head in range(4)}
    again = masking(lm, RANKED, (2,), **given).trials
    assert list(again["masked"]) == list(table["masked"])
    assert list(masking(lm, RANKED, (2,), seed=1, **given).trials["masked"]) != list(table["masked"])
    others = masking(lm, RANKED, (2,), random="others", **given).trials
    kept = {head for one in others[others["kind"] == "control"]["masked"] for head in HeadSet.of(one)}
    assert kept and not kept & set(RANKED)


def test_scores_are_ranked_by_their_mean_and_runs_resume(lm: LanguageModel, tmp_path: Path) -> None:
    trials = np.zeros((2, 2, 4))
    trials[:, 1, 2], trials[0, 0, 3] = 0.4, 0.6  # means 0.4 and 0.3
    task = small(lm, depths=[50])
    result = masking(lm, HeadScores("retrieval", trials), (2,), task=task, out=tmp_path, progress=False)
    assert result.trials["masked"][1] == "L1H2,L0H3"
    assert result.provenance["parameters"]["protocol"].startswith("Wu et al. 2024")
    journal = tmp_path / "evaluation.trials.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    again = masking(lm, HeadScores("retrieval", trials), (2,), task=task, out=tmp_path, progress=False)
    assert list(again.trials["response"]) == list(result.trials["response"])
    with pytest.raises(HeadscopeError, match="other settings"):
        masking(lm, HeadScores("retrieval", trials), (1,), task=task, out=tmp_path, progress=False)


def test_the_trials_are_theirs(lm: LanguageModel) -> None:
    assert len(LENGTHS) == 40 and LENGTHS[0] == 1000 and LENGTHS[-1] == 128000
    task = needle_task(lm)
    assert list(task.loaded) == ["sandwich"] and task.newline_stop and task.max_new_tokens == 50
    with pytest.raises(HeadscopeError, match="scale is"):
        needle_task(lm, "big")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ks": (4,)}, "k=4 of 3 listed heads"),
        ({"ks": ()}, "different numbers of heads"),
        ({"ks": (1, 1)}, "different numbers of heads"),
        ({"draws": 0}, "draws is at least 1"),
        ({"random": "none"}, "random is 'published' or 'others'"),
        (
            {"heads": HeadSet(tuple((i, h) for i in range(2) for h in range(4))), "random": "others"},
            "0 heads are not in",
        ),
        ({"heads": HeadSet(((5, 0),))}, "L5H0 does not exist"),
    ],
)
def test_bad_settings_are_one_line(lm: LanguageModel, given: dict, said: str) -> None:
    with pytest.raises(HeadscopeError, match=said):
        masking(lm, **{"heads": RANKED, "ks": (1,), "task": small(lm), "progress": False, **given})


def test_the_command_line_masks_a_published_list(
    lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    listed = to_retrieval_head(HeadScores("retrieval", np.arange(8.0).reshape(1, 2, 4)), tmp_path / "list.json")
    small = ("--lengths", "260", "--depths", "50", "--set", "max_new_tokens=2", "--k", "1,2", "--json")
    with pytest.raises(SystemExit) as stop:
        main(["mask", str(listed), "-m", str(model), *small, "--out", str(tmp_path / "out")])
    assert not stop.value.code
    shown = json.loads(capsys.readouterr().out)
    assert [row["condition"] for row in shown["summary"]] == [
        "no edit",
        "top 1",
        "random 1 (draw 0)",
        "top 2",
        "random 2 (draw 0)",
    ]
    assert (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.slow
def test_smollm2_loses_the_needle_with_its_retrieval_heads(smollm2) -> None:
    """The paper's property 5 on the real model: the heads that copy the needle are needed, as many random ones less."""
    from headscope.interp.heads import retrieval

    scores = retrieval(smollm2, lengths=[260], depths=[50], needles=["soup", "key"], progress=False)
    task = needle_task(smollm2, lengths=[260], depths=[50])
    result = masking(smollm2, scores, (20,), task=task, draws=1, progress=False)
    mean = result.summary().set_index("condition")["mean"]
    assert mean["no edit"] > 0.7
    assert mean["top 20"] < mean["random 20 (draw 0)"] - 0.2
