"""``headscope evaluate`` with tasks that say more than a mean, and their report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headscope.interp.cli import main

HEADS = ("--ablate", "L0H1,L1H2", "--controls", "2")


def run(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(command))
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_details_are_shown_and_reported(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    command = ("evaluate", "multiple_choice,facts", "--model", model, *HEADS, "--set", "questions=2")
    code, printed, _ = run(capsys, *command, "--out", str(tmp_path), "--json")
    details = json.loads(printed)["details"]
    assert code == 0 and len(details) == 2 * 4
    assert {one["task"] for one in details} == {"multiple_choice", "facts"}
    assert {"chose A", "right at A", "consistent"} <= set(details[0]["values"])
    code, printed, _ = run(capsys, *command, "--out", str(tmp_path))  # what is finished is read back
    assert code == 0 and "multiple_choice, beside its mean" in printed and "consistent" in printed
    code, _, _ = run(capsys, "report", str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert code == 0 and "multiple_choice: what it says beside its mean" in page and "consistent" in page


def test_a_task_of_the_harness(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text('{"text": "one more text"}\n{"text": "and another one"}\n')
    made = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(made))
    command = ("evaluate", "lm_eval", "--model", model, *HEADS, "--set", f"task={tmp_path / 'own.yaml'}")
    code, printed, _ = run(capsys, *command, "--json")
    found = json.loads(printed)
    assert code == 0 and {row["task"] for row in found["summary"]} == {"lm_eval:own"}
    assert found["summary"][0]["higher_is_better"] is False and found["details"][0]["values"]["word_perplexity"] > 1
    code, printed, _ = run(capsys, *command, "--dry-run", "--json")
    assert code == 0 and json.loads(printed)["prompts"] == 2 * 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("multiple_choice", "--set", "scoring=guess"), "multiple_choice: scoring is one of letter, cloze"),
        (("arithmetic", "--set", 'forms=["roman"]'), "arithmetic: forms is one of plain"),
        (("lm_eval",), "lm_eval needs task: give task="),
    ],
)
def test_bad_settings(capsys: pytest.CaptureFixture[str], model: str, setting: tuple[str, ...], message: str) -> None:
    code, _, error = run(capsys, "evaluate", *setting, "--model", model)
    assert code == 2 and message in error and error.strip().count("\n") == 0
