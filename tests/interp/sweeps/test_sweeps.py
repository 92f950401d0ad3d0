"""Sweeps: every prompt as if it were traced alone, whatever batch it ran in; kills, other processes, other settings.

Where numbers of a batch are compared with those of a prompt alone, they come from matrix products of other shapes. The
statistics here are sums of at most 40 probabilities in float32, or scores of at most a few units behind two layers of
32-wide products: 64 roundings of 6e-8, on values up to 10, are 4e-5 at worst. A mistake of one position or one padding
token is of the order of 1e-2 (asserted below).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.records.record import append_record, concatenate, each_part, load_record, open_record
from headscope.interp.runs.estimate import dry_run, estimate
from headscope.interp.sites import is_attached
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, Resid, SinkMass, SpanMass, TargetMass, TopKeys
from headscope.interp.statistics.queries import Every, Generated, Last
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.sweeps import pieces, run, sweep
from headscope.interp.sweeps.batches import Budget, Cost, Prompts, bytes_of, rows_alone
from headscope.interp.tracing.recording import trace
from headscope.interventions import AblateHeads, apply

BOUND = 4e-5
MIXED = [Entropy(), SinkMass(2), TopKeys(2), KeyMass(), HeadOutput((0, -1))]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.wrap(tiny_model("llama"))


def prompts(count: int = 24, longest: int = 40, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 100) for _ in range(draw.randrange(3, longest + 1))] for _ in range(count)]


def alone(lm, given, statistics, **options) -> xr.Dataset:
    """The record of every prompt traced by itself, joined: no batch, no padding, no disk."""
    parts = []
    for number, ids in enumerate(given):
        mine = statistics(number) if callable(statistics) else statistics
        with trace(lm, mine, **options) as tracer:
            lm.model(torch.tensor([ids]), use_cache=False)
        parts.append(tracer.record)
    return concatenate(parts)


def assert_same(found: xr.Dataset, expected: xr.Dataset, bound: float = BOUND) -> None:
    """Integers, positions and missing values equal; numbers within ``bound``."""
    assert set(found.variables) == set(expected.variables) and found.sizes == expected.sizes
    for name, wanted in expected.variables.items():
        values = found.variables[name]
        assert values.dims == wanted.dims and values.dtype == wanted.dtype, name
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, wanted, rtol=0, atol=bound, equal_nan=True, err_msg=str(name))
        else:
            np.testing.assert_array_equal(values, wanted, err_msg=str(name))


@pytest.mark.parametrize(
    ("largest", "queries"),
    [(1, Last(3)), *((largest, queries) for largest in (8, 64) for queries in (None, Last(1), Last(3), Every(4)))],
    ids=str,
)
def test_a_prompt_is_recorded_as_if_it_were_traced_alone(lm, tmp_path, queries, largest):
    given = prompts()
    found = sweep(lm, given, MIXED, out=tmp_path, queries=queries, largest=largest, **QUIET)
    expected = alone(lm, given, MIXED, queries=queries)
    assert_same(found.load(), expected)
    shifted = expected["entropy"].roll(example=1).to_numpy()
    assert np.nanmax(np.abs(shifted - expected["entropy"].to_numpy())) > 1e-2  # a mix-up would be seen
    assert len(list(tmp_path.glob("part-*"))) >= 24 // largest and not is_attached(lm)


def test_the_record_on_disk_is_what_was_returned_and_says_where_it_came_from(lm, tmp_path):
    given = prompts(7)
    found = sweep(lm, given, MIXED, out=tmp_path, largest=2, **QUIET).load()
    xr.testing.assert_identical(load_record(tmp_path), found)
    made = json.loads(found.attrs["headscope"])
    assert made["model"]["architecture"] == "LlamaForCausalLM" and made["prompts"] == 7
    assert found["token"][3].to_numpy()[: len(given[3])].tolist() == given[3]
    numbers = [int(i) for part in each_part(tmp_path) for i in part["example"]]
    assert sorted(numbers) == list(range(7)) and numbers != sorted(numbers)
    for part in each_part(tmp_path):
        assert part.sizes["query"] == max(len(given[int(i)]) for i in part["example"])
    with pytest.raises(HeadscopeError, match="written by a sweep"):
        append_record(found, tmp_path)


def test_spans_and_targets_of_each_prompt_follow_it_into_its_batch(lm, tmp_path):
    given = prompts()
    table = torch.randint(0, 3, (len(given), 40), generator=torch.Generator().manual_seed(1))
    spans = [[(0, 1 + i % 3)] if i % 2 else [(0, 1), (2, 3)] for i in range(len(given))]

    def statistics(i: int | None = None) -> list:
        row = slice(None) if i is None else slice(i, i + 1)
        span = SpanMass({"own": spans[row], "shared": (1, 3)})
        return [span, TargetMass({"own": table[row], "shared": table[:1], "previous": lambda q: q - 1})]

    found = sweep(lm, given, statistics(), out=tmp_path, **QUIET)
    assert_same(found.load(), alone(lm, given, statistics))


def test_the_stream_of_every_prompt(lm, tmp_path):
    given, statistics = prompts(6), [Resid("mlp_out", (0, -1)), Entropy()]
    found = sweep(lm, given, statistics, out=tmp_path, **QUIET)
    assert_same(found.load(), alone(lm, given, statistics))


def test_a_target_function_that_knows_its_prompts_is_refused(lm, tmp_path):
    given, table = prompts(6), torch.zeros(6, 40, dtype=torch.long)
    knowing = TargetMass({"own": lambda q: table.gather(1, q.clamp(0, 39).expand(6, -1))})
    with pytest.raises(HeadscopeError, match="knows no prompt"):
        sweep(lm, given, [knowing], out=tmp_path, largest=6, **QUIET)


@pytest.mark.parametrize(
    ("statistics", "options", "says"),
    [
        ([SpanMass({"a": [(0, 1)] * 5})], {}, "'a' is given for 5 prompts, but there are 6"),
        ([TargetMass({"t": torch.zeros(2, 9, dtype=torch.long)})], {}, "'t' is given for 2 prompts"),
        ([HeadOutput((3,))], {}, "prompt 2 has 3 tokens and no position 3"),
        ([HeadOutput((-4,))], {}, "no position -4"),
        ([Entropy()], {"queries": Generated()}, "keeps no query of prompt 2"),
        ([Entropy()], {"layers": [0, 5]}, "layer 5 does not exist"),
        ([Entropy()], {"memory": "lots"}, "is no size"),
        ([Entropy()], {"memory": "10KB"}, "prompt 1 has 30 tokens and takes about"),
        ([], {}, "at least one statistic"),
        ([Entropy(), Entropy()], {}, "same variable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_refused_before_anything_runs(lm, tmp_path, statistics, options, says):
    given = [[5] * length for length in (10, 30, 3, 12, 30, 20)]
    with pytest.raises(HeadscopeError, match=says):
        sweep(lm, given, statistics, out=tmp_path / "run", **options, **QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no prompt"),
        ([[5], []], "prompt 1 is empty"),
        ([[5], 7], "prompt 1 is int"),
        ([[5], [1.5]], "prompt 1 is list"),
        ([{"label": 3}], "prompt 0 is NoneType"),
        ([[5], [10**6]], "prompt 1 has token ids outside the vocabulary"),
        ([[5], [-1]], "outside the vocabulary"),
        (["text"], "without a tokenizer"),
        ([[5] * 10_000], "more than the context"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_prompts_are_named_by_number(lm, tmp_path, given, says):
    with pytest.raises(HeadscopeError, match=says):
        sweep(lm, given, [Entropy()], out=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_prompts_come_as_lists_arrays_tensors_and_rows(lm):
    ids = [[5, 6, 7], [8, 9, 10]]
    forms = [ids, tuple(map(tuple, ids)), np.array(ids), torch.tensor(ids), [torch.tensor(i) for i in ids]]
    forms += [[{"input_ids": i, "text": "other"} for i in ids], (i for i in ids), dict(enumerate(ids)).values()]
    assert {Prompts(lm, form).sha256 for form in forms} == {Prompts(lm, ids).sha256}
    other = Prompts(lm, [[5, 6], [7, 8, 9, 10]])
    assert other.sha256 != Prompts(lm, ids).sha256  # boundaries count
    inputs = other.batch([1, 0])
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs["input_ids"][0].tolist() == [7, 8, 9, 10] and inputs["input_ids"][1, :2].tolist() == [5, 6]


def test_batches_are_like_lengths_within_the_budget(lm):
    draw = random.Random(0)
    lengths = {i: draw.randrange(1, 400) for i in range(300)}
    cost = Cost(lm, MIXED, None, None)
    memory = cost(2, 400)
    made = Budget(cost, memory, largest=5).batches(lengths)
    assert sorted(i for batch in made for i in batch.examples) == list(range(300))
    assert made == Budget(cost, memory, largest=5).batches(dict(reversed(lengths.items())))
    for batch in made:
        mine = [lengths[i] for i in batch.examples]
        assert batch.width == max(mine) and len(mine) <= 5 and cost(len(mine), batch.width) <= memory
        assert batch.width - min(mine) <= max(batch.width // 8, 8)
    assert [batch.width for batch in made] == sorted((batch.width for batch in made), reverse=True)
    assert any(len(batch.examples) == 5 for batch in made) and len({len(b.examples) for b in made}) > 2
    equal = Budget(cost, memory, padding=False).batches(lengths)
    assert all(len({lengths[i] for i in batch.examples}) == 1 for batch in equal)


def test_what_is_not_exact_under_padding_runs_without(lm, tmp_path):
    given = prompts(12, 8)
    statistics = [KeyMass(queries=(1, 3))]  # refused where examples are padded
    found = sweep(lm, given, statistics, out=tmp_path, **QUIET)
    assert_same(found.load(), alone(lm, given, statistics))
    assert len(list(tmp_path.glob("part-*"))) == len({len(ids) for ids in given})


def test_rows_of_a_prompt_alone():
    assert list(rows_alone(None, 5)) == [0, 1, 2, 3, 4] and rows_alone(Last(2), 5) == [3, 4]
    assert rows_alone(Every(2), 5) == [0, 2, 4] and rows_alone(Generated(), 5) == []


@pytest.mark.slow
def test_texts_are_the_tokens_that_the_model_is_called_with(smollm2):
    texts = ["The capital of France is", "Attention", "heads move information. " * 9]
    given = Prompts(smollm2, [{"text": text} for text in texts])
    inputs, expected = given.batch([0, 1, 2]), smollm2.encode(texts)
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"]) and given.sha256 == Prompts(smollm2, texts).sha256
    with pytest.raises(HeadscopeError, match="prompt 1 is empty"):
        Prompts(smollm2, ["text", ""])


@pytest.mark.parametrize(
    ("memory", "size"), [("2GiB", 2 << 30), ("1.5 gb", 1_500_000_000), (77, 77), ("512KiB", 1 << 19), ("9B", 9)]
)
def test_sizes(memory, size):
    assert bytes_of(memory) == size


def test_a_dry_run_says_batches_and_memory_and_writes_nothing(lm, tmp_path):
    given = prompts()
    with dry_run() as work:
        sweep(lm, given, MIXED, out=tmp_path / "run", largest=5)
    found = estimate(lm, work)
    assert found["prompts"] == 24 and found["tokens"] == sum(map(len, given)) and not (tmp_path / "run").exists()
    sweep(lm, given, MIXED, out=tmp_path / "run", largest=5, **QUIET)
    assert found["forward_passes"] == len(list((tmp_path / "run").glob("part-*")))
    weights = lm.info.parameters * 4
    assert work.memory is not None and found["memory_mib"] == round((weights + work.memory) / 2**20)


def count_passes(lm, monkeypatch) -> list[int]:
    """Examples of each forward pass of the model, as they run."""
    seen: list[int] = []
    real = pieces.Piece.trace

    def counted(piece, lm):
        part = real(piece, lm)
        seen.append(len(piece.batch.examples))
        return part

    monkeypatch.setattr(pieces.Piece, "trace", counted)
    return seen


def test_an_interrupted_sweep_continues_also_with_other_batches(lm, tmp_path, monkeypatch):
    given, seen = prompts(), count_passes(lm, monkeypatch)
    whole = sweep(lm, given, MIXED, out=tmp_path / "whole", largest=4, **QUIET).load()
    real, written = pieces.write_part, []

    def interrupted(part, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.extend(part["example"].to_numpy()[:1])
        real(part, *args)

    monkeypatch.setattr(pieces, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(lm, given, MIXED, out=tmp_path / "run", largest=4, **QUIET)
    assert not is_attached(lm) and len(list((tmp_path / "run").glob("part-*"))) == 3
    with pytest.raises(HeadscopeError, match="not finished"):
        load_record(tmp_path / "run")
    monkeypatch.setattr(pieces, "write_part", real)
    (tmp_path / "run" / ".part-00000000.zarr.dead").mkdir()  # what a kill in the middle of a part leaves
    parts = [xr.open_zarr(part, consolidated=False) for part in (tmp_path / "run").glob("part-*")]
    done = sum(part.sizes["example"] for part in parts)
    seen.clear()
    again = sweep(lm, given, MIXED, out=tmp_path / "run", largest=7, memory="3MiB", **QUIET)
    assert sum(seen) == 24 - done and done == 12
    assert_same(again.load(), whole)
    seen.clear()
    xr.testing.assert_identical(sweep(lm, given, MIXED, out=tmp_path / "run", **QUIET).load(), again.load())
    assert seen == [] and not list((tmp_path / "run").glob(".*"))


def test_a_batch_that_fails_leaves_the_one_before_it_finished(lm, tmp_path, monkeypatch):
    real, traced, kept = pieces.Piece.trace, [], []

    def fails(self, model):
        traced.append(self.name)
        if len(traced) == 3:
            raise HeadscopeError("out of memory")
        return real(self, model)

    monkeypatch.setattr(pieces.Piece, "trace", fails)
    keep = run.Store.keep
    monkeypatch.setattr(run.Store, "keep", lambda self, name: (kept.append(name), keep(self, name))[1])
    with pytest.raises(HeadscopeError, match="out of memory"):
        sweep(lm, prompts(), MIXED, out=tmp_path, largest=4, **QUIET)
    assert [name for name in kept if name.startswith("part")] == traced[:2]
    assert sorted(path.name for path in tmp_path.glob("part-*")) == sorted(traced[:2])


def test_a_batch_that_cannot_be_made_leaves_the_one_before_it_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "write_part", lambda part, out, name: (out / name).write_text(part))

    class Made:
        name = "part-0"

        def trace(self, _):
            return "all of it"

    def coming():
        yield Made()
        raise HeadscopeError("no second one")

    named = []
    with pytest.raises(HeadscopeError, match="no second one"):
        for name in pieces.written(None, coming(), tmp_path, write=True):
            named.append(name)
    assert named == ["part-0"] and (tmp_path / "part-0").read_text() == "all of it"


def test_other_settings_do_not_continue_a_sweep(lm, tmp_path):
    given = prompts(4)
    spans = SpanMass({"a": (0, 2)})
    first = sweep(lm, given, [spans, Entropy()], out=tmp_path, **QUIET).load()
    other = LanguageModel.wrap(tiny_model("llama", seed=1), name=lm.name)
    changes = [
        (lm, [*given, [5, 6]], [spans, Entropy()], {}, "prompts"),
        (lm, given[::-1], [spans, Entropy()], {}, "prompts"),
        (lm, given, [SpanMass({"a": (0, 3)}), Entropy()], {}, "statistics"),
        (lm, given, [spans, Entropy()], {"queries": Last(1)}, "queries"),
        (lm, given, [spans, Entropy()], {"layers": [1]}, "layers"),
        (other, given, [spans, Entropy()], {}, "weights"),
    ]
    for model, texts, statistics, options, what in changes:
        with pytest.raises(HeadscopeError, match=rf"other settings \({what}\)"):
            sweep(model, texts, statistics, out=tmp_path, **options, **QUIET)
    with apply(lm, AblateHeads([(0, 0)])), pytest.raises(HeadscopeError, match=r"other settings \(interventions\)"):
        sweep(lm, given, [spans, Entropy()], out=tmp_path, **QUIET)
    xr.testing.assert_identical(sweep(lm, given, [spans, Entropy()], out=tmp_path, **QUIET).load(), first)


def test_functions_are_told_apart_by_what_they_do(lm, tmp_path):
    given = prompts(3)

    def back(n: int):
        return [TargetMass({"t": lambda q: q - n})]

    sweep(lm, given, back(1), out=tmp_path, **QUIET)
    sweep(lm, given, back(1), out=tmp_path, **QUIET)  # another function object, the same function
    with pytest.raises(HeadscopeError, match=r"other settings \(statistics\)"):
        sweep(lm, given, back(2), out=tmp_path, **QUIET)


def test_an_edited_model_is_swept_as_it_is(lm, tmp_path):
    given, edit = prompts(5), AblateHeads([(0, 1)])
    with apply(lm, edit):
        found = sweep(lm, given, [Entropy()], out=tmp_path / "edited", **QUIET).load()
        expected = alone(lm, given, [Entropy()])
    assert_same(found, expected)
    plain = sweep(lm, given, [Entropy()], out=tmp_path / "plain", **QUIET).load()
    assert float(np.abs(plain["entropy"] - found["entropy"])[:, 1].max()) > 1e-3  # layer 1 sees the edit of layer 0


def test_folders_of_others_and_of_running_sweeps_are_left_alone(lm, tmp_path):
    with trace(lm, [Entropy()]) as tracer:
        lm.model(torch.tensor([[5, 6, 7]]))
    append_record(tracer.record, tmp_path / "own")
    with pytest.raises(HeadscopeError, match="not a sweep's"):
        sweep(lm, prompts(3), [Entropy()], out=tmp_path / "own", **QUIET)
    with run.locked(tmp_path / "busy" / "sweep.json"):
        with pytest.raises(HeadscopeError, match="another process"):
            sweep(lm, prompts(3), [Entropy()], out=tmp_path / "busy", **QUIET)


def test_what_has_two_texts_is_refused(tmp_path):
    with pytest.raises(HeadscopeError, match="encoder and a decoder"):
        sweep(tiny_model("t5", "encoder-decoder"), prompts(2), [Entropy()], out=tmp_path / "run", **QUIET)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "qwen2_moe"])
def test_other_architectures(tmp_path, kind):
    lm, given = LanguageModel.wrap(tiny_model(kind)), prompts(10, 24)
    found = sweep(lm, given, MIXED, out=tmp_path, largest=4, **QUIET)
    assert_same(found.load(), alone(lm, given, MIXED))


def test_an_encoder(tmp_path):
    lm, given = LanguageModel.wrap(tiny_model("bert", "encoder")), prompts(10, 24)
    statistics = [Entropy(), KeyMass()]
    found = sweep(lm, given, statistics, out=tmp_path, largest=4, **QUIET).load()
    parts = []
    for ids in given:
        with trace(lm, statistics) as tracer:
            lm.model(torch.tensor([ids]))
        parts.append(tracer.record)
    assert_same(found, concatenate(parts))


WORKER = """
import random, sys
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, SinkMass, TopKeys
from headscope.interp.sweeps import sweep

