"""On a GPU: what nobody reads runs as it ran before, to the bit; what is read is what dense float64 gives.

    python interp/benchmarks/card.py --out interp/benchmarks/results

``untouched``: logits of a forward pass, and greedy tokens with their logits, with a dynamic and a static cache, with
left padding and without, beside the same under ``trace(layers=[])``. ``replayed``: the text and the row statistics of
generated tokens over a static cache whose steps are CUDA graphs, beside the same from Python. ``read``: row and column
statistics of tiny random models of many types in float32, against eager weights of an untouched copy, sums in float64.
Models are random, with weights large enough that attention is far from uniform; "real size" is SmolLM2-135M's. Exits
with 1 if anything differs (``read``: by more than ``BOUND``). No model hub.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp import tiny_model, trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import Entropy, KeyMass, LogSumExp, SinkMass
from headscope.interp.tracing import step_graphs

TYPES = ("llama", "gpt2", "gemma2", "gemma3_text", "mistral", "qwen3", "gpt_oss", "phi3", "gpt_neox", "olmo2")
STATISTICS = (Entropy(), SinkMass(2), KeyMass())
BOUND = 1e-4  # 24 weights, each an exponential of a score below 32: 24 x 32 roundings of 2^-24; a wrong mask: 0.1


def real_size(dtype: torch.dtype) -> Any:
    """A random model of SmolLM2-135M's sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, initializer_range=0.06,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", dtype).eval()


def runs(model: Any, length: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What is compared to the bit, by name: a tensor each."""
    torch.manual_seed(1)
    high = model.config.get_text_config().vocab_size
    one, two = torch.randint(5, high, (1, length), device="cuda"), torch.randint(5, high, (2, length), device="cuda")
    padded = torch.ones_like(two)
    padded[0, : length // 4] = 0

    def greedy(ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        logits = torch.stack(made.logits, 1).float()
        return torch.cat([logits.flatten(), made.sequences.flatten().float()])

    yield "forward", lambda: model(input_ids=one, use_cache=False).logits
    yield "forward, left padding", lambda: model(input_ids=two, attention_mask=padded).logits
    yield "greedy", lambda: greedy(one, torch.ones_like(one))
    yield "greedy, left padding", lambda: greedy(two, padded)
    yield "greedy, static cache", lambda: greedy(one, torch.ones_like(one), cache_implementation="static")


def untouched(name: str, model: Any, length: int) -> list[dict[str, Any]]:
    """Every run beside itself and beside the run inside a block that reads nothing: the largest differences."""
    found = []
    with torch.no_grad():
        for what, run in runs(model, length):
            plain, again = run(), run()
            with trace(model, STATISTICS, layers=[]):
                inside = run()
            row = {"model": name, "run": what, "twice": largest(plain, again), "inside": largest(plain, inside)}
            found.append(row)
            print(row, flush=True)
    return found


def replayed(name: str, model: Any, length: int) -> list[dict[str, Any]]:
    """Traced generation with steps as graphs and without: how many were replayed, and the largest differences."""
    torch.manual_seed(2)
    ids = torch.randint(5, model.config.get_text_config().vocab_size, (2, length), device="cuda")
    found = []
    for what, padding in (("whole", 0), ("left padding", length // 4)):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        (text, rows, count), (expected, wanted, none) = (steps(model, ids, mask, on) for on in (True, False))
        row: dict[str, Any] = {"model": name, "run": what, "replays": count, "without": none}
        row |= {"text": largest(text, expected), "statistics": largest(rows, wanted)}
        found.append(row)
        print(row, flush=True)
    return found


def steps(model: Any, ids: Tensor, mask: Tensor, on: bool) -> tuple[Tensor, Tensor, int]:
    """Two traced generations: their tokens, their rows (NaN as -1), and how many steps a graph ran."""
    count, graph_of = [0], step_graphs.graph_of

    def counted(run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        found, replay = graph_of(run, device)

        def again() -> None:
            count[0] += 1
            replay()

        return found, again

    devices = step_graphs.DEVICES if on else ()
    with patch.object(step_graphs, "graph_of", counted), patch.object(step_graphs, "DEVICES", devices):
        with trace(model, (LogSumExp(), Entropy(), SinkMass(2))) as tracer:
            texts = [
                model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False,
                    pad_token_id=0, cache_implementation="static",
                )
                for _ in range(2)
            ]  # fmt: skip
        rows = [tracer.record[name].to_numpy() for name in ("logsumexp", "entropy", "sink_mass")]
    return torch.cat(texts), torch.stack([torch.tensor(x) for x in rows]).nan_to_num(-1.0), count[0]


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where the shapes differ."""
    return float((a.float() - b.float()).abs().max()) if a.shape == b.shape else float("inf")


def read(kind: str) -> dict[str, Any]:
    """Statistics of a tiny model on the card against dense float64."""
    model = tiny_model(kind).to("cuda")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0)).to("cuda")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        with trace(model, STATISTICS) as tracer:
            model(input_ids=ids, attention_mask=mask)
        maps = torch.stack(eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions, 1).double()
    errors = dict.fromkeys(("entropy", "sink_mass", "key_mass"), 0.0)
    for example, start in enumerate((5, 0)):
        p, record = maps[example, :, :, start:, start:].cpu(), tracer.record.isel(example=example)
        wanted = {"entropy": torch.special.entr(p).sum(-1), "sink_mass": p[..., :2].sum(-1), "key_mass": p.sum(-2)}
        for name, right in wanted.items():
            got = torch.tensor(record[name].to_numpy())[..., : 24 - start].double()
            errors[name] = max(errors[name], largest(got, right))
    return {"type": kind, **errors}


