"""Records on disk: what comes back, what is refused, what an interrupted write leaves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import append_record, concatenate, load_record, open_record, save_record
from headscope.interp.runs.sealed import sealed


def record(examples: int = 2, length: int = 5, *, heads: int = 3, offset: float = 0.0) -> xr.Dataset:
    """A record of ``examples`` examples: query statistics, key statistics and integer positions."""
    shape = (examples, 2, heads, length)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + np.float32(offset)
    return xr.Dataset(
        {
            "entropy": (("example", "layer", "head", "query"), values),
            "key_mass": (("example", "layer", "head", "key"), values + 1),
            "top_keys": (("example", "layer", "head", "query", "rank"), values.astype(np.int64)[..., None]),
        },
        {
            "example": np.arange(examples),
            "layer": [0, 1],
            "head": np.arange(heads),
            "query": np.arange(length),
            "key": np.arange(length),
            "rank": [0],
            "length": ("example", np.full(examples, length)),
            "query_position": (("example", "query"), np.tile(np.arange(length), (examples, 1))),
        },
        attrs={"module": "model.layers.*.self_attn", "headscope": json.dumps({"seed": 0})},
    )


def test_a_record_comes_back_as_it_was(tmp_path):
    made = record()
    assert save_record(made, tmp_path / "r") == tmp_path / "r"
    back = load_record(tmp_path / "r")
    xr.testing.assert_identical(back, made)
    assert back["entropy"].dtype == np.float32 and back["top_keys"].dtype == np.int64


@pytest.mark.filterwarnings("error")
def test_labels_come_back_as_text(tmp_path):
    made = record().expand_dims({"span": ["needle", "the question"]}, axis=-1).assign_coords(layer=[0, 1])
    back = load_record(save_record(made, tmp_path / "r"))
    xr.testing.assert_identical(back, made)
    assert back["span"].dtype.kind == "U"


def test_appended_examples_follow_and_are_padded_with_missing_values(tmp_path):
    long, short = record(2, 5), record(1, 3, offset=100)
    append_record(long, tmp_path / "r")
    append_record(short, tmp_path / "r")
    back = load_record(tmp_path / "r")
    assert dict(back.sizes) | {} == {"example": 3, "layer": 2, "head": 3, "query": 5, "key": 5, "rank": 1}
    assert back["example"].to_numpy().tolist() == [0, 1, 2]
    assert back["length"].to_numpy().tolist() == [5, 5, 3]
    np.testing.assert_array_equal(back["entropy"][:2], long["entropy"])
    np.testing.assert_array_equal(back["entropy"][2, ..., :3], short["entropy"][0])
    assert np.isnan(back["entropy"][2, ..., 3:]).all()
    assert (back["top_keys"][2, ..., 3:, :] == -1).all()
    assert back["top_keys"].dtype == np.int64
    assert back.attrs == long.attrs


def test_concatenation_of_ragged_records_keeps_every_value_in_place():
    parts = [record(1, n, offset=10 * n) for n in (4, 2, 7)]
    joined = concatenate(parts)
    assert joined.sizes["query"] == joined.sizes["key"] == 7
    for i, part in enumerate(parts):
        n = part.sizes["query"]
        np.testing.assert_array_equal(joined["entropy"][i, ..., :n], part["entropy"][0])
        assert np.isnan(joined["key_mass"][i, ..., n:]).all()
        assert joined["query_position"][i].to_numpy().tolist() == [*range(n), *[-1] * (7 - n)]
    assert joined["query_position"].dtype == np.int64
    assert joined["query"].to_numpy().tolist() == list(range(7))


def test_an_open_record_reads_what_is_asked_of_the_parts_that_hold_it(tmp_path):
    parts = [record(2, 4), record(1, 7, offset=100), record(3, 2, offset=1000)]
    for part in parts:
        append_record(part, tmp_path / "r")
    whole, lazy = load_record(tmp_path / "r"), open_record(tmp_path / "r")
    xr.testing.assert_identical(lazy.compute(), whole)
    for key in (
        {"example": 2},
        {"example": -1, "query": 1},
        {"example": slice(1, 5, 2), "query": slice(None, None, -1)},
        {"example": [5, 0, 3], "head": [2, 0], "query": [6, 1]},
        {"layer": 1, "query": slice(3, 6)},
        {"example": [], "key": 0},
    ):
        xr.testing.assert_identical(lazy.isel(key).compute(), whole.isel(key))


def test_damage_inside_a_part_is_found_when_it_is_read(tmp_path):
    for length in (4, 7):
        append_record(record(1, length), tmp_path / "r")
    lazy = open_record(tmp_path / "r")
    part = next((tmp_path / "r").glob("part-00001*"))
    for chunk in (part / "entropy" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"not a chunk")
    assert float(lazy["entropy"][0, 0, 0, 1].load()) == 1.0  # the other part is read as before
    with pytest.raises(HeadscopeError, match=f"{part.name} is damaged"):
        lazy["entropy"].load()
    shutil.rmtree(part / "key_mass")
    with pytest.raises(HeadscopeError, match=f"{part.name} is damaged"):
        open_record(tmp_path / "r")


def test_records_of_different_models_or_statistics_are_not_joined(tmp_path):
    with pytest.raises(HeadscopeError, match="cannot be joined"):
        concatenate([record(), record(heads=4)])
    with pytest.raises(HeadscopeError, match="cannot be joined"):
        concatenate([record(), record().drop_vars("key_mass")])
    with pytest.raises(HeadscopeError, match="nothing was recorded"):
        concatenate([])
    append_record(record(), tmp_path / "r")
    with pytest.raises(HeadscopeError, match="differs in its"):
        append_record(record().drop_vars("key_mass"), tmp_path / "r")


def test_saving_does_not_overwrite(tmp_path):
    save_record(record(), tmp_path / "r")
    with pytest.raises(HeadscopeError, match="already exists"):
        save_record(record(), tmp_path / "r")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HeadscopeError, match="already exists"):
        save_record(record(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("manifest", [None, "not json", "[]", '{"kind": "other"}', '{"kind": "headscope record"}'])
def test_foreign_folders_are_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "record.json").write_text(manifest)
    with pytest.raises(HeadscopeError, match="is not a headscope record"):
        load_record(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    save_record(record(), tmp_path / "r")
    manifest = json.loads((tmp_path / "r" / "record.json").read_text())
    (tmp_path / "r" / "record.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(HeadscopeError, match="format 99"):
        load_record(tmp_path / "r")


def test_every_lost_or_changed_file_is_found(tmp_path):
    """Chunks that zarr would read as missing values, chunks of the right size, metadata and what does not belong there.

    Opening finds what is gone or of another size, and metadata; loading finds every changed byte, also one that only
    says which chunk is which.
    """
    whole = save_record(record(), tmp_path / "whole")
    names = [p.relative_to(whole) for p in sorted(whole.glob("part-*/**/*")) if p.is_file()]
    assert len(names) > 15
    for number, name in enumerate(names):
        for how in ("delete", "cut", "flip"):
            path = tmp_path / f"{number}-{how}"
            shutil.copytree(whole, path)
            data = (path / name).read_bytes()
            if how == "delete":
                (path / name).unlink()
            elif how == "cut":
                (path / name).write_bytes(data[:-1])
            else:
                (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(HeadscopeError, match="is damaged"):
                load_record(path)
            if how != "flip" or name.name == "zarr.json":
                with pytest.raises(HeadscopeError, match="is damaged"):
                    open_record(path)
    part = next(whole.glob("part-*"))
    (part / "extra").write_text("x")
    with pytest.raises(HeadscopeError, match="extra was added"):
        open_record(whole)


def test_a_flipped_bit_is_found_where_it_is_read_later(tmp_path):
    """The checksum inside each compressed chunk: every byte of it, none of them found by its size."""
    path = save_record(record(2, 50), tmp_path / "r")
    chunk = next(p for p in path.glob("part-*/entropy/c/**/*") if p.is_file())
    data = chunk.read_bytes()
    for at in range(0, len(data), 97):
        chunk.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(HeadscopeError, match="is damaged"):
            open_record(path)["entropy"].load()
    chunk.write_bytes(data)
    xr.testing.assert_identical(open_record(path).load(), record(2, 50))


@pytest.mark.parametrize("name", ["../other/part-0.zarr", "/etc", "part-0/../../other", "other", 3, None])
def test_a_part_outside_the_folder_is_refused(tmp_path, name):
    path = save_record(record(), tmp_path / "r")
    (path / "record.json").write_bytes(sealed({"format": 2, "kind": "headscope record", "parts": [name]}))
    with pytest.raises(HeadscopeError, match="which is no part of a record"):
        open_record(path)


def test_variables_and_axes_come_back_in_one_order(tmp_path):
    """zarr lists a folder in any order: 60 reads, and the axes by name and by place are those that were written."""
    made = record()
    first = load_record(save_record(made, tmp_path / "r"))
    assert list(first.data_vars) == list(made.data_vars)
    for _ in range(30):
        for read in (load_record, open_record):
            found = read(tmp_path / "r")
            assert list(found.variables) == list(first.variables) and list(found.dims) == list(first.dims)


def test_damaged_parts_are_named(tmp_path):
    save_record(record(), tmp_path / "r")
    part = next((tmp_path / "r").glob("part-*"))
    (part / "zarr.json").write_text("{")
    with pytest.raises(HeadscopeError, match=f"{part.name}.*damaged"):
        load_record(tmp_path / "r")
    shutil.rmtree(part)
    with pytest.raises(HeadscopeError, match=f"{part.name}.*damaged"):
        load_record(tmp_path / "r")


def test_an_interrupted_append_leaves_the_record_as_it_was(tmp_path, monkeypatch):
    append_record(record(), tmp_path / "r")
    before = load_record(tmp_path / "r")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(xr.Dataset, "to_zarr", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append_record(record(1), tmp_path / "r")
    xr.testing.assert_identical(load_record(tmp_path / "r"), before)
    assert len(list((tmp_path / "r").glob("part-*"))) == 1
