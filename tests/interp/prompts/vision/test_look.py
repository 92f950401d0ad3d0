"""Chats with pictures from folders, files and iterables; where each image token comes from; a model's own processor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from headscope.interp import load_model
from headscope.interp.cli import main
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.processors import processor_of
from headscope.interp.prompts.grids import ImageGrid, Made, grids_of
from headscope.interp.prompts.look import extended, look
from headscope.interp.prompts.pictures import pixels
from headscope.interp.prompts.vision import vision_prompt
from headscope.interp.prompts.vision_data import VisionItem, ask, vision_items


@pytest.fixture
def folder(tmp_path, picture):
    for name in ("b.png", "a.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("What is it?\n")
    return tmp_path


def words(item: VisionItem) -> str:
    return item.chat[-1]["content"][-1]["text"]


def test_a_folder_a_file_and_an_iterable_are_the_same_chats(folder, picture) -> None:
    items = vision_items(folder, 5)
    assert [one.name for one in items] == ["a.png", "b.png"]
    assert [words(one) for one in items] == ["Please describe the image in detail.", "What is it?"]
    lines = [
        {"image": "a.png", "text": "Why?", "boxes": {"x": [1, 2, 3, 4]}, "system": "Be brief."},
        {"images": ["a.png", "b.png"], "question": "Which?", "name": "two"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "?"}]}
            ]
        },
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for given in (folder, str(folder / "metadata.jsonl")):
        a, b, c = vision_items(given, 5)
        assert a.boxes == {"x": (1.0, 2.0, 3.0, 4.0)} and a.chat[0]["role"] == "system" and words(a) == "Why?"
        assert len(b.pictures) == 2 and b.name == "two" and words(c) == "?"
        assert all((pixels(one) == np.asarray(picture(0))).all() for item in (a, b, c) for one in item.pictures)
    assert len(vision_items((ask(picture(i)) for i in range(9)), 3)) == 3
    assert vision_items([items[0].chat], 1)[0].pictures == items[0].pictures


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 of .* is no chat with pictures"),
        ('{"text": "a"}', "KeyError: 'file_name'"),
        ('{"image": "a.png", "boxes": {"x": [3, 2, 1, 4]}}', "line 1 of .*: the box of 'x' is"),
        ('{"image": "a.png", "boxes": {"x": [0.1, 0.1, 0.5, 0.9]}}', "lies in 0..1: boxes are in pixels"),
        ('{"image": "a.png", "boxes": [20, 20, 60, 60]}', 'boxes have names: write "boxes": {"name"'),
        ('{"image": 5}', "a picture is a path, not 5"),
        ('{"images": "a.png"}', "images are a list"),
        ('["a.png", "Why?"]', "a list and not an object"),
        ('{"messages": "Why?"}', "a chat is a list of messages"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a part without its image"),
    ],
)
def test_a_line_that_is_no_chat_is_named(folder, line, said) -> None:
    (folder / "one.jsonl").write_text(line)
    with pytest.raises(HeadscopeError, match=said):
        vision_items(folder / "one.jsonl", 1)


def test_pictures_in_any_form_are_bytes(folder, picture) -> None:
    want = np.asarray(picture(0))
    for one in (picture(0), want, want / 255.0, np.moveaxis(want, 2, 0), torch.tensor(want), str(folder / "a.png")):
        assert (pixels(one) == want).all()
    grey = want[..., 0]
    for one in (grey, grey[..., None], grey[None], grey / 255.0):
        assert (pixels(one) == grey[..., None]).all() and pixels(one).shape == want.shape
    assert (pixels(want[:1]) == want[:1]).all() and (pixels(grey > 9) == 255 * (grey > 9)[..., None]).all()
    (folder / "bad.png").write_text("no picture")
    for bad, said in (
        (folder / "c.png", "there is no picture .*c.png"),
        (folder / "bad.png", "cannot read the picture .*bad.png"),
        (folder, "is no file"),
        (np.zeros((2, 2, 2)), r"of shape \(2, 2, 2\) is no picture"),
        (None, "NoneType None of shape"),
        (np.array([["a"]]), "is no picture"),
        (want.astype(float), "floats are 0..1, and this array of float64 has 0 to 25"),
        (want.astype(int) - 9, "whole numbers are 0..255"),
        (want * np.nan, "floats are 0..1"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            pixels(bad)


def test_the_model_reads_the_bytes_that_are_drawn(vision_lm, folder, picture) -> None:
    """Floats and grey arrays as their bytes; what is no picture is named before the processor gets it."""
    lm, want = vision_lm("llava"), np.asarray(picture(0))
    grey = np.repeat(want[..., :1], 3, axis=2)
    path, flat = str(folder / "a.png"), grey[..., 0]
    for given, same in ((want / 255.0, want), (path, want), (flat, grey), (flat / 255.0, grey)):
        one, other = look(lm, ask(given, "q")), look(lm, ask(same, "q"))
        assert torch.equal(one.prompt.inputs["pixel_values"], other.prompt.inputs["pixel_values"])
        assert (one.pictures[0] == same).all()
    (folder / "a.png").write_text("no picture")
    for bad in (vision_items(folder, 1)[0], ask("/etc/hostname", "q")):
        with pytest.raises(HeadscopeError, match="cannot read the picture .*(a.png|hostname)"):
            look(lm, bad)
    with pytest.raises(HeadscopeError, match=r"the box of 'cat', .* lies outside its picture of 64 x 40 pixels .far"):
        look(lm, ask(want, boxes={"cat": (64, 0, 90, 40)}, name="far"))


def test_what_is_no_data_gets_one_line(folder, picture, tmp_path_factory) -> None:
    one = ask(picture(0), "q")
    assert vision_items(one, 5) == [one] and vision_items(one.chat, 5)[0].chat == one.chat
    alone = tmp_path_factory.mktemp("alone")
    (alone / "orphan.txt").write_text("What is it?")
    for bad, said in (
        (alone, "holds no picture .*orphan.txt is there, without the picture"),
        (picture(0), "is no vision data: .*ask"),
        (np.asarray(picture(0)), "ndarray is no vision data"),
        (["a.png"], "chat 0 of the vision data: a chat is a list of messages, not str 'a.png'.*ask"),
        ([one, [{"content": "Hello"}]], "chat 1 of the vision data: message 0 of the chat has no role"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            vision_items(bad, 5)
    for boxes, said in (({"a": (50, 50, 10)}, "the box of 'a' is"), ({"a": 3}, "not 3"), ([1, 2, 3, 4], "have names")):
        with pytest.raises(HeadscopeError, match=said):
            ask(picture(0), boxes=boxes)
    with pytest.raises(HeadscopeError, match="what is asked of a picture is text, not None"):
        ask(picture(0), None)


def test_tokens_lie_where_the_processor_looked(vision_lm, picture) -> None:
    """64 x 40 pixels: a square cut out of the middle (LLaVA), padded to one, or all of it; and two pictures at once."""
    item = ask([picture(0), picture(1, 64, 40)])
    one = look(lm := vision_lm("llava"), item)
    made = vision_prompt(lm, None, item.chat)  # with the processor that is the model's own
    assert torch.equal(made.inputs["input_ids"], vision_prompt(lm, processor_of(lm), item.chat).inputs["input_ids"])
    assert [(g.box, g.image) for g in one.grids] == [((12, 0, 52, 40), 0), ((0, 12, 40, 52), 1)]
    assert one.grids[0].positions.ravel().tolist() == one.tokens[:16].tolist()
    settings = processor_of(one.lm).image_processor
    was, settings.do_pad = settings.do_pad, True
    try:
        assert look(one.lm, item).grids[0].box == (0, -12, 64, 52)
    finally:
        settings.do_pad = was
    merged = look(vision_lm("qwen2_5_vl"), item)
    assert [g.shape for g in merged.grids] == [(2, 4), (4, 2)] and merged.grids[1].box == (0, 0, 40, 64)
    tiles = look(vision_lm("idefics3"), item).grids_with(0)
    first = [int(g.positions[0, 0]) for g in tiles]
    assert [g.view for g in tiles] == ["whole", "tiles"] and first[1] < first[0]  # the whole picture comes last
    assert np.diff(tiles[1].positions[0]).tolist()[0] == 1 and tiles[1].positions[0, 2] > tiles[1].positions[1, 1]
    fine = look(vision_lm("llava_onevision"), ask(picture(0))).grids
    assert [g.shape for g in fine] == [(4, 4), (6, 8)]
    assert fine[1].box == (0, -4, 64, 44)  # 8 rows of 8 pixels around 40: a row of padding left on either side, halved
    assert np.diff(fine[1].positions[:, 0]).tolist() == [9] * 5  # a newline after each row


def test_shares_of_cells_and_tokens_that_are_no_grid(vision_lm, picture) -> None:
    grid = ImageGrid(np.arange(4).reshape(2, 2), (0.0, -10.0, 20.0, 10.0), (20, 10))
    assert grid.covered((5.0, 0.0, 20.0, 5.0)).tolist() == [[0, 0], [0.25, 0.5]]
    assert grid.real.tolist() == [[0, 0], [1, 1]]
    lm = vision_lm("llava")
    for spans, said in (
        ([(0, 15)], "the 15 tokens of picture 0 are no grid of 4 x 4 patches"),
        ([(0, 4), (5, 9)], "tiles"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            grids_of(Made(spans, ["", ""], (32, 32), None, (64, 40), 0), lm.inner.config, processor_of(lm))
    with pytest.raises(HeadscopeError, match="no picture 3"):
        look(lm, ask(picture(0))).grids_with(3)


def test_an_answer_goes_on_from_a_prompt(vision_lm, picture) -> None:
    """As one pass over prompt and answer: every input that has a value a token grows; or as the chat's own message."""
    told = look(vision_lm("llava"), ask(picture(0)), response="A cat.")
    first, stop = told.prompt.spans["response"][0][0]
    assert processor_of(told.lm).tokenizer.decode(told.ids[first:stop]) == "A cat."
    for name in ("qwen2_5_vl", "paligemma"):
        lm = vision_lm(name)
        one = look(lm, ask(picture(0)))
        longer = extended(one.prompt.inputs, [5, 6])
        tables = [x.shape for x in longer.values() if x.dim() == 2 and x.shape[0] == 1]
        assert set(tables) >= {(1, len(one.ids) + 2)} and longer["attention_mask"].all()
        with torch.no_grad():
            assert lm.model(**longer).logits.shape[1] == len(one.ids) + 2
        both = {key: x.repeat(2, *[1] * (x.dim() - 1)) for key, x in one.prompt.inputs.items()}
        with pytest.raises(HeadscopeError, match="one example at a time"):
            extended(both, [5])


def test_a_checkpoint_brings_its_own_processor(vision_model, folder, tmp_path, capsys) -> None:
    """Saved and loaded by name; from the command line, with a folder of pictures."""
    model, made = vision_model("llava")
    place = tmp_path / "model"
    model.save_pretrained(place), made.save_pretrained(place)
    lm = load_model(place)
    item = vision_items(folder, 1)[0]
    assert torch.equal(look(lm, item).ids, look(load_model(model, processor=made), item).ids)
    assert processor_of(lm) is lm.processor and lm.processor.patch_size == 8
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        main(["discover", "vhd", "visual_sinks", "--model", str(place), "--data", str(folder), "--out", str(out)])
    assert not done.value.code
    said = capsys.readouterr()
    assert "vhd: top" in said.out and "visual_sinks: no dimension" in said.err
    assert (out / "vhd.json").is_file() and json.loads((out / "vhd.json").read_text())["provenance"]["trials"] == 2
    with pytest.raises(HeadscopeError, match="came without a processor"):
        processor_of(load_model(vision_model("llava")[0]))