draw = random.Random(0)
given = [[draw.randrange(4, 100) for _ in range(draw.randrange(3, 41))] for _ in range(24)]
statistics = [Entropy(), SinkMass(2), TopKeys(2), KeyMass(), HeadOutput((0, -1))]
if len(sys.argv) > 2:
    import os
    given[0][0] += int(os.environ.get("RANK", 0)) * (sys.argv[2] == "different")
record = sweep(tiny_model("llama"), given, statistics, out=sys.argv[1], largest=3, progress=False)
sys.stdout.write(f"examples {record.sizes['example']}\\n")  # one write: the processes share a pipe
"""


def launch(tmp_path: Path, out: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run WORKER under torchrun: ``processes`` of them, gloo, on the CPU."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(script), str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_make_the_record_of_one_and_one_finishes_what_they_began(lm, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    expected = sweep(lm, prompts(), MIXED, out=one, largest=3, **QUIET).load()
    done = launch(tmp_path, two)
    assert done.returncode == 0 and done.stdout.count("examples 24") == 2, done.stderr
    whole = load_record(two)
    assert_same(whole, expected, bound=1e-6)  # the same batches: integers and positions bit by bit
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for part in sorted(two.glob("part-*"))[::2]:
        part.rename(tmp_path / part.name)
    (two / "record.json").unlink()
    assert_same(sweep(lm, prompts(), MIXED, out=two, largest=5, **QUIET).load(), whole)


@pytest.mark.slow
def test_processes_that_do_not_belong_together_are_told(tmp_path):
    done = launch(tmp_path, tmp_path / "run", "different")
    assert done.returncode != 0 and "were given different prompts" in done.stderr
    assert not list((tmp_path / "run").glob("part-*"))


@pytest.mark.slow
def test_accelerate_launches_the_command_line(tmp_path):
    """On a machine without GPU ``accelerate launch`` starts several processes only with ``--multi_gpu``."""
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    lines = [json.dumps({"input_ids": ids}) for ids in prompts(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "headscope.interp.cli", "trace", str(tmp_path / "prompts.jsonl"), "--model", str(model)]
    command += ["--statistics", "entropy,top_keys", "--out", str(tmp_path / "run"), "--json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = {row["statistic"]: row["mean"] for row in json.loads(done.stdout)["statistics"]}  # printed once
    record = open_record(tmp_path / "run").load()
    assert record.sizes["example"] == 9
    assert shown["entropy"] == pytest.approx(float(record["entropy"].mean(dtype="float64")))


MEMORY = """
import sys, threading, time
from headscope.interp import load_model
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass
from headscope.interp.sweeps import sweep

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

lm = load_model("smollm2-135m")
statistics = [LogSumExp(), Entropy(), SinkMass(), Distance(), KeyMass()]
sweep(lm, [[1] * 64], statistics, out=sys.argv[1] + "/warm", progress=False)
before = peak = resident()
stop = False

def watch():
    global peak
    while not stop:
        peak = max(peak, resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
lengths = [600, 590, *[128] * 20]
given = [[1 + i] * n for i, n in enumerate(lengths)]
sweep(lm, given, statistics, out=sys.argv[1] + "/run", memory="250MiB", progress=False)
stop = True
thread.join()
print((peak - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_the_estimate_is_above_what_a_sweep_takes(smollm2, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    taken = float(done.stdout.split()[-1])
    assert 50 < taken < 250, f"{taken:.0f} MiB of a budget of 250"
