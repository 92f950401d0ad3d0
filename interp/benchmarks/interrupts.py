"""What interrupts and kills leave; ``python -m headscope.interp.benchmarks.interrupts`` ends with 1 where that is not
nothing.

Ctrl-C (SIGINT) comes at random times while models are verified, traced and made to generate, and once at every line of
ours that a block runs to begin and to end. After each, whatever holds the traceback, the model must be as it was. A
sweep is killed (SIGKILL) at random times and run again until it has been killed so often; its record must then be that
of a sweep that nobody killed.
"""

from __future__ import annotations

import argparse
import dis
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from headscope.interp import trace
from headscope.interp.sites import compiled, is_attached
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.sweeps.run import sweep
from headscope.interp.tracing import guards

IDS = torch.arange(5, 15)[None]
STATISTICS = [Entropy()]
WATCHED = ("route.py", "switch.py", "passes.py", "compiled.py", "guards.py", "generation.py", "tracer.py")


def leftovers(model: Any, plain: Tensor) -> list[str]:
    """What of ours is still on a model, or in the registries, after all blocks; ``plain`` are its logits."""
    found = ["a route"] if is_attached(model) else []
    if model.config._attn_implementation != "sdpa":
        found.append(f"implementation {model.config._attn_implementation}")
    for interface in (AttentionInterface, AttentionMaskInterface):
        found += [name for name in interface._global_mapping if "headscope" in name]
    found += [f"hook of {name or 'model'}" for name, part in model.named_modules() if _our_hooks(part)]
    found += [f"guard of {name}" for _, name in guards._REPLACED]
    found += ["stance"] if compiled._HELD.blocks else []
    if found:
        return found
    with torch.no_grad():
        return [] if torch.equal(model(IDS).logits, plain) else ["other logits"]


def _our_hooks(part: Any) -> list[Any]:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    return [hook for hook in hooks if "headscope" in type(hook).__module__]


def logits(model: Any) -> Tensor:
    """The untraced model's."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def at_random(count: int, seed: int = 0) -> list[str]:
    """Interrupt traced passes, generation and verification ``count`` times; what was left after each."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
    clock, known, left = random.Random(seed), tiny_model("llama"), []
    plain = logits(known)
    for number in range(count):
        fresh = number % 4 == 0  # one that has not been verified
        model = tiny_model("llama") if fresh else known
        kept = _interrupted(model, clock.uniform(0.01, 0.12))
        left += [f"interrupt {number}: {what}" for what in leftovers(model, plain)]
        del kept
    return left


def _work(model: Any) -> None:
    while True:
        with trace(model, STATISTICS):
            model(IDS)
            with trace(model, STATISTICS, layers=[0]):
                model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


def _interrupted(model: Any, after: float) -> BaseException | None:
    """Work with a model until another process sends SIGINT; the exception, whose traceback holds every frame.

    It is sent again after three seconds, for one that comes in a finalizer is ignored by Python.
    """
    sender, kept = None, None
    try:
        sender = subprocess.Popen(["sh", "-c", f"sleep {after:.4f}; while kill -INT {os.getpid()}; do sleep 3; done"])
        _work(model)
    except KeyboardInterrupt as error:
        kept = error
    if sender is not None:
        sender.kill()
        sender.wait()
    return kept


def at_every_line(stride: int = 1) -> tuple[int, list[str]]:
    """Interrupt a block at each ``stride``th line of ours that it runs to begin and to end: how many interrupts that
    were, and what was left."""
    model, left = tiny_model("llama"), []
    plain = logits(model)
    with trace(model, STATISTICS):
        model(IDS)
    number = 1
    while not _interrupted_at(model, number):
        left += [f"line {number}: {what}" for what in leftovers(model, plain)]
        number += stride
    return number // stride, left


def _interrupted_at(model: Any, number: int) -> bool:
    """Whether the block came to its end before its ``number``th line."""
    seen = 0

    def watch(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "call":
            return watch if frame.f_code.co_filename.endswith(WATCHED) else None
        if event != "line" or _does_nothing(frame):
            return watch
        seen += 1
        if seen == number:
            signal.raise_signal(signal.SIGINT)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        with trace(model, STATISTICS):
            pass
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


def _does_nothing(frame: Any) -> bool:
    """Whether the line is a ``try:``, an instruction that does nothing. Python handles signals at calls, at jumps back
    and where a function or generator goes on, so no interrupt comes there; what guards the line begins after it."""
    return bool(frame.f_code.co_code[frame.f_lasti] == dis.opmap["NOP"])


def kills(count: int, folder: Path, seed: int = 0, prompts: int = 400) -> list[str]:
    """Kill a sweep of so many prompts ``count`` times, with -9, and run it again each time; what its record differs by.

    At a random time after it has added 0 to 5 parts, for on a slow machine a time alone may always be too early.
    """
    clock, context = random.Random(seed), multiprocessing.get_context("fork")
    given = [list(range(5, 9 + i % 12)) for i in range(prompts)]
    whole = sweep(tiny_model("llama"), given, STATISTICS, out=folder / "whole", largest=2, progress=False).load()
    killed, run, wrong = 0, 0, []
    while killed < count:
        out = folder / f"run-{run}"
        child = context.Process(target=_sweep, args=(given, out))
        child.start()
        enough = _parts(out) + clock.randrange(6)
        while child.is_alive() and _parts(out) < enough:
            child.join(0.005)
        child.join(clock.uniform(0, 0.1))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            killed += 1
        elif child.exitcode == 0:
            wrong += _differs(given, out, whole, run)
            run += 1
        else:
            wrong.append(f"run {run}: exit {child.exitcode}")
            run += 1
    return wrong + _differs(given, folder / f"run-{run}", whole, run)


def _parts(out: Path) -> int:
    return len(list(out.glob("part-*")))


def _sweep(prompts: list[list[int]], out: Path) -> None:
    torch.set_num_threads(1)
    sweep(tiny_model("llama"), prompts, STATISTICS, out=out, largest=2, progress=False)


def _differs(prompts: list[list[int]], out: Path, whole: Any, run: int) -> list[str]:
    found = sweep(tiny_model("llama"), prompts, STATISTICS, out=out, largest=2, progress=False).load()
    same = all(np.array_equal(found[name], whole[name], equal_nan=True) for name in ("entropy", "token", "length"))
    return [] if same else [f"run {run}: another record"]


def main() -> None:
    """Run all three and print what was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=100)
    parser.add_argument("--kills", type=int, default=50)
    asked = parser.parse_args()
    left = at_random(asked.interrupts)
    lines, at_lines = at_every_line()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kills(asked.kills, Path(folder))
    print(f"{asked.interrupts} interrupts at random, {lines} at every line of ours, {asked.kills} kills; left:")
    print("\n".join([*left, *at_lines, *wrong]) or "nothing")
    sys.exit(bool(left or at_lines or wrong))


if __name__ == "__main__":
    main()