def untouched_of_all() -> list[dict[str, Any]]:
    """``untouched`` of every model."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += untouched(f"real size, {str(dtype).removeprefix('torch.')}", real_size(dtype), 300)
    return rows + [row for kind in ("gemma3_text", "gpt2") for row in untouched(kind, tiny_model(kind).to("cuda"), 36)]


def replayed_of_all() -> list[dict[str, Any]]:
    """``replayed`` of every model."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        rows += replayed(f"real size, {str(dtype).removeprefix('torch.')}", real_size(dtype), 300)
    return rows + [row for kind in ("qwen3", "gpt_neox") for row in replayed(kind, tiny_model(kind).to("cuda"), 36)]


def read_of_all() -> list[dict[str, Any]]:
    """``read`` of every type, or why it is refused."""
    rows = []
    for kind in TYPES:
        try:
            rows.append(read(kind))
        except HeadscopeError as error:
            rows.append({"type": kind, "refused": str(error)})
        print(rows[-1], flush=True)
    return rows


PARTS: dict[str, tuple[Callable[[], list[dict[str, Any]]], Callable[[dict[str, Any]], bool]]] = {  # and what is wrong
    "untouched": (untouched_of_all, lambda row: row["inside"] > row["twice"]),
    "replayed": (replayed_of_all, lambda row: bool(row["text"] or row["statistics"] or not row["replays"])),
    "read": (read_of_all, lambda row: any(isinstance(x, float) and not x <= BOUND for x in row.values())),
}


def main() -> int:
    """Run what is asked for; say and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    made: dict[str, Any] = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    bad = 0
    for name in args.parts:
        run, is_wrong = PARTS[name]
        rows = made[name] = run()
        wrong = [row for row in rows if is_wrong(row)]
        print(f"{name}: {len(wrong)} of {len(rows)} wrong", *wrong, sep="\n", flush=True)
        bad += len(wrong)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        what = "models" if args.parts == list(PARTS) else "-".join(args.parts)
        place = args.out / f"{device.lower().replace(' ', '-')}-{what}.json"
        place.write_text(json.dumps(made, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
