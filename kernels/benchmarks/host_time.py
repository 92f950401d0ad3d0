"""The host's time of a kernel call, measured without a card: its kernels compile for Hopper and start nowhere.

    python kernels/benchmarks/host_time.py --out host.json

prints microseconds of processor time a call (the median of many, and the fewest), decided anew and as the third call
of its kind, and how often that one calls the driver. Triton's own launcher runs, linked to a driver that does nothing
(a C compiler builds it): what is missing is the driver's share of a launch, and memory comes from torch's allocator of
the CPU. On a card the row "host time of a call" of ``corners.py`` says all of it. Another Triton: as in
``headscope.kernels.checks.without_card``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DRIVER = """
#include "cuda.h"
static long counted[4];
long *counts(void) { return counted; }
#define DONE { return CUDA_SUCCESS; }
#define DONE_ return CUDA_SUCCESS;
CUresult cuInit(unsigned flags) DONE
CUresult cuDriverGetVersion(int *x) { *x = 12080; DONE_ }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { counted[0]++; DONE_ }
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute a, CUdeviceptr x)
{ counted[1]++; *(CUdeviceptr *)to = x; DONE_ }
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **to, CUdeviceptr x)
{ *(CUdeviceptr *)to[0] = x; DONE_}
CUresult cuCtxGetCurrent(CUcontext *c) { counted[3]++; *c = (CUcontext)1; DONE_ }
CUresult cuCtxSetCurrent(CUcontext c) DONE
CUresult cuCtxSetLimit(CUlimit l, size_t x) DONE
CUresult cuCtxGetLimit(size_t *x, CUlimit l) { *x = 0; DONE_}
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; DONE_}
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *x) { *x = CU_STREAM_CAPTURE_STATUS_NONE; DONE_}
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; DONE_}
CUresult cuDeviceGetCount(int *n) { *n = 1; DONE_}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; DONE_}
CUresult cuDeviceGetAttribute(int *x, CUdevice_attribute a, CUdevice d) { *x = 232448; DONE_}
CUresult cuFuncGetAttribute(int *x, CUfunction_attribute a, CUfunction f)
{ *x = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; DONE_}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int x) DONE
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) DONE
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "no driver"; DONE_}
CUresult cuModuleLoadData(CUmodule *m, const void *x) { *m = (CUmodule)1; DONE_}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)1; DONE_}
CUresult cuModuleUnload(CUmodule m) DONE
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; DONE_}
CUresult cuTensorMapEncodeTiled(CUtensorMap *t, CUtensorMapDataType a, cuuint32_t r, void *x, const cuuint64_t *d,
  const cuuint64_t *s, const cuuint32_t *b, const cuuint32_t *e, CUtensorMapInterleave i, CUtensorMapSwizzle w,
  CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) { counted[2]++; DONE_ }
"""
COUNTED = ("launches", "pointers looked up", "descriptors", "contexts asked for")  # calls of the driver


def load_driver(folder: Path) -> Callable[[], list[int]]:
    """Build a driver that does nothing, and have Triton take it; before anything asks for a card.

    Gives what tells how often the driver was called (``COUNTED``) so far.
    """
    triton = find_spec("triton")
    assert triton is not None and triton.origin is not None
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    library, source = folder / "libcuda.so.1", folder / "driver.c"
    source.write_text(DRIVER)
    named = ["-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", str(library), str(source)]
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", *named], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    loaded.counts.restype = ctypes.POINTER(ctypes.c_long * len(COUNTED))
    return lambda: list(loaded.counts().contents)


def pretend() -> None:
    """Calls on the CPU take the way that they take on an H200. Only what such a call needs is imported."""
    import torch

    from headscope.kernels import attention, first_call

    torch.cuda.get_device_capability = lambda *_: (9, 0)
    first_call.has_card = lambda: True
    attention._triton_takes = lambda q, v: True
    attention._triton_engine()  # begins what a first call begins
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from headscope.kernels.hopper import dispatch
    from headscope.kernels.triton import device

    class NoDriver:
        utils = nvidia.CudaUtils()
        launcher_cls = nvidia.CudaLauncher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _=None: 0)

    driver.set_active(NoDriver())
    dispatch._on_hopper = lambda x: True
    device.has_copy_engine = lambda x: True


def calls() -> dict[str, Callable[[], Any]]:
    """Those of the row "host time of a call", and those that are made of several launches."""
    from dataclasses import replace

    import torch

    from headscope.kernels import attention
    from headscope.kernels import gpu_passes as passes
    from headscope.kernels.benchmarks.corner_rows import Call
    from headscope.kernels.blocks import blocks
    from headscope.kernels.divergence import divergence
    from headscope.kernels.redistribute import redistribute
    from headscope.kernels.redistribution import Redistribution
    from headscope.kernels.request import Request
    from headscope.kernels.spans import span_outputs

    call = Call(1024, 128, 1, heads=4)
    lse, first = call.lse(), torch.arange(call.n) < 1
    ends = [(n * call.n // 4, (n + 1) * call.n // 4) for n in range(4)]
    split = partial(span_outputs, call.scores, call.v)
    move = partial(redistribute, call.scores, call.v, Redistribution(first, 0.5), request=Request())
    top = partial(passes.top_keys, call.q, call.k, lse, count=16, **call.scores.device_arguments)
    attend = partial(attention.attend, call.scores, call.v)
    targets = torch.zeros(1, call.n, 1, dtype=torch.int64)
    return {
        "rows": call.rows,
        "columns": partial(call.columns, lse),
        "attend: lse, entropy": partial(attend, request=Request(output=False, lse=True, entropy=True)),
        "attend: output, lse, entropy": partial(attend, request=Request(lse=True, entropy=True)),
        "attend: targets": partial(attend, request=Request(output=False, targets=targets)),
        "4 spans": partial(split, ends),
        "4 spans, from lse": partial(split, ends, lse=lse),
        "4 spans with gaps": partial(split, [(start, start + 16) for start, _ in ends]),
        "divergence": partial(divergence, call.scores, replace(call.scores, k=call.v)),
        "moved: sink": move,
        "blocks of 64": partial(blocks, call.scores, size=64, lse=lse),
        "top 16": top,
    }


def timed(run: Callable[[], Any], before: Callable[[], None], turns: int = 400) -> dict[str, float]:
    """Microseconds of processor time of ``run``; ``before`` each is not timed."""
    for _ in range(3):
        run()
    took = []
    for _ in range(turns):
        before()
        began = time.process_time_ns()
        run()
        took.append((time.process_time_ns() - began) / 1000)
    return {"median us": statistics.median(took), "fewest us": min(took)}


def main() -> None:
    """Parse the command line, measure, and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        counts = load_driver(Path(folder))
        pretend()
        import triton

        from headscope.kernels import replay

        found: dict[str, Any] = {"kind": "host time", "triton": triton.__version__, "calls": {}}
        for name, run in calls().items():
            anew, again = timed(run, replay.forget), timed(run, lambda: None)
            before = counts()
            run()
            asked = {what: now - was for what, was, now in zip(COUNTED, before, counts(), strict=True)}
            found["calls"][name] = {"anew": anew, "again": again, "driver, again": asked}
            said = ", ".join(f"{n} {what}" for what, n in asked.items())
            print(f"{name:<30} {anew['median us']:4.0f} us anew, {again['median us']:4.0f} again: {said}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
