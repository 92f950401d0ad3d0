"""Two gloo processes on the CPU, one launch for all tests: tensor and context parallelism beside one process.

Both compute what one process computes, and add up in another order. Sums of at most 128 products of order 1 in float32,
through two layers, leave 1e-5 in a record, and 1e-5 of the largest logit, about 20 (see test_ablate.py). Another head's
number, or a head that was left alone, differs by 1e-2 and more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp import tiny_model
from headscope.interp.attention.whole import Shares
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.context_parallel import _last_of, _sizes, context_parallel

BOUND = {"record": 1e-5, "logits": 2e-4}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_model("llama", num_attention_heads=8, num_key_value_heads=4).save_pretrained(folder / "llama")
    tiny_model("llama", num_attention_heads=8, num_key_value_heads=1).save_pretrained(folder / "one-key-head")
    tiny_model("qwen3_moe").save_pretrained(folder / "experts")
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, head_dim=8, max_position_embeddings=128, vocab_size=64)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder / "edited")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = str(Path(__file__).with_name("worker.py"))
    done = subprocess.run(
        [*launcher, worker, str(folder)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def alike(differences: dict[str, float]) -> bool:
    return all(differences[name] < bound for name, bound in BOUND.items())


@pytest.mark.parametrize("name", ["plain", "one", "both"])
def test_heads_over_processes_make_one_record_and_are_edited_by_their_own_numbers(found: Any, name: str) -> None:
    for each in found:
        heads = each["heads"]
        assert alike(heads[name]) and heads[f"{name} heads"] == 8
        assert name == "plain" or heads[f"{name} effect"] > 0.01  # an ablation of other heads would show


def test_generation_and_sweeps_under_tensor_parallelism(found: Any) -> None:
    for each in found:
        heads = each["heads"]
        assert alike(heads["generated"]) and heads["swept"] < 1e-5 and heads["swept parts"] > 0
        assert heads["fingerprints"] and heads["shared key head"] < 1e-6


def test_what_tensor_parallelism_does_not_do_is_refused(found: Any) -> None:
    for each in found:
        heads = each["heads"]
        assert "gradients of a model under tensor parallelism" in heads["gradients"]
        assert "split over processes" in heads["weights"] and "other neurons" in heads["neurons"]
        assert "transformers splits and cannot run" in heads["bitsandbytes"]
        assert "different texts" in heads["texts"]
        assert "L0H8" in heads["head 8"] and "1 key/value heads" in heads["one key head"]


def test_quantised_heads_over_processes_make_one_record(found: Any) -> None:
    if found[0]["quantised"] is None:
        pytest.skip("torchao is not installed")
    for each in (one["quantised"] for one in found):
        assert each["form"] == "Int8Tensor" and alike(each["plain"]) and alike(each["edited"])
        assert each["swept"] < 1e-5 and "split over processes" in each["leaf"]


def test_one_text_over_processes_makes_the_record_of_one(found: Any) -> None:
    for each in found:
        rows = {name: value for name, value in each["rows"].items() if isinstance(value, dict)}
        assert len(rows) == 8 and all(map(alike, rows.values())), rows
        whole = [each["rows"][name] for name in ("llama last", "gemma3_text last", "tuple", "own")]
        assert max(whole) < BOUND["logits"]
        assert each["rows"]["after"] == 0.0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("padding", "without padding"),
        ("texts", "different texts"),
        ("cache", "whose cache would be in parts"),
        ("stream", "for its own tokens alone"),
        ("twice", "already"),
        ("recurrent", "something beside softmax attention mixes its tokens"),
        ("mixing", "something beside softmax attention mixes its tokens"),
        ("positions", "different texts, positions"),
        ("packed", "go up by one"),
        ("mask", "without a ready-made mask"),
        ("kept", "a number of last tokens"),
        ("numbers kept", "different texts, positions or options"),
        ("gradients", "not taken inside context_parallel"),
        ("hidden", "config.output_hidden_states"),
        ("traced", "enter context_parallel first"),
        ("rotary", "'dynamic' rotary embeddings"),
    ],
)
def test_what_context_parallelism_does_not_do_is_refused(found: Any, name: str, why: str) -> None:
    assert all(why in each["rows"][name] for each in found), found[0]["rows"][name]


def test_every_edit_changes_over_processes_what_it_changes_in_one_or_is_refused(found: Any) -> None:
    refused: dict[str, set[str]] = {"heads": set(), "rows": set()}
    for each in found:
        for name, seen in each["edits"].items():
            assert seen["effect"] > 0.1, name
            for kind in ("heads", "rows"):
                if isinstance(seen[kind], str):
                    refused[kind].add(name.split()[0])
                else:
                    assert alike(seen[kind]), (name, kind, seen)
    assert refused["heads"] == {"edit_value_vectors"}  # neurons
    assert refused["rows"] == {"edit_value_vectors", "redistribute_sinks", "scale_image_sinks"}  # they read the stream


def test_sharded_weights_and_experts_over_processes_change_nothing(found: Any) -> None:
    """FSDP2 puts weights together before a layer runs, so that the sums are the same ones."""
    for each in found:
        sharded = each["sharded"]
        assert alike(sharded["fsdp"]) and alike(sharded["experts"])
        assert sharded["gradients"] < 1e-6 < 1e-2 < sharded["slope"]


def test_the_check_of_a_shared_card_passes_and_sees_columns_that_nobody_added(found: Any) -> None:
    assert found[0]["card"]["written"] == 1
    for each in (one["card"] for one in found):
        right = each["right"]
        assert right["beyond"] == [] and right["processes"] == 2
        for dtype in ("float32", "bfloat16"):
            assert all(len(right[dtype][how]) == 7 for how in ("same calls", "two passes"))
        assert {"float32, same calls: sum", "bfloat16, two passes: key_mass"} <= set(each["beyond"])
        assert all("sum" in one or "key_mass" in one for one in each["beyond"])


def test_one_process_is_told_to_start_several() -> None:
    with pytest.raises(HeadscopeError, match="torchrun"):
        with context_parallel(tiny_model("llama")):
            pass


def test_shares_say_which_places_a_process_holds() -> None:
    whole = torch.arange(11)
    shares = Shares.paired((3, 3, 3, 2))
    parts = [shares.of(whole, 0, rank) for rank in range(2)]
    assert parts[0].tolist() == [0, 1, 2, 9, 10] and parts[1].tolist() == [3, 4, 5, 6, 7, 8]
    assert shares.sizes == (5, 6) and shares.count == 11
    assert shares.together(parts, 0).equal(whole)
    few = Shares.paired((0, 0, 1, 2))  # the last three rows: the first process holds two of them
    assert few.together([torch.tensor([9, 10]), torch.tensor([8])], 0).tolist() == [8, 9, 10]


def test_runs_of_tokens() -> None:
    assert _sizes(11, 3) == (4, 4, 3) and _sizes(9, 3) == (3, 3, 3)
    assert _last_of((4, 4, 3), 5) == (0, 2, 3) and _last_of((4, 4, 3), 99) == (4, 4, 3)
