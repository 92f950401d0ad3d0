"""The command line from outside: exit codes, JSON, dry runs, files, and how fast it starts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import typer

from headscope.interp.cli import main
from headscope.interp.prompts import load_haystack


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err


SETTING = {"name", "type", "required", "default", "meaning"}


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['headscope', '--help']\nfrom headscope.interp.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    ours, torchs = (min(processor_time(*command) for _ in range(2)) for command in (HELP, ("-c", "import torch")))
    assert ours < torchs / 2  # side by side: the machine may be slow, and its wall clock says little


HELP = ("-m", "headscope.interp.cli", "--help")


def processor_time(*command: str) -> float:
    """Seconds that Python takes for it."""
    begin = os.times()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    end = os.times()
    return end.children_user + end.children_system - begin.children_user - begin.children_system


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "--json")
    assert code == 0
    assert {entry["name"] for entry in json.loads(out)["models"]} == {
        "smollm2-135m",
        "gemma3-270m",
        "llava-smollm2",
    }


@pytest.mark.parametrize("command", [("circuit", "ioi"), ("discover", "induction"), ("evaluate", "text_loss")])
@pytest.mark.parametrize("stopped", [KeyboardInterrupt, typer.Abort])  # typer's own, and what older ones make of it
def test_ctrl_c_says_how_to_go_on(
    command: tuple[str, str], stopped: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def stop(*arguments: object, **settings: object) -> None:
        raise stopped

    monkeypatch.setattr("headscope.interp.cli.app.Run.load", stop)  # of no module that others import a name from
    code, out, err = run(capsys, *command, "--model", "smollm2-135m")
    assert (code, out) == (130, "") and err.strip() == "interrupted; run the same command again to resume"


def test_check_verifies(capsys: pytest.CaptureFixture[str], model: str) -> None:
    code, out, _ = run(capsys, "models", "check", model, "--json")
    row = json.loads(out)["verification"][0]
    assert code == 0 and row["verified"] and row["calls"] == 4 and row["share_of_bound"] < 1


def test_trace_writes_a_record(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    from headscope.interp import load_record

    arguments = ("trace", "--model", model, "--prompt", "one two", "--prompt", "three four five")
    code, out, _ = run(capsys, *arguments, "--statistics", "entropy,key_mass", "--out", str(tmp_path / "r"), "--json")
    record = load_record(tmp_path / "r")
    assert code == 0 and record.sizes["example"] == 2 and record.sizes["layer"] == 2
    shown = {row["statistic"]: row["mean"] for row in json.loads(out)["statistics"]}
    assert shown["entropy"] == pytest.approx(float(record["entropy"].mean()))
    assert (tmp_path / "r" / "trace.config.json").exists()
    code, _, err = run(capsys, *arguments, "--out", str(tmp_path / "r"))
    assert code == 2 and "other settings (statistics)" in err  # a record is never overwritten


def test_exemplars_are_swept_and_shown(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    from headscope.interp import load_record

    (data := tmp_path / "data.txt").write_text("".join(f"{'word ' * i}<b>end</b>\n" for i in range(1, 13)))
    command = ("exemplars", "--model", model, "--data", str(data), "--heads", "L1H3,L0H0", "--top", "2", "--each", "1")
    code, out, err = run(capsys, *command, "--out", str(tmp_path / "r"), "--json")
    record = load_record(tmp_path / "r" / "record")
    scores = record["entropy"].sel(layer=1, head=3).max("query").to_numpy()
    shown = json.loads(out)["top"]
    assert code == 0 and "page:" in err and [row["head"] for row in shown] == ["L1H3"] * 2 + ["L0H0"] * 2
    assert shown[0]["prompt"] == int(scores.argmax()) and shown[0]["score"] == pytest.approx(float(scores.max()))
    document = json.loads((tmp_path / "r" / "exemplars.json").read_text())
    assert document["prompts"] == 12 and [len(head["deciles"]) for head in document["heads"]] == [10, 10]
    page = (tmp_path / "r" / "exemplars.html").read_text()
    assert "&lt;" in page and "<b>end" not in page
    before = sorted((tmp_path / "r" / "record").glob("part-*"))
    assert run(capsys, *command, "--out", str(tmp_path / "r"))[0] == 0  # the sweep is not run again
    assert sorted((tmp_path / "r" / "record").glob("part-*")) == before
    (empty := tmp_path / "empty.txt").write_text("\n \n")
    for wrong, says in (
        (("--statistic", "entropy,distance"), "of one statistic"),
        (("--heads", "L7H0"), "L7H0"),
        (("--data", str(empty)), "empty.txt holds no prompts: give a line of text"),
    ):
        code, _, err = run(capsys, *command, *wrong, "--out", str(tmp_path / "other"))
        assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "other").exists()
    code, out, _ = run(capsys, *command, "--out", str(tmp_path / "other"), "--dry-run", "--json")
    assert code == 0 and json.loads(out)["prompts"] == 12 and not (tmp_path / "other").exists()


def test_discover_evaluate_report(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    heads, out = str(tmp_path / "heads"), str(tmp_path / "ev")
    discover = ("discover", "induction", "--model", model, "--samples", "3", "--set", "length=8", "--out", heads)
    code, printed, _ = run(capsys, *discover, "--json")
    assert code == 0 and len(json.loads(printed)["heads"]) == 8
    assert json.loads((tmp_path / "heads" / "induction.json").read_text())["heads"][0]["n"] == 3
    evaluate = ("evaluate", "text_loss", "--model", model, "--ablate", heads, "--top", "2", "--controls", "2")
    small = ("--set", "length=32", "--set", "passages=2", "--out", out)
    code, printed, _ = run(capsys, *evaluate, *small, "--json")
    document = json.loads(printed)
    assert code == 0 and [row["kind"] for row in document["summary"]].count("control") == 2
    assert document["contrasts"][0]["controls"] == 2
    code, _, err = run(capsys, "report", str(tmp_path), "--prompt", "one two one two")
    assert code == 0 and "report:" in err
    page = (tmp_path / "report.html").read_text()
    assert "<title>" in page and len(page) < 6_000_000


def test_taxonomy(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    heads, out = str(tmp_path / "heads"), tmp_path / "kinds"
    code, _, _ = run(capsys, "discover", "sinks", "--model", model, "--samples", "2", "--out", heads)
    assert code == 0
    (text := tmp_path / "text.txt").write_text(load_haystack()[:3000])
    asked = ("taxonomy", "--model", model, "--text", str(text), "--clusters", "3", "--out", str(out))
    small = ("--set", "length=24", "--set", "samples=4", "--set", "draws=3")
    code, printed, _ = run(capsys, *asked, *small, "--scores", heads, "--json")
    document = json.loads(printed)
    assert code == 0 and len(document["clusters"]) == 3 and len(document["heads"]) == 8
    assert {row["method"] for row in document["methods"]} == {"sinks"} and len(document["stability"]) == 5
    assert (out / "taxonomy.json").exists() and (out / "taxonomy.config.json").exists()
    code, printed, _ = run(capsys, *asked, *small)
    assert code == 0 and "kinds of heads" in printed and "labels permuted" in printed
    code, printed, _ = run(capsys, *asked, *small, "--dry-run", "--json")
    assert code == 0 and json.loads(printed)["files"][0] == "taxonomy.json"
    code, _, err = run(capsys, *asked, "--set", "lenght=24")
    assert code == 2 and "did you mean 'length'" in err
    code, _, _ = run(capsys, "report", str(tmp_path))
    assert code == 0  # a taxonomy beside head scores is no head score


def test_intervene_then_evaluate_with(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    from headscope.interp import load_model
    from headscope.interventions import AblateHeads, ScaleHeads, load_intervention

    for name, kind, extra in (("half", "scale_heads", ("factor=0.5",)), ("mean", "ablate-heads", ("how=mean",))):
        command = ("intervene", kind, "--model", model, "--heads", "L0H1,L1H3", "--out", str(tmp_path / name))
        code, printed, err = run(capsys, *command, *(x for s in extra for x in ("--set", s)))
        assert code == 0 and "L0H1,L1H3" in printed, err
    lm = load_model(model)
    assert load_intervention(tmp_path / "half", lm) == ScaleHeads([(0, 1), (1, 3)], 0.5)
    mean = load_intervention(tmp_path / "mean", lm)
    assert isinstance(mean, AblateHeads) and mean.means is not None and mean.means.shape == (2, 4, 8)
    command = ("evaluate", "text_loss", "--model", model, "--controls", "1", "--json")
    small = ("--set", "length=16", "--set", "passages=2", "--sweep", "strength=0,0.5,1")
    both = ("--with", str(tmp_path / "half"), "--with", str(tmp_path / "mean"))
    out = ("--out", str(tmp_path / "evaluation"))
    code, printed, err = run(capsys, *command, *small, *both, "--ablate", "L0H1,L1H3", *out)
    assert code == 0, err
    rows = json.loads(printed)["summary"]
    edits = [row for row in rows if row["kind"] == "intervention"]
    assert len(edits) == 3 * 3 and [row["delta"] for row in edits[::3]] == [0, 0, 0]  # strength 0
    assert len({row["condition"] for row in rows}) == 1 + 9 + 9
    assert run(capsys, "report", str(tmp_path / "evaluation"))[0] == 0
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "text_loss: score against strength" in page and "Dose and response" in page and "Trials that changed" in page
    half, zero = edits[2], edits[7]  # half of everything, and half of zero ablation: the same edit by two names
    assert half["delta"] == pytest.approx(zero["delta"], abs=1e-6) and abs(half["delta"]) > 1e-4


def test_intervene_with_tensors_and_what_is_measured_then_export(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from headscope.interp import load_model
    from headscope.interventions import AblateHeads, AddToHeads, PatchHeads, apply, head_samples, load_intervention

    vectors, sigma = torch.randn(2, 4, 8), torch.rand(2, 4) + 0.25
    save_file({"mass_mean": vectors, "mass_mean_sigma": sigma}, tmp_path / "probe.safetensors")
    save_file({"v": vectors}, tmp_path / "one.safetensors")
    (tmp_path / "text").write_text("A brass key is under the pot.\n\nNobody knew where it was.")
    here = {name: f"{tmp_path / name}" for name in ("probe.safetensors", "one.safetensors")}
    two = f"{here['probe.safetensors']}:mass_mean"
    asked: dict[str, tuple[str, ...]] = {
        "add-to-heads": (f"vectors={two}", f"sigma={two}_sigma", "strength=-2.5"),
        "affine_heads": (f"A={here['one.safetensors']}", f"v={here['one.safetensors']}:v"),
        "project_heads": (f"directions={two}",),
        "clamp_heads": (f"directions={two}", "low=0.25", f"high={two}_sigma"),
        "ablate_heads": ("how=resample", "seed=4"),
        "patch_heads": ("prompt=one two three four", "taken=[1,3]", "positions=[0,2]"),
    }
    lm, made = load_model(model), {}
    for kind, settings in asked.items():
        command = ("intervene", kind, "--model", model, "--heads", "L0H1,L1H3", "--out", str(tmp_path / kind))
        options = [x for setting in settings for x in ("--set", setting)]
        code, _, err = run(capsys, *command, "--reference", str(tmp_path / "text"), *options)
        assert code == 0, err
        made[kind] = load_intervention(tmp_path / kind, lm)
    heads = [(0, 1), (1, 3)]
    assert made["add-to-heads"] == AddToHeads(heads, vectors, sigma=sigma, strength=-2.5)
    samples = head_samples(lm, (tmp_path / "text").read_text().split("\n\n"))
    assert made["ablate_heads"] == AblateHeads(heads, "resample", samples=samples, seed=4)
    patch = PatchHeads.from_prompt(lm, "one two three four", heads, (1, 3), to=[0, 2])
    assert isinstance(made["patch_heads"], PatchHeads) and torch.equal(made["patch_heads"].z, patch.z)
    assert (made["patch_heads"].prompt, made["patch_heads"].length) == ("one two three four", None)

    command = ("evaluate", "text_kl", "--model", model, "--with", str(tmp_path / "add-to-heads"), "--controls", "1")
    code, printed, err = run(capsys, *command, "--vectors", "2", "--set", "length=8", "--json")
    found = [(row["control"], row["controls"]) for row in json.loads(printed)["contrasts"]]
    assert code == 0 and found == [("random heads", 1), ("random vectors", 2)], err

    command = ("export", str(tmp_path / "add-to-heads"), str(tmp_path / "project_heads"), "--model", model)
    code, printed, err = run(capsys, *command, "--out", str(tmp_path / "baked"), "--json")
    assert code == 0 and json.loads(printed)["folder"] == str(tmp_path / "baked"), err
    ids = torch.arange(5, 25)[None]
    with apply(lm, made["add-to-heads"] + made["project_heads"]):
        wanted = lm.forward(ids).logits
    baked = load_model(str(tmp_path / "baked")).forward(ids).logits
    assert float((baked - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    for arguments, says in (
        (("export", str(tmp_path / "clamp_heads"), "--out", str(tmp_path / "no")), "clamp 2 heads"),
        (("intervene", "add_to_heads", "--set", f"vectors={two}x", "--out", "no"), "holds no tensor 'mass_meanx'"),
        (("intervene", "add_to_heads", "--set", f"vectors={here['probe.safetensors']}", "--out", "no"), "2 tensors"),
        (("intervene", "add_to_heads", "--set", "vectors=probe.npz", "--out", "no"), "names no tensor"),
        (("intervene", "add_to_heads", "--set", "vectors=no.safetensors", "--out", "no"), "cannot read tensors from"),
    ):
        heads_too = ("--heads", "L0H1") if arguments[0] == "intervene" else ()
        code, _, err = run(capsys, *arguments, *heads_too, "--model", model)
        message = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(message) == 1 and says in message[0], err
    assert not (tmp_path / "no").exists()


def test_heads_judged_on_the_needles_that_found_them(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    found = str(tmp_path / "heads")
    command = ("discover", "retrieval", "--model", model, "--lengths", "300", "--depths", "50")
    run(capsys, *command, "--set", "threshold=-1", "--set", "max_new_tokens=3", "--out", found)
    command = ("evaluate", "needle", "--model", model, "--ablate", found, "--top", "1", "--controls", "1", "--dry-run")
    code, _, err = run(capsys, *command)
    assert code == 0 and "warning" not in err, err
    code, _, err = run(capsys, *command, "--set", 'needles=["train","soup"]')
    assert code == 0 and "needles that the heads were found with (soup)" in " ".join(err.split())


def test_mean_ablation_takes_a_reference_text(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    from headscope.interp import load_model
    from headscope.interventions import head_means

    heads, text = str(tmp_path / "heads"), tmp_path / "reference.txt"
    paragraphs = ["A brass key is under the pot.", "Nobody knew\nwhere it was."]
    text.write_text("\n\n".join(paragraphs) + "\n\n  \n")
    run(capsys, "discover", "induction", "--model", model, "--samples", "2", "--set", "length=8", "--out", heads)
    command = ("evaluate", "text_loss", "--model", model, "--ablate", heads, "--top", "2", "--controls", "1")
    command += ("--set", "length=16", "--set", "passages=2", "--how", "mean")
    digests = []
    for name, extra in {"given": ("--reference", str(text)), "bundled": ()}.items():
        code, _, err = run(capsys, *command, *extra, "--out", str(tmp_path / name), "--json")
        assert code == 0, err
        made = json.loads((tmp_path / name / "evaluation.json").read_text())["provenance"]
        digests.append(made["conditions"][1]["edits"][0]["means"]["sha256"])
        config = json.loads((tmp_path / name / "evaluate-text_loss.config.json").read_text())
        assert config["settings"]["reference"] == (str(text) if extra else None)
    wanted = head_means(load_model(model), paragraphs)
    assert digests[0] == hashlib.sha256(wanted.numpy().tobytes()).hexdigest() != digests[1]
    code, printed, _ = run(capsys, *command, "--reference", str(text), "--dry-run", "--json")
    assert json.loads(printed)["forward_passes"] == 2 * (1 + 1 + 1) + len(paragraphs)
    code, _, err = run(capsys, *command[:-1], "zero", "--reference", str(text))
    assert code == 2 and "--how mean" in err


@pytest.mark.parametrize(
    "command",
    [
        ("discover", "retrieval", "--lengths", "300", "--depths", "0,100"),
        ("evaluate", "needle", "--lengths", "300", "--depths", "0,100"),
        ("probe", "truth"),
        ("discover", "sinks", "--samples", "2"),
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_dry_run_runs_nothing(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, command: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(capsys, *command, "--model", model, "--out", str(out), "--dry-run", "--json")
    found = json.loads(printed)
    assert code == 0 and found["forward_passes"] >= found["prompts"] > 0 and found["seconds"] >= 0
    assert found["files"] and found["memory_mib"] >= 0
    assert not out.exists()


def test_dry_run_counts_forward_passes(capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = ("discover", "retrieval", "--lengths", "300", "--set", "depths=2", "--set", "max_new_tokens=7")
    _, printed, _ = run(capsys, *command, "--model", model, "--dry-run", "--json")
    assert json.loads(printed)["forward_passes"] == 3 * 2 * (1 + 7)  # needles x depths x (prompt and steps)
    command = (*command[:4], "--depths", "50", "--set", "max_new_tokens=7")  # one depth: the middle
    _, printed, _ = run(capsys, *command, "--model", model, "--dry-run", "--json")
    assert json.loads(printed)["forward_passes"] == 3 * (1 + 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("discover", "nonsense"), "no head method 'nonsense'; known: induction"),
        (("discover", "retrieval", "--lengths", "5000"), "exceed the context"),
        (("discover", "induction", "--set", "colour=1"), "has no setting 'colour'"),
        (("discover", "induction", "--set", "length=abc"), "length must be a whole number, not 'abc'"),
        (("discover", "induction", "--set", "length=20.5"), "length must be a whole number, not 20.5"),
        (("discover", "sinks", "--set", "samples=true"), "samples must be a whole number, not True"),
        (("discover", "sinks", "--samples", "4", "--set", "samples=3"), "say the same setting: give one of them"),
        (("discover", "induction", "--set", "colour"), "NAME=VALUE"),
        (("discover", "retrieval", "--lengths", "many"), "comma-separated numbers"),
        (("evaluate", "needle", "--set", "max_new_tokens=2.5"), "max_new_tokens must be a whole number, not 2.5"),
        (("evaluate", "text_loss", "--set", "passages=many"), "passages must be a whole number, not 'many'"),
        (("evaluate", "sums"), "there is no task 'sums'"),
        (("evaluate", "needle,text_loss", "--set", "lenght=8"), "none of needle, text_loss has a setting 'lenght'"),
        (("evaluate", "needle", "--set", "depth=8"), "(did you mean 'depths'?)"),
        (("evaluate", "text_loss", "--sweep", "strength=0,1"), "give one by --with or --ablate"),
        (("evaluate", "text_loss", "--with", "nowhere.safetensors"), "cannot read nowhere.safetensors"),
        (("evaluate", "text_loss", "--ablate", "L0H1", "--sweep", "factor=0,1"), "AblateHeads has no setting 'factor'"),
        (("evaluate", "text_loss", "--ablate", "L0H1", "--sweep", "strength"), "--sweep takes NAME=a,b,c"),
        (("intervene", "scale_head", "--out", "x"), "(did you mean 'scale_heads'?)"),
        (("intervene", "scale-heads", "--out", "x"), "needs heads: give heads=..."),
        (("intervene", "scale_heads", "--out", "x", "--heads", "L0H1", "--set", "faktor=2"), "has no setting 'faktor'"),
        (("intervene", "scale_heads", "--out", "x", "--heads", "L7H1"), "L7H1 does not exist"),
        (("evaluate", "text_loss", "--ablate", "nowhere"), "does not exist"),
        (("trace", "--statistics", "mood", "--prompt", "x", "--out", "unused"), "there is no statistic 'mood'"),
        (("trace", "--prompt", "", "--out", "unused"), "empty"),
        (("trace", "--out", "unused"), "--prompt"),
        (("probe", "no-such-labels"), "no-such-labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value)[:40],
)
def test_bad_input_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments, "--model", model)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(message) == 1 and says in message[0], err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_unknown_model_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "discover", "sinks", "--model", "no/such-folder/x.gguf")
    assert code == 2 and "no such file" in err


def hears_interrupts() -> None:
    """A shell starts its background jobs deaf to Ctrl-C, and their children inherit that: the tests may be one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_and_kill_resume(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headscope.interp.cli", "discover", "induction", "--model", model, "--json"]
    command += ["--samples", "1000", "--set", "length=8", "--set", "batch=1", "--out", str(tmp_path)]
    journal = tmp_path / "induction.trials.jsonl"

    def trials() -> int:
        return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0

    for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = trials()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
        )
        while trials() < before + 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in err
        assert not (tmp_path / "induction.json").exists()
    finished = [json.loads(line)["trial"] for line in journal.read_bytes().split(b"\n")[1:-1]]
    assert finished == list(range(len(finished))) and 4 <= len(finished) < 1000  # none was done again


