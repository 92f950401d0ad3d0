"""Files of interventions: what is refused, in one line, and what a file cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, HeadEdit, Intervention, ScaleHeads, apply, files, load_intervention

MEANS = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5))
EDIT = AblateHeads([(0, 1), (1, 3)], "mean", means=MEANS)


def header(document: Any, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A file with a right hash around any document."""
    held = tensors or {}
    digest = files._hash(document, held) if isinstance(document, dict) else ""
    return save_tensors(held, metadata={"headscope": json.dumps(document), "sha256": digest})


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a saved intervention"),
    "truncated": (lambda data: data[:-40], "not a saved intervention"),
    "truncated header": (lambda data: data[:60], "not a saved intervention"),
    "a tensor's bit": (lambda data: flipped(data, len(data) - 5), "changed or damaged"),
    "a setting": (lambda data: data.replace(b'\\"strength\\": 1.0', b'\\"strength\\": 0.0'), "changed or damaged"),
    "foreign": (lambda data: save_tensors({"x": torch.zeros(2)}), "not a saved intervention"),
    "foreign metadata": (lambda data: save_tensors({"x": torch.zeros(2)}, metadata={"format": "pt"}), "not a saved"),
    "a pickle": (lambda data: b"\x80\x04\x95K.", "not a saved intervention"),
    "another format": (lambda data: header({"format": 2}), "of format 2, this version reads 1"),
    "unknown edit": (lambda data: header({"format": 1, "kind": "os.system", "settings": {}, "model": None}), "no edit"),
    "no dict": (lambda data: header([1]), "not a saved intervention"),
    "unknown setting": (
        lambda data: header({"format": 1, "kind": "scale_heads", "settings": {"shell": "rm"}, "model": None}),
        "has no setting 'shell'",
    ),
    "unknown tag": (
        lambda data: header({"format": 1, "kind": "scale_heads", "settings": {"heads": {"eval": "1"}}, "model": None}),
        "not a saved intervention",
    ),
    "absent tensor": (
        lambda data: header(
            {"format": 1, "kind": "scale_heads", "settings": {"heads": {"tensor": "no"}}, "model": None}
        ),
        "not a saved intervention",
    ),
    "refused setting": (
        lambda data: header(
            {
                "format": 1,
                "kind": "scale_heads",
                "settings": {"heads": {"heads": [], "weights": [], "name": "x"}},
                "model": None,
            }
        ),
        "no heads",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    path = EDIT.save(tmp_path / "edit")
    change, message = WRONG[what]
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(HeadscopeError, match=message) as refused:
        load_intervention(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = ScaleHeads([(0, 1)], 0.5).save(tmp_path / "edit")
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(flipped(data, at))
        try:
            assert load_intervention(path) == ScaleHeads([(0, 1)], 0.5), at  # white space between JSON's words
        except HeadscopeError:
            continue


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(HeadscopeError, match="cannot read"):
            load_intervention(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    edit = AblateHeads([(0, 1)], "mean", means=MEANS.to(dtype))
    again = load_intervention(edit.save(tmp_path / "edit"))
    assert isinstance(again, AblateHeads) and again.means is not None
    assert again.means.dtype == dtype and torch.equal(again.means, MEANS.to(dtype)) and again == edit
    assert again != AblateHeads([(0, 1)], "mean", means=MEANS.to(dtype) + 1)


def test_it_is_for_the_model_it_was_saved_for(llama: LanguageModel, tmp_path: Path) -> None:
    path = EDIT.save(tmp_path / "edit", llama)
    for model in (llama, llama.model):  # the bare model has no revision: its weights are compared
        with apply(model, load_intervention(path, model)):
            pass
    larger = tiny_model("llama")
    with pytest.raises(HeadscopeError, match="saved for tiny llama with .*; make it again on this model"):
        load_intervention(path, larger)
    loaded = load_intervention(path)
    with torch.no_grad():
        llama.model.lm_head.weight += 0.1
    with pytest.raises(HeadscopeError, match="with other weights.*any_model=True"):
        with apply(llama.model, loaded):
            raise AssertionError("entered")
    with apply(llama.model, load_intervention(path, any_model=True)):
        pass
    again = load_intervention(loaded.save(tmp_path / "again"))  # a copy is for the same model
    assert again.made_for == loaded.made_for


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Mine(HeadEdit):
        """An edit of no registry."""

    with pytest.raises(HeadscopeError, match="Mine is in no registry.*add a line to EDITS"):
        Mine([(0, 1)]).save(tmp_path / "edit")
    with pytest.raises(HeadscopeError, match="cannot be saved"):
        Intervention().save(tmp_path / "edit")
    with pytest.raises(HeadscopeError, match="positions is a object"):
        ScaleHeads([(0, 1)], positions=object()).save(tmp_path / "edit")
    assert not list(tmp_path.iterdir())
    assert Mine([(0, 1)]) == Mine([(0, 1)]) and Mine([(0, 1)]) != ScaleHeads([(0, 1)])
    assert len({Mine([(0, 1)]), Mine([(0, 1)])}) == 1  # a dataclass's own comparison is not used


def test_nested_settings_come_back(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {(0, 1): MEANS[0], "a": [1, 2.5, None, True, float("inf")], 3: ("x", (1, 2))}
    again = files.decode(json.loads(json.dumps(files.encode(value, "v", tensors))), tensors)
    assert list(again) == list(value) and again["a"] == value["a"] and again[3] == value[3]
    assert torch.equal(again[(0, 1)], MEANS[0])


def test_it_says_what_it_is_in_a_line() -> None:
    assert repr(ScaleHeads([(0, 1), (1, 3)], 0.5)) == "ScaleHeads(heads='L0H1,L1H3', factor=0.5)"
    said = repr(AblateHeads([(0, 1)], "mean", means=MEANS, during="answer"))
    assert said.startswith("AblateHeads(during='answer', heads='L0H1', how='mean', means=<2x4x8 float32, sha256 ")
    assert repr(ScaleHeads([(0, 1)], 2.0) + ScaleHeads([(0, 1)], 0.5)) == (
        "ScaleHeads(heads='L0H1', factor=2.0) + ScaleHeads(heads='L0H1', factor=0.5)"
    )
    assert ScaleHeads([(0, 1)], 2.0, strength=0.5).name == "scale 1 heads (strength=0.5, factor=2.0)"


def test_a_changed_or_composed_copy_is_still_for_its_model(tmp_path: Path) -> None:
    one, other = (LanguageModel.wrap(tiny_model("llama"), name=name) for name in ("one", "other"))
    with torch.no_grad():
        for weights in other.model.parameters():
            weights.mul_(1.5)
    edit = ScaleHeads([(0, 1)], 0.5)
    loaded = load_intervention(edit.save(tmp_path / "one.edit", one), one)
    both = load_intervention((edit + edit).save(tmp_path / "two.edit", one), one)
    changed = loaded.with_settings(strength=0.5)
    again = load_intervention(changed.save(tmp_path / "again.edit"))
    copies = [
        changed,
        loaded.with_heads(HeadSet.of([(1, 1)])),
        loaded + edit,
        edit + loaded,
        sum([edit, loaded]),
        again,
    ]
    for copy in [loaded, both, both.with_settings(strength=0.5), *copies]:
        with apply(one, copy):
            pass
        with pytest.raises(HeadscopeError, match="was saved for one"), apply(other, copy):
            raise AssertionError("entered")


def test_what_is_no_intervention_is_not_added() -> None:
    for adding in (lambda: ScaleHeads([(0, 1)], 0.5) + 1, lambda: sum([ScaleHeads([(0, 1)], 0.5)], start=2)):
        with pytest.raises(HeadscopeError, match="only interventions are composed"):
            adding()
