"""ITI: probes against scikit-learn called directly, directions and sigmas against their formulas in float64, and the
edit against a hook made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary
from headscope.interventions import AddToHeads, apply, load_intervention
from headscope.interventions.fitted.data import answers
from headscope.interventions.fitted.iti import ITI, question_split

LAYERS, HEADS, D_HEAD = 2, 4, 8
QUESTIONS = [
    {
        "question": f"w{i} w{(5 * i) % 60} w4",
        "choices": [f"w{(i * 3) % 60} w{i % 7}", f"w{(i * 11 + 1) % 60}", f"w{(i * 17) % 60} w9 w2"],
        "labels": [1, 0, int(i % 3 == 0)],
    }
    for i in range(15)
]


def outputs(lm: LanguageModel, text: str) -> Tensor:
    """z of every head at the last token, from plain hooks: (layer, head, d_head)."""
    seen: list[Tensor] = []
    layers = lm.model.model.layers
    handles = [x.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for x in layers]
    with torch.no_grad():
        lm.model(**lm.tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return torch.stack([x[0, -1].view(HEADS, D_HEAD) for x in seen])


@contextmanager
def pushed(model: Any, offsets: Tensor, first: int) -> Iterator[None]:
    """Offsets (layer, head, d_head) of z at every row from position ``first`` of the text on, by hooks."""
    at: list[Tensor] = []

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            meant = (at[-1] >= first)[..., None]
            return (args[0] + meant * offsets[layer].flatten(), *args[1:])

        return hook

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        at.append(kwargs["position_ids"])

    handles = [x.self_attn.o_proj.register_forward_pre_hook(hook_of(i)) for i, x in enumerate(model.model.layers)]
    handles.append(model.model.layers[0].register_forward_pre_hook(begin, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_probes_directions_and_sigmas_are_scikit_learn_and_the_formulas(llama: LanguageModel) -> None:
    """z comes in float32 from two paths (batched and padded, or alone): 1e-5 of its size; on the same z the formulas
    agree to float64's rounding, and the probes to the last one."""
    found = ITI(top=3).fit(llama, QUESTIONS, progress=False)
    texts = [f"Q: {q['question']} A: {c}" for q in QUESTIONS for c in q["choices"]]
    labels = np.array([x for q in QUESTIONS for x in q["labels"]])
    z = torch.stack([outputs(llama, text) for text in texts]).numpy()
    np.random.seed(42)
    drawn = np.random.choice(np.arange(15), size=int(15 * (1 - 0.2)), replace=False)
    training = np.isin(np.repeat(np.arange(15), 3), drawn)
    accuracy = np.zeros((LAYERS, HEADS))
    for layer, head in np.ndindex(LAYERS, HEADS):
        probe = LogisticRegression(max_iter=1000, random_state=42).fit(z[training, layer, head], labels[training])
        accuracy[layer, head] = probe.score(z[~training, layer, head], labels[~training])
        x = z[:, layer, head].astype(np.float64)
        theta = x[labels == 1].mean(0) - x[labels == 0].mean(0)
        theta /= np.linalg.norm(theta)
        assert np.abs(found.directions[layer, head] - theta).max() < 1e-4
        assert found.sigma[layer, head] == pytest.approx(torch.from_numpy(x @ theta).std().item(), rel=1e-4)
    assert np.array_equal(found.scores.mean, accuracy) and (found.scores.n == 9).all()
    order = sorted(np.ndindex(LAYERS, HEADS), key=lambda head: -accuracy[head])
    assert list(found.heads) == order[:3]
    assert found.tied == sum(accuracy[head] == accuracy[order[2]] for head in order[3:])
    assert isinstance(found.edit, AddToHeads) and found.edit.strength == 15 and found.edit.during == "answer"
    assert np.array_equal(found.edit.vectors.numpy(), found.directions.astype(np.float32))


def test_its_other_forms(llama: LanguageModel, tmp_path: Path) -> None:
    plain, other = (ITI(top=3, ddof=ddof).fit(llama, QUESTIONS, progress=False) for ddof in (1, 0))
    assert other.sigma == pytest.approx(plain.sigma * np.sqrt(44 / 45))
    probes = ITI(top=3, direction="probe_weight").fit(llama, QUESTIONS, progress=False)
    assert np.allclose(np.linalg.norm(probes.directions, axis=-1), 1) and list(probes.heads) == list(plain.heads)
    assert np.abs(probes.directions - plain.directions).max() > 0.1
    more = [f"w{i} w{i + 1}" for i in range(12)]
    (tmp_path / "texts").write_text("\n".join(more) + "\n")
    far = ITI(top=3, sigma_texts=tmp_path / "texts").fit(llama, QUESTIONS, progress=False)
    z = torch.stack([outputs(llama, text) for text in more]).double().numpy()
    expected = np.einsum("nlhd,lhd->nlh", z, plain.directions).std(0, ddof=1)
    assert np.allclose(far.sigma, expected, rtol=1e-4) and np.array_equal(far.directions, plain.directions)
    assert len(ITI(share=0.49).fit(llama, QUESTIONS, progress=False).heads) == 3
    again = ITI(top=3).fit(llama, QUESTIONS, progress=False)
    assert again.edit == plain.edit and ITI(top=3, seed=3).fit(llama, QUESTIONS, progress=False).edit != plain.edit


