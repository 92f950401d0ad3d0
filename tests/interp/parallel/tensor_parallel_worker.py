"""One process of ``test_tensor_parallel``: what it finds on its shard beside the whole model, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig

from headscope.interp import trace
from headscope.interp.statistics import (
    Distance,
    Entropy,
    HeadOutput,
    KeyMass,
    KeyNorm,
    LogSumExp,
    SinkMass,
    TopKeys,
)
from headscope.interventions import AblateHeads, apply

STATISTICS = [Entropy(), LogSumExp(), SinkMass(2), Distance(), TopKeys(2), KeyMass(), KeyNorm(), HeadOutput((0, -1))]
IDS = torch.randint(4, 100, (2, 24), generator=torch.Generator().manual_seed(0))


def run(model, *edits):
    with apply(model, *edits), trace(model, STATISTICS) as tracer:
        logits = model(input_ids=IDS, use_cache=False).logits
    return tracer.record, logits


folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
one = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
split = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(tp_size=2)).eval()
found: dict[str, object] = {}
for name, edits in {"plain": (), "ablated": (AblateHeads([(0, 3)]),), "both": (AblateHeads([(0, 3), (1, 6)]),)}.items():
    (theirs, whole), (ours, logits) = run(one, *edits), run(split, *edits)
    apart = {each: float(abs(ours[each] - theirs[each]).max()) for each in theirs.data_vars if each != "top_keys"}
    found[name] = {**apart, "logits": float((logits - whole).abs().max())}
    found[name] |= {"heads": ours.sizes["head"], "top_keys": float((ours["top_keys"] == theirs["top_keys"]).mean())}
    found[f"{name} logits"] = float(whole.abs().sum())
(folder / f"rank{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
