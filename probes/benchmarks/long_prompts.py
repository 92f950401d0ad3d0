"""Memory of patching at long prompts: what each method adds to the peak of the same on a prompt of 32 tokens.

Run: python probes/benchmarks/long_prompts.py --out probes/benchmarks/results/long_prompts.json

Each method runs in a process of its own, on one pair and a random model of little width, so that a map of one head
would show; the peak is the process's resident memory (ru_maxrss), which sees what torch holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # gradient checkpointing imports it, some 150 MiB that are no matter of length
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.provenance import versions
from headscope.probes import (
    Pairs,
    attention_knockout,
    attention_saliency,
    attribution_patching,
    edge_attribution,
    patch_heads,
    path_patching,
)


def plain(lm: LanguageModel, pairs: Pairs) -> Any:
    """The model as it is, without anything of ours on it."""
    with torch.no_grad():
        return lm.model(input_ids=pairs.clean, use_cache=False, logits_to_keep=1)


QUIET: dict[str, Any] = {"progress": False, "normalize": False}
METHODS: dict[str, Callable[[LanguageModel, Pairs], Any]] = {
    "plain forward pass": plain,
    "activation patching": lambda lm, pairs: patch_heads(lm, pairs, heads=["L1H0"], together=1, **QUIET),
    "path patching": lambda lm, pairs: path_patching(lm, pairs, "L1H0.q", together=1, **QUIET),
    "attribution patching": lambda lm, pairs: attribution_patching(lm, pairs, **QUIET),
    "attribution patching of q, QK fix": lambda lm, pairs: attribution_patching(lm, pairs, "q", fix="qk", **QUIET),
    "attribution patching, dropout": lambda lm, pairs: attribution_patching(lm, pairs, dropout=True, **QUIET),
    "edge attribution": lambda lm, pairs: edge_attribution(lm, pairs, **QUIET),
    "attention knockout": lambda lm, pairs: attention_knockout(
        lm, pairs, (0, 16), window=1, relative=False, together=1, progress=False
    ),
    "saliency": lambda lm, pairs: attention_saliency(lm, {"input_ids": pairs.clean[:1]}, 7),
}
SOFTCAPPED = (
    "plain forward pass",
    "activation patching",
    "attribution patching",
)  # no library attends so: slow on a CPU


def model(kind: str, heads: int, length: int) -> LanguageModel:
    """Two layers of ``heads`` heads 16 wide."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16 * heads, intermediate_size=32, num_hidden_layers=2, head_dim=16,
                 num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length)  # fmt: skip
    made = CONFIG_MAPPING[kind](**sizes, pad_token_id=0, initializer_range=0.3)
    return LanguageModel.wrap(AutoModelForCausalLM.from_config(made).eval(), name=f"random {kind}")


def pair(length: int) -> Pairs:
    """One pair that differs in two tokens in the middle."""
    clean = torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[:, length // 2 : length // 2 + 2] = torch.tensor([3, 5])
    one = torch.tensor([7])
    return Pairs(clean, corrupt, torch.tensor([length]), one, one + 1, one * 0)


def peak() -> int:
    """The most bytes that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(names: list[str], kind: str, heads: int, length: int) -> dict[str, Any]:
    """In this process: what the methods, one after the other, add to the peak."""
    lm, pairs = model(kind, heads, length), pair(length)
    short = pair(32)
    for name in names:  # what verification and imports hold is no matter of length
        METHODS[name](lm, short)
    before, begin = peak(), time.perf_counter()
    for name in names:
        METHODS[name](lm, pairs)
    added = (peak() - before) / 2**20
    return {"added_mib": round(added, 1), "seconds": round(time.perf_counter() - begin, 2)}


def main() -> None:
    """Measure, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kind", default="llama")
    parser.add_argument("--here", help="these methods, a semicolon between them, in this process")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.here.split(";"), asked.kind, asked.heads, asked.length)))
        return
    found = {}
    for kind, names in (("llama", tuple(METHODS)), ("gemma2", SOFTCAPPED)):
        for name in names:
            command = [sys.executable, __file__, "--here", name, "--kind", kind]
            command += ["--length", str(asked.length), "--heads", str(asked.heads)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{name}, {kind}"] = json.loads(said.splitlines()[-1])
            print(name, kind, found[f"{name}, {kind}"], file=sys.stderr)
    made = {
        "length": asked.length,
        "heads": asked.heads,
        "layers": 2,
        "a_map_of_one_head_mib": asked.length**2 * 4 / 2**20,
        "device": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "versions": versions(),
    }
    text = json.dumps({**made, "methods": found}, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