@pytest.mark.parametrize("what", ["methods", "statistics", "edits", "tasks"])
def test_lists_say_every_setting_with_its_default(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, printed, _ = run(capsys, "list", what, "--json")
    rows = {row["name"]: row["settings"] for row in json.loads(printed)[what]}
    assert code == 0 and all(set(one) == SETTING for found in rows.values() for one in found)
    name, setting, default = {
        "methods": ("induction", "samples", 20),
        "statistics": ("sink_mass", "first", 4),
        "edits": ("scale_heads", "factor", 1.0),
        "tasks": ("text_kl", "length", 512),
    }[what]
    told = {one["name"]: one for one in rows[name]}
    assert told[setting]["default"] == default and not told[setting]["required"]
    if what == "edits":
        assert told["heads"]["required"] and told["heads"]["default"] is None and "during" in told


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out == f"headscope {metadata.version('headscope')}\n"


def test_a_place_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, "trace", "-m", model, "-p", "one two", "--out", str(tmp_path / "file" / "r"))
    assert code == 2 and err.startswith("error: cannot write ") and err.count("\n") == 1


def test_a_setting_that_some_methods_lack_is_said(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    command = ("discover", "sinks", "retrieval", "--samples", "2", "--lengths", "300", "--model", model, "--dry-run")
    code, _, err = run(capsys, *command, "--json")
    assert code == 0 and "retrieval takes no samples and runs as it is" in err
    assert "sinks takes no lengths and runs as it is" in err
