"""Tasks of lm-evaluation-harness in an evaluation, beside the harness's own run, and its command with our class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import known_boundary
from headscope.interventions import AblateHeads, Intervention, apply, evaluate
from headscope.interventions.tasks import TASKS, resolve
from headscope.interventions.tasks.lm_eval import LmEval

pytest.importorskip("lm_eval")

EVERY = [(layer, head) for layer in range(2) for head in range(4)]
KINDS = ("choice", "generated", "rolling", "target")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks over local data, of the four kinds of the harness. JSON is YAML."""
    root = tmp_path_factory.mktemp("tasks")

    def task(name: str, rows: list[dict[str, Any]], metrics: list[str], **more: Any) -> None:
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        better = {"acc": True, "acc_norm": True, "exact_match": True}
        listed = [
            {"metric": m, **({"aggregation": "mean", "higher_is_better": True} if m in better else {})} for m in metrics
        ]
        made = {"task": f"hs_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        made |= {"test_split": "test", "fewshot_split": "test", "metric_list": listed}
        (root / f"hs_{name}.yaml").write_text(json.dumps(made | more))

    choices = [{"ask": f"word {n} is", "options": ["one", "the house", f"seven {n}"], "gold": n % 3} for n in range(5)]
    told = {"doc_to_text": "{{ask}}", "doc_to_choice": "{{options}}", "doc_to_target": "{{gold}}"}
    task("choice", choices, ["acc", "acc_norm"], output_type="multiple_choice", **told)
    sums = [{"ask": f"{n} and", "target": "one"} for n in range(3)]
    told = {"doc_to_text": "{{ask}}", "doc_to_target": "{{target}}"}
    until = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    task("generated", sums, ["exact_match"], output_type="generate_until", generation_kwargs=until, **told)
    task("target", sums, ["perplexity", "acc"], output_type="loglikelihood", target_delimiter=" ", **told)
    texts = [{"text": "the old house has a door"}, {"text": "one more text of some words, longer than that"}]
    metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    task("rolling", texts, metrics, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    return root


def harness(lm: Any, name: str, folder: Path, **more: Any) -> Any:
    """The harness's own run through its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    own = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)
    return simple_evaluate(model=own, tasks=[name], task_manager=tasks, bootstrap_iters=0, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_harness_reports(reader: LanguageModel, folder: Path, kind: str) -> None:
    """By name and by YAML file, edited and not, every metric of every document and as it is aggregated."""
    edit = AblateHeads([(0, 1), (1, 2)])
    by_name, by_file = LmEval(f"hs_{kind}", include_path=str(folder)), LmEval(str(folder / f"hs_{kind}.yaml"))
    assert by_name.name == by_file.name == f"lm_eval:hs_{kind}"
    for edits in ((), (edit,)):
        with apply(reader, *edits):
            expected = harness(reader, f"hs_{kind}", folder)
            rows = {task: [task.run(reader, trial) for trial in task.trials(reader)] for task in (by_name, by_file)}
        assert rows[by_name] == rows[by_file]
        samples = sorted(expected["samples"][f"hs_{kind}"], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(rows[by_name])
        for sample, row in zip(samples, rows[by_name], strict=True):
            values = json.loads(row["values"])
            for metric in sample["metrics"]:
                given = sample[metric]
                assert values[metric] == pytest.approx(list(given) if isinstance(given, tuple) else given, abs=1e-4)
    result = evaluate(reader, [by_name], [edit], controls=1, progress=False)
    (edited,) = [one for one in result.details if one["condition"] == edit.name]
    reported = {name.partition(",")[0]: value for name, value in expected["results"][f"hs_{kind}"].items()}
    assert edited["values"] and all(
        reported[name] == pytest.approx(x, rel=1e-4) for name, x in edited["values"].items()
    )
    said = result.trials.groupby("trial")["response"].nunique()
    assert (said > 1).any(), "the edit changes nothing"


def test_scores_have_the_metrics_direction(reader: LanguageModel, folder: Path) -> None:
    rolling, target, choice = (LmEval(str(folder / f"hs_{kind}.yaml")) for kind in ("rolling", "target", "choice"))
    assert (rolling.metric, rolling.higher_is_better) == ("word_perplexity", False)
    assert (target.metric, target.higher_is_better) == ("perplexity", False)
    assert (choice.metric, choice.higher_is_better) == ("acc", True)
    trial = rolling.trials(reader)[0]
    found = rolling.run(reader, trial)
    total, words = json.loads(found["values"])["word_perplexity"]
    assert words == 6 and found["score"] == pytest.approx(-total / 6)
    found = target.run(reader, target.trials(reader)[0])
    assert found["score"] == -json.loads(found["values"])["perplexity"] > 0
    normed = LmEval(str(folder / "hs_choice.yaml"), measure="acc_norm")
    assert normed.run(reader, normed.trials(reader)[3])["score"] in (0.0, 1.0) and normed.metric == "acc_norm"


def test_batches_few_shot_and_limits(reader: LanguageModel, folder: Path) -> None:
    path = str(folder / "hs_choice.yaml")
    one, four = (LmEval(path, batch_size=size) for size in (1, 4))
    trials = one.trials(reader)
    for trial in trials:
        alone, together = (json.loads(task.run(reader, trial)["values"]) for task in (one, four))
        assert alone == together
    assert LmEval(path, limit=2).trials(reader) == trials[:2]
    shots = LmEval(path, num_fewshot=2)
    rows = [json.loads(shots.run(reader, trial)["values"]) for trial in shots.trials(reader)]
    expected = harness(reader, "hs_choice", folder, num_fewshot=2)["samples"]["hs_choice"]
    assert rows == [{"acc": sample["acc"], "acc_norm": sample["acc_norm"]} for sample in expected]
    texts = {name: [request.args[0] for request in own] for name, own in shots.runner(reader).requests.items()}
    assert texts[("hs_choice", 0)][0] == expected[0]["arguments"][0][0] and "\n\n" in texts[("hs_choice", 0)][0]


class Ends(Intervention):
    """Notes where prompts end."""

    name = "ends"

    def __init__(self) -> None:
        self.lengths: set[int] = set()

    def edit(self, call: Any) -> Any:
        known = known_boundary()
        assert known is not None
        self.lengths |= set(known.lengths)
        return call


def test_edits_by_phase_know_where_prompts_end(reader: LanguageModel, folder: Path) -> None:
    count = {n: len(reader.tokenizer(f"word {n} is")["input_ids"]) for n in range(5)}
    task, ends = LmEval(str(folder / "hs_choice.yaml"), batch_size=4), Ends()
    with apply(reader, ends):
        for trial in task.trials(reader):
            task.run(reader, trial)
    assert ends.lengths == set(count.values())
    likely = {}
    for during in ("prefill", "decode", "answer", "always"):
        with apply(reader, AblateHeads([(0, 0), (1, 2)], during=during)):  # type: ignore[arg-type]
            likely[during] = task.run(reader, task.trials(reader)[1])["response"]
    assert len(set(likely.values())) == 4, "a phase is not told from another"
    rolling = LmEval(str(folder / "hs_rolling.yaml"))
    trial = rolling.trials(reader)[0]
    with apply(reader, AblateHeads(EVERY, during="decode")):
        decode = rolling.run(reader, trial)
    assert decode == rolling.run(reader, trial), "a text whose perplexity is asked is all prompt"
    generated = LmEval(str(folder / "hs_generated.yaml"))
    with apply(reader, AblateHeads(EVERY, during="decode")):
        decode = generated.run(reader, generated.trials(reader)[0])
    assert decode["response"] != generated.run(reader, generated.trials(reader)[0])["response"]


def test_what_the_harness_cannot_load_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HeadscopeError, match="lm_eval needs task: give task="):
        resolve("lm_eval")
    (tmp_path / "broken.yaml").write_text((folder / "hs_choice.yaml").read_text().replace("choice.jsonl", "none.jsonl"))
    with pytest.raises(HeadscopeError, match="cannot load .*give a task's name") as refused:
        LmEval(str(tmp_path / "broken.yaml"))
    assert "\n" not in str(refused.value)
    with pytest.raises(HeadscopeError, match="there is no file .*nowhere.yaml"):
        LmEval(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(HeadscopeError, match="hs_choice has no metric 'f2'; it has acc, acc_norm"):
        LmEval(str(folder / "hs_choice.yaml"), measure="f2")
    with pytest.raises(HeadscopeError, match="limit is a whole number of at least 1"):
        LmEval(str(folder / "hs_choice.yaml"), limit=0)
    monkeypatch.setattr("headscope.interventions.tasks.lm_eval.find_spec", lambda name: None)
    with pytest.raises(HeadscopeError, match=r"not installed: pip install 'headscope\[evaluation\]'"):
        TASKS["lm_eval"](task="hs_choice")  # type: ignore[call-arg]


@pytest.mark.slow
def test_the_harnesss_own_command(
    reader: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--model headscope --model_args pretrained=...,edit=...``: the numbers of an evaluation with that edit."""
    from headscope.interventions.evaluation import lm_eval

    reader.model.save_pretrained(tmp_path / "model")
    reader.tokenizer.save_pretrained(tmp_path / "model")
    edit = AblateHeads([(0, 0), (0, 1), (1, 2), (1, 3)])
    path = edit.save(tmp_path / "edit")
    tasks = [LmEval(str(folder / f"hs_{kind}.yaml")) for kind in ("choice", "generated", "rolling")]
    details = evaluate(reader, tasks, [edit], controls=1, progress=False).details
    names = ",".join(task.name.removeprefix("lm_eval:") for task in tasks)
    command = ["--model", "headscope", "--model_args", f"pretrained={tmp_path / 'model'},edit={path}", "--tasks", names]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    lm_eval.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    by_condition = {(one["task"], one["condition"]): one["values"] for one in details}
    for task in tasks:
        reported = found[task.name.removeprefix("lm_eval:")]
        own = {name.partition(",")[0]: value for name, value in reported.items()}
        values = by_condition[task.name, edit.name]
        assert {name: own[name] for name in values} == pytest.approx(values, rel=1e-4)
    rolling = tasks[-1].name
    assert by_condition[rolling, edit.name] != by_condition[rolling, "no edit"], "the edit changes nothing"


@pytest.mark.slow
def test_smollm2_edited_and_not(smollm2: LanguageModel, folder: Path) -> None:
    task = LmEval(str(folder / "hs_rolling.yaml"))
    trial = task.trials(smollm2)[1]
    plain = task.run(smollm2, trial)["score"]
    tokenizer, text = smollm2.tokenizer, "one more text of some words, longer than that"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = smollm2.model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert plain == pytest.approx(float(loss) / 9, rel=1e-4)
    with apply(smollm2, AblateHeads([(layer, head) for layer in range(30) for head in range(9)])):
        assert task.run(smollm2, trial)["score"] > plain + 1
