"""How tracing scales over GPUs: a model's heads, one text, or a data set shared out over processes.

    torchrun --nproc-per-node 8 -m headscope.interp.benchmarks.scale heads --shape 70b --tokens 131072 --out DIRECTORY
    torchrun --nproc-per-node 8 -m headscope.interp.benchmarks.scale text --shape 1b --tokens 2097152 --out DIRECTORY
    torchrun --nproc-per-node 8 -m headscope.interp.benchmarks.scale prompts --shape 1b --prompts 2000 --out DIRECTORY
    torchrun --nproc-per-node 2 -m headscope.interp.benchmarks.scale text --dry-run

Llamas of random weights, made in parts where they are held. ``heads``: tensor parallelism (``tp_size`` = the
processes), the row statistics of ``long_context``, untraced and traced in turns. ``text``: ``context_parallel``, whose
untraced pass is the same with nothing recorded. ``prompts``: a ``sweep``, prompts of 64 to 1,024 tokens. One process
(``--nproc-per-node 1``) is what the others are divided by; with ``--alone`` every process of several also runs the
pass by itself, on the same weights, and the records of both are compared. Every case runs a short text first, which
compiles and connects. ``--dry-run`` runs all of it on the CPU at a tiny size, and prints the sizes that the real run
would have. Process 0 writes ``{device}-scale-{what}-{shape}-{tokens or prompts}-{dtype}-{processes}.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import DistributedConfig, LlamaForCausalLM

from headscope.interp import context_parallel, sweep, trace
from headscope.interp.benchmarks.long_context import Clock, rows
from headscope.interp.benchmarks.shapes import SHAPES, Shape, estimate, random_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.statistics import Entropy, KeyMass, SinkMass
from headscope.interp.statistics.queries import Every
from headscope.kernels.benchmarks.pages import machine

VALUES = 7  # float32 numbers that ``rows`` keeps a query and head
SHORT = 8192  # tokens of the text that is run first
Block = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """A way to run the pass: in which model and within which blocks, the last of which may be a tracer's."""

    name: str
    model: LlamaForCausalLM
    blocks: tuple[Block, ...] = ()

    @contextmanager
    def entered(self) -> Iterator[Any]:
        """Within its blocks; what the last of them gives."""
        with ExitStack() as stack:
            given = [stack.enter_context(block()) for block in self.blocks]
            yield given[-1] if given else None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("heads", "text", "prompts"))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tokens", type=int, default=131072, help="of the text")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--every", type=int, default=16, help="record each n-th query of the text")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--columns", action="store_true", help="record key mass, too")
    parser.add_argument("--only-traced", action="store_true", help="no untraced pass")
    parser.add_argument("--alone", action="store_true", help="each process by itself, too, and compare")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="the same at a tiny size on the CPU")
    args = parser.parse_args(arguments)
    words = shlex.join(arguments if arguments is not None else sys.argv[1:])
    rank, size = _start(args.dry_run)
    result: dict[str, Any] = {"kind": "scale", "what": args.what, "shape": args.shape, "processes": size}
    result |= {"machine": machine(), "command": f"torchrun --nproc-per-node {size} -m {__spec__.name} {words}"}
    result |= {"GiB expected, each": expected(SHAPES[args.shape], args.what, args.tokens, size, args.every)}
    if rank == 0:
        print("GiB expected, each process:", result["GiB expected, each"], flush=True)
    if args.dry_run:
        args.shape, args.tokens, args.prompts, args.every, args.repeats = "tiny-8", 257, 12, 16, 1
    measure: dict[str, Callable[[Any], dict[str, Any]]] = {"heads": heads, "text": text, "prompts": prompts}
    result |= measure[args.what](args)
    if rank == 0:
        print(json.dumps(result, indent=1))
        if args.out and not args.dry_run:
            args.out.mkdir(parents=True, exist_ok=True)
            device = result["machine"]["device"].lower().replace(" ", "-")
            much = args.prompts if args.what == "prompts" else args.tokens
            name = f"{device}-scale-{args.what}-{args.shape}-{much}-{args.dtype}-{size}.json"
            (args.out / name).write_text(json.dumps(result, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def expected(shape: Shape, what: str, tokens: int, size: int, every: int) -> dict[str, float]:
    """GiB that one of ``size`` processes holds, by the sizes of what it keeps (no measurement)."""
    if what == "prompts":
        return {"weights": round(estimate(shape, 1024, 1024, VALUES)["weights"], 2)}
    whole = estimate(shape, tokens, tokens, VALUES, every)
    kv = 2 * 2 * tokens * shape.kv_heads * shape.d_head / 2**30  # one layer's keys and values, bfloat16
    if what == "heads":  # weights and the MLP's middle are split, the residual stream is whole everywhere
        widest = 2 * tokens * (4 * shape.intermediate / size + 2 * shape.hidden) / 2**30
        found = {"weights": whole["weights"] / size, "widest moment": widest, "keys": kv / size}
    else:
        found = {"weights": whole["weights"], "widest moment": whole["widest moment"] / size, "keys": kv}
    found["statistics, on the host"] = whole["statistics"]
    return {name: round(value, 2) for name, value in found.items()}


def heads(args: argparse.Namespace) -> dict[str, Any]:
    """Tensor parallelism over all processes: seconds and bytes of a pass, untraced and traced in turns."""
    whole = _whole(args) if _size() == 1 or args.alone else None
    split = whole if _size() == 1 else split_model(SHAPES[args.shape], args.tokens, getattr(torch, args.dtype), whole)
    assert split is not None
    return _run(args, whole if args.alone and _size() > 1 else None, split, ())


def text(args: argparse.Namespace) -> dict[str, Any]:
    """Context parallelism over all processes: seconds and bytes of a pass, untraced and traced in turns."""
    model = _whole(args)
    shared: tuple[Block, ...] = (lambda: context_parallel(model),) if _size() > 1 else ()
    return _run(args, model if args.alone and _size() > 1 else None, model, shared)


def _run(
    args: argparse.Namespace, alone: LlamaForCausalLM | None, model: LlamaForCausalLM, shared: tuple[Block, ...]
) -> dict[str, Any]:
    chosen = [*rows(args.tokens), *([KeyMass()] if args.columns else [])]
    cases = []
    together = "shared" if _size() > 1 else "alone"
    for name, each, blocks in (("alone", alone, ()), (together, model, shared)):
        if each is not None:
            traced = partial(trace, each, chosen, queries=Every(args.every))
            cases += [] if args.only_traced else [Case(f"{name}, untraced", each, blocks)]
            cases += [Case(f"{name}, traced", each, (*blocks, traced))]
    return _turns(cases, _ids(args), args.repeats)


def prompts(args: argparse.Namespace) -> dict[str, Any]:
    """A sweep over prompts of 64 to 1,024 tokens: seconds, and prompts a second."""
    model, draw = _whole(args), random.Random(0)
    shortest, longest = (64, 1024) if not args.dry_run else (8, 64)
    lengths = [draw.randrange(shortest, longest + 1) for _ in range(args.prompts)]
    given = [[draw.randrange(3, SHAPES[args.shape].vocabulary) for _ in range(length)] for length in lengths]
    folder = _of_all(tempfile.mkdtemp())[0]
    lm, few = LanguageModel.wrap(model), [Entropy(), SinkMass(4)]
    sweep(lm, given[:2], few, out=f"{folder}/warm", progress=False)
    with Clock(lm.device.type) as clock:
        sweep(lm, given, few, out=f"{folder}/run", memory="8GiB", progress=False)
    seconds = max(_of_all(clock.seconds))
    return {"prompts": len(given), "tokens": sum(lengths), "seconds": seconds, "prompts a second": len(given) / seconds}


def split_model(
    shape: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16, like: LlamaForCausalLM | None = None
) -> LlamaForCausalLM:
    """A Llama of which this process makes and holds its part alone, as transformers splits one: its weights are random,
    or those of ``like``."""
    config = DistributedConfig(tp_size=_size())
    config, _, mesh = LlamaForCausalLM.prepare_distribute_model(config)
    with torch.device("meta"):  # a tied output embedding would be two names of one tensor, which is split once
        model = LlamaForCausalLM(replace(shape, tied=False).config(tokens)).to(dtype).eval()
    model = LlamaForCausalLM.maybe_distribute_model(model, config, mesh)
    model.to_empty(device=_device())
    with _device():  # its frequencies are no parameters: ``to_empty`` lost them
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    torch.manual_seed(dist.get_rank())
    for name, weights in model.named_parameters():
        held = weights.to_local() if hasattr(weights, "to_local") else weights
        if like is not None:
            theirs = like.get_output_embeddings().weight if name == "lm_head.weight" else like.get_parameter(name)
            held.data.copy_(_part_of(theirs, weights))
        elif "norm" in name:
            torch.nn.init.ones_(held.data)
        else:
            torch.nn.init.normal_(held.data, std=model.config.initializer_range)
    return model


def _part_of(whole: torch.Tensor, split: torch.Tensor) -> torch.Tensor:
    if not isinstance(split, DTensor):
        return whole
    part: torch.Tensor = distribute_tensor(whole.detach(), split.device_mesh, split.placements).to_local()
    return part


@torch.no_grad()
def _turns(cases: Sequence[Case], ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {case.name: {"seconds": [], "peak bytes": 0} for case in cases}
    records: dict[str, Any] = {}
    for turn in range(repeats + 1):  # the first warms up
        for case in cases:
            given = ids if turn else ids[:, :SHORT]
            with case.entered() as tracer, Clock(ids.device.type) as clock:
                logits = case.model(input_ids=given, use_cache=False, logits_to_keep=1).logits
            assert bool(logits.isfinite().all())
            if turn:
                found[case.name]["seconds"].append(max(_of_all(clock.seconds)))
                found[case.name]["peak bytes"] = max(_of_all(clock.peak or 0), default=0)
            if turn and tracer is not None:
                records[case.name] = tracer.record
                found[case.name]["record"] = {str(dim): size for dim, size in tracer.record.sizes.items()}
    for each in found.values():
        each["median"] = statistics.median(each["seconds"])
    result = {"tokens": ids.shape[1], "dtype": str(cases[0].model.dtype), "cases": found}
    return result | ({"apart": _apart(*records.values())} if len(records) == 2 else {})


def _apart(alone: Any, shared: Any) -> dict[str, dict[str, float]]:
    """Of every variable of two records: the largest difference and its root mean square, beside the largest value."""
    found = {}
    for name in alone.data_vars:
        one, other = (torch.from_numpy(each[name].to_numpy()).double() for each in (alone, shared))
        differs = (one - other).abs()
        numbers = {
            "largest difference": differs.max(),
            "rms": differs.square().mean().sqrt(),
            "largest": one.abs().max(),
        }
        found[str(name)] = {words: float(value) for words, value in numbers.items()}
    return found


def _start(dry_run: bool) -> tuple[int, int]:
    """This process's number, and how many there are."""
    if dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _of_all(value: Any) -> list[Any]:
    found = [value] * _size()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _whole(args: argparse.Namespace) -> LlamaForCausalLM:
    return random_model(SHAPES[args.shape], max(args.tokens, 2048), str(_device()), getattr(torch, args.dtype))


def _ids(args: argparse.Namespace) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPES[args.shape].vocabulary, (1, args.tokens), generator=draw).to(_device())


if __name__ == "__main__":
    begin = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)