def test_the_edit_is_a_hand_made_hook_in_a_pass_and_in_cached_generation(llama: LanguageModel) -> None:
    """Prefill pushes the prompt's last row alone, every step its own: a full pass that pushes all rows from there on.
    Float32: 1e-5 of the largest logit (test_ablate.py)."""
    found, model = ITI(top=3).fit(llama, QUESTIONS, progress=False), llama.model
    offsets = torch.zeros(LAYERS, HEADS, D_HEAD)
    for layer, head in found.heads:
        offsets[layer, head] = torch.from_numpy(15 * found.sigma[layer, head] * found.directions[layer, head])
    ids = llama.tokenizer("w1 w2 w3 w4 w5", return_tensors="pt")["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    plain = model.generate(ids, **options)
    with apply(llama, found.edit):
        got = model.generate(ids, **options)
    with pushed(model, offsets, 4):
        expected = model.generate(ids, **options)
        whole = model(got.sequences, position_ids=torch.arange(10)[None]).logits[0, 4:9]
    scale = whole.abs().max()
    for logits in (torch.cat(expected.logits), whole):
        assert (torch.cat(got.logits) - logits).abs().max() <= 1e-5 * scale
    assert (got.logits[0] - plain.logits[0]).abs().max() > 1e-2 * scale


def test_the_legacy_form_pushes_from_four_tokens_after_the_question_on(llama: LanguageModel) -> None:
    found, model = ITI(top=3, form="legacy").fit(llama, QUESTIONS, progress=False), llama.model
    edit = found.edit
    assert isinstance(edit, AddToHeads) and (edit.during, edit.after) == ("decode", 4)
    offsets = torch.zeros(LAYERS, HEADS, D_HEAD)
    for layer, head in found.heads:
        offsets[layer, head] = torch.from_numpy(15 * found.sigma[layer, head] * found.directions[layer, head])
    ids = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padding on the left: its question ends at the same column
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    for rows, lengths, padded in ((slice(0, 1), 5, False), (slice(0, 2), 5, True), (slice(0, 2), (5, 3), False)):
        inputs = {"input_ids": ids[rows], "attention_mask": mask[rows], "position_ids": at[rows]}
        with torch.no_grad(), apply(llama, edit), prompt_boundary(lengths, padded=padded):
            got = model(**inputs).logits
        for i in range(len(got)):
            own = {name: x[i : i + 1] for name, x in inputs.items()}
            first = 9 - int((mask[i] == 0).sum())
            with torch.no_grad(), pushed(model, offsets, first):
                expected = model(**own).logits
            real = mask[i].bool()
            assert (got[i] - expected[0])[real].abs().max() <= 1e-5 * expected.abs().max()
    cut = dict(max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    with apply(llama, edit):
        steps = model.generate(ids[:1, :5], **cut)
    with pushed(model, offsets, 9):
        written = model.generate(ids[:1, :5], **cut)
    assert torch.allclose(torch.cat(steps.logits), torch.cat(written.logits), atol=1e-4, rtol=0)
    for bad in ({"after": -1, "during": "decode"}, {"after": 2}, {"after": True, "during": "decode"}):
        with pytest.raises(HeadscopeError, match="after counts"):
            edit.with_settings(**{"after": 0, "during": "answer", **bad})


def test_data_in_either_form(tmp_path: Path) -> None:
    rows = [{"text": f"w{i}", "label": i % 2, "group": i // 2} for i in range(12)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    read = answers(file)
    assert read.name == "mine" and read.groups[:3] == ("0", "0", "1") and read.labels.tolist() == [0, 1] * 6
    assert answers(read) is read and answers("truth").name == "truth"
    asked = answers([{**q, "answers": q["choices"]} for q in QUESTIONS])
    assert asked.texts[0] == "Q: w0 w0 w4 A: w0 w0" and len(set(asked.groups)) == 15
    train, held_out = question_split(asked, 42, 0.2)
    assert len(train) == 36 and len(held_out) == 9
    for bad, words in (
        ([{"question": "w1", "choices": ["w2"], "labels": [1, 0]}], "row 1: give"),
        ([{"question": "w1", "choices": "w2", "labels": [1]}], "row 1: give"),
        ([{"text": "w1", "label": 2}], "labels must be 0 and 1"),
        ([{"text": "w1", "label": None}], "labels must be 0 and 1"),
        ([], "holds no rows"),
        ("nowhere.jsonl", "no labelled set"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            answers(bad)


def test_what_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    for given, words in (
        ({"direction": "x"}, "direction is 'mass_mean'"),
        ({"ddof": 2}, "ddof is 0 or 1"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"alpha": "x"}, "alpha must be a number"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            ITI(**given)  # type: ignore[arg-type]
    with pytest.raises(HeadscopeError, match="top=48 is 48 of 8 heads"):
        ITI().fit(llama, QUESTIONS)
    with pytest.raises(HeadscopeError, match="two texts"):
        ITI(top=3, sigma_texts=["w1"]).fit(llama, QUESTIONS)
    ones = [{"text": f"w{i}", "label": int(i < 7)} for i in range(8)]
    with pytest.raises(HeadscopeError, match="one label alone"):
        ITI(top=3).fit(llama, ones)


def test_it_is_saved_with_its_record(llama: LanguageModel, tmp_path: Path) -> None:
    found = ITI(top=3).fit(llama, QUESTIONS, progress=False)
    path = found.save(tmp_path / "iti", llama)
    assert load_intervention(path, llama) == found.edit
    record = json.loads((tmp_path / "iti.json").read_text())
    assert record["summary"]["heads"] == [list(head) for head in found.heads] and record["summary"]["n"] == 9
    assert record["provenance"]["data"]["questions"] == 15 and record["provenance"]["parameters"]["alpha"] == 15
