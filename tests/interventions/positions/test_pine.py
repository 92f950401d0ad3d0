"""PINE against its specification written out, document by document and row by row, in float64.

Tolerance: 1e-5 of the largest logit, as for every edit in float32 (see test_ablate.py); a wrong rank or place moves
more than 1e-2 of it. Orders of documents: 1e-4, the issue's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.statistics import SpanMass
from headscope.interp.statistics.spans import published_spans
from headscope.interventions import HeadTemperature, KnockOut, Pine, apply
from headscope.kernels.attention import attend
from headscope.kernels.request import Request

PREFIX, LENGTHS, SUFFIX = 2, (3, 2, 4), 3
WHOLE = PREFIX + sum(LENGTHS) + SUFFIX
DOCUMENTS = [(2, 5), (5, 7), (7, 11)]


def specification(dense: Any, documents: list[tuple[int, int]], scale: float, flat: bool = False) -> Callable:
    """The pattern of one prompt, as the paper and its code place queries and keys. ``flat``: no ranks (a mistake)."""
    begin, end = documents[0][0], documents[-1][1]
    sizes = [stop - first for first, stop in documents]

    def places(order: list[int]) -> dict[int, int]:
        """The position of every document's key when the documents rank in this order, the nearest first."""
        found, after = {}, end
        for d in order:
            first, stop = documents[d]
            for k in range(first, stop):
                found[k] = after - (stop - k)
            after -= sizes[d]
        return found

    def hand(layer: int, q: Tensor, k: Tensor) -> Tensor:
        count = k.shape[2]
        of = [next((d for d, (a, b) in enumerate(documents) if a <= j < b), -1) for j in range(count)]
        pattern = torch.zeros(1, q.shape[1], count, count, dtype=torch.float64)
        for h in range(q.shape[1]):
            raw = scale * q[0, h] @ k[0, h].T
            importance = torch.zeros(len(documents), len(documents), dtype=torch.float64)
            for i, j in itertools.permutations(range(len(documents)), 2):
                others = [x for x in range(begin, end) if of[x] != i]
                for x in range(*documents[i]):
                    a = dict(zip(others, raw[x, others].softmax(-1).tolist(), strict=True))
                    importance[i, j] += sum(a[y] for y in range(*documents[j])) / sizes[j]
            for row in range(count):
                own, seen, at, here = of[row], list(range(row + 1)), {j: j for j in range(count)}, row
                if own >= 0:
                    seen = [j for j in range(end) if j < begin or of[j] != own or j <= row]
                    here = row + end - documents[own][1]
                    rank = sorted(range(len(documents)), key=lambda d: (d != own, -float(importance[own, d])))
                    at |= places(rank)
                elif row >= end:
                    a = raw[row, begin:end].softmax(-1)
                    mean = [float(a[x - begin : y - begin].mean()) for x, y in documents]
                    at |= places(sorted(range(len(documents)), key=lambda d: 0 if flat else -mean[d]))
                turned = dense.rope(q[0, h, row], torch.tensor(here))
                keys = dense.rope(k[0, h, seen], torch.tensor([at[j] for j in seen]))
                pattern[0, h, row, seen] = (scale * keys @ turned).softmax(-1)
        return pattern

    return hand


def prompts(count: int = 1) -> Tensor:
    return torch.randint(2, 64, (count, WHOLE), generator=torch.Generator().manual_seed(3))


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= share * float(b.abs().max())


@pytest.mark.parametrize("documents", [DOCUMENTS, [(2, 5), (5, 11)], [(0, 3), (3, 4), (4, 8), (8, 11)]])
def test_it_is_the_specification_written_out(model: Any, dense: Any, documents: list[tuple[int, int]]) -> None:
    ids = prompts()
    with apply(model, Pine(documents=documents)):
        found = dense.logits(model, ids)
    wanted = dense.expected(model, ids, specification(dense, documents, 8**-0.5))
    assert close(found, wanted)
    assert not close(dense.expected(model, ids, specification(dense, documents, 8**-0.5, flat=True)), wanted, 1e-2)
    assert not close(dense.logits(model, ids), wanted, 1e-2)


def test_batches_with_padding_and_documents_of_their_own(model: Any, dense: Any) -> None:
    ids, each = prompts(2), [DOCUMENTS, [(1, 4), (4, 8)]]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with apply(model, Pine(documents=each)):
        found = dense.logits(model, ids, mask)
    for row, cut in ((0, 0), (1, 3)):
        alone = ids[row : row + 1, cut:]
        assert close(found[row : row + 1, cut:], dense.expected(model, alone, specification(dense, each[row], 8**-0.5)))


def test_documents_by_name(model: Any, dense: Any) -> None:
    ids = prompts(2)
    spans = {"document_0": (2, 5), "document_1": [(5, 7), (5, 9)], "document_2": [(7, 11), (9, 11)]}
    with apply(model, Pine(documents=[DOCUMENTS, [(2, 5), (5, 9), (9, 11)]])):
        found = dense.logits(model, ids)
    with apply(model, Pine()), published_spans(spans):
        assert torch.equal(dense.logits(model, ids), found)
    with pytest.raises(HeadscopeError, match="no span is called 'document_0'"), apply(model, Pine()):
        dense.logits(model, ids)


def orders(ids: Tensor) -> list[tuple[Tensor, list[tuple[int, int]]]]:
    """The prompt (1, position) with its documents in every order, and where they then are."""
    found = []
    for order in itertools.permutations(DOCUMENTS):
        parts, spans, at = [ids[:, : DOCUMENTS[0][0]]], [], DOCUMENTS[0][0]
        for first, stop in order:
            parts.append(ids[:, first:stop])
            spans.append((at, at := at + stop - first))
        found.append((torch.cat([*parts, ids[:, DOCUMENTS[-1][1] :]], 1), spans))
    return found


@pytest.mark.parametrize("padding", [0, 3])
def test_the_suffix_does_not_know_the_order_of_documents(model: Any, dense: Any, padding: int) -> None:
    """Also in cached greedy generation, and padded on the left beside a longer prompt."""
    results, texts, plain = [], [], []
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    for ids, spans in orders(prompts()):
        mask = torch.ones(1, WHOLE + padding, dtype=torch.long)
        mask[:, :padding] = 0
        ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
        with apply(model, Pine(documents=spans)):
            results.append(dense.logits(model, ids, mask)[:, -SUFFIX:])
            texts.append(model.generate(ids, attention_mask=mask, **options)[:, -5:].tolist())
        plain.append(dense.logits(model, ids, mask)[:, -SUFFIX:])
    spread, unedited = (float((torch.stack(x) - x[0]).abs().max()) for x in (results, plain))
    assert spread <= 1e-4 and unedited > 1e-1, (spread, unedited)
    assert all(text == texts[0] for text in texts)


def test_a_trace_sees_the_edited_pattern(model: Any, dense: Any) -> None:
    """Rows of the first document see the last one, and every row's masses are those of the pattern by hand."""
    ids, patterns = prompts(), []
    hand = specification(dense, DOCUMENTS, 8**-0.5)
    dense.expected(model, ids, lambda layer, q, k: patterns.append(p := hand(layer, q, k)) or p)
    with apply(model, Pine(documents=DOCUMENTS)), trace(model, [SpanMass({"last": DOCUMENTS[2]})]) as tracer:
        dense.logits(model, ids)
    found = torch.tensor(
        tracer.record["span_mass"].sel(span="last").transpose("example", "layer", "head", "query").data
    )
    wanted = torch.stack(patterns, 1)[..., slice(*DOCUMENTS[2])].sum(-1)
    assert float((found - wanted).abs().max()) < 1e-5 and float(found[0, 0, :, 2].min()) > 0


def test_every_engine_and_form_of_it_agrees(model: Any, dense: Any) -> None:
    """Streaming and the dense definition, whole tiles and single pairs, some of the heads and all."""
    held: list[Any] = []

    class Keep(Handler):
        def edit(self, call: Any) -> Any:
            held.append(call)
            return call

    with apply(model, Pine(documents=DOCUMENTS)), attached(model, Keep()):
        dense.logits(model, prompts())
    call = held[0]
    request = Request(lse=True, entropy=True)
    with torch.no_grad():
        one, two = (attend(call.inputs(), call.value, request=request, engine=x) for x in ("reference", "streaming"))
    assert close(one.output, two.output) and close(one.entropy, two.entropy) and close(one.lse, two.lse)
    scores = torch.zeros(1, 4, WHOLE, WHOLE)
    index = [torch.arange(n) for n in scores.shape]
    with torch.no_grad():
        whole = call.score_edit.tile(scores, *index)
    pairs = torch.randint(0, WHOLE, (1, 1, WHOLE, 2))
    b, h, q, _ = (x.view([-1 if i == j else 1 for j in range(4)]) for i, x in enumerate(index))
    with torch.no_grad():
        few = call.score_edit(torch.zeros(1, 4, WHOLE, 2), b, h, q, pairs)
    assert close(few, whole.gather(-1, pairs.expand(1, 4, -1, -1)))
    with apply(model, Pine(documents=DOCUMENTS)):
        found = dense.logits(model, prompts())
    with apply(model, Pine(heads=[(layer, head) for layer in range(2) for head in range(4)], documents=DOCUMENTS)):
        assert torch.equal(dense.logits(model, prompts()), found)


def test_what_it_refuses(model: Any, dense: Any) -> None:
    ids = prompts()
    with pytest.raises(HeadscopeError, match="do not follow one another"):
        Pine(documents=[(2, 4), (5, 7)])
    with pytest.raises(HeadscopeError, match="is empty"):
        Pine(documents=[(2, 2), (2, 7)])
    with pytest.raises(HeadscopeError, match="read in one pass"), apply(model, Pine(documents=DOCUMENTS)):
        dense.logits(model, ids[:, :6])
    with pytest.raises(HeadscopeError, match="position_ids that count otherwise"):
        with apply(model, Pine(documents=DOCUMENTS)):
            dense.logits(model, ids, position_ids=torch.arange(WHOLE)[None] * 2)
    with pytest.raises(HeadscopeError, match="two edits of positions"):
        with apply(model, Pine(documents=DOCUMENTS) + Pine(documents=DOCUMENTS)):
            dense.logits(model, ids)
    with pytest.warns(UserWarning, match="changed nothing"), apply(model, Pine(documents=[(2, 5)])):
        dense.logits(model, ids)
    dynamic = dense.tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(HeadscopeError, match="change with the length"), apply(dynamic, Pine(documents=DOCUMENTS)):
        raise AssertionError("entered")


def test_edits_of_scores_act_on_the_new_scores(model: Any, dense: Any) -> None:
    """Before it or after it: a temperature and a knockout by hand."""
    ids, hot, cut = prompts(), HeadTemperature(temperature=2.0), KnockOut(span=(1, 3))

    def hand(layer: int, q: Tensor, k: Tensor) -> Tensor:
        p = specification(dense, DOCUMENTS, 8**-0.5)(layer, q, k)
        p[..., 1:3] = 0
        return p / p.sum(-1, keepdim=True).clamp(min=1e-300)

    wanted = dense.expected(model, ids, hand)
    for edit in (cut + Pine(documents=DOCUMENTS), Pine(documents=DOCUMENTS) + cut):
        with apply(model, edit):
            assert close(dense.logits(model, ids)[:, 1:], wanted[:, 1:])
    colder = dense.expected(model, ids, specification(dense, DOCUMENTS, 8**-0.5 / 2))
    with apply(model, hot + Pine(documents=DOCUMENTS)):
        assert close(dense.logits(model, ids), colder)


@pytest.mark.slow
def test_smollm2_reads_shuffled_documents_alike(smollm2: Any) -> None:
    """Three facts in two orders: the same logits and the same answer, where the unedited model's logits move."""
    texts = [" The red box holds a coin.", " The blue box is empty.", " The green box holds seven old brass keys."]
    before, after = "Here are some notes.", " Question: what does the green box hold? Answer: The green box holds"
    answers, last, plain = [], [], []
    for order in ((0, 1, 2), (2, 0, 1)):
        pieces = [smollm2.tokenizer(x, add_special_tokens=False)["input_ids"] for x in [texts[i] for i in order]]
        ids, spans = smollm2.tokenizer(before)["input_ids"], []
        for piece in pieces:
            spans.append((len(ids), len(ids) + len(piece)))
            ids = ids + piece
        ids = torch.tensor([ids + smollm2.tokenizer(after, add_special_tokens=False)["input_ids"]])
        with apply(smollm2, Pine(documents=spans)), torch.no_grad():
            last.append(smollm2.model(ids).logits[0, -5:])
            answers.append(smollm2.model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
        with torch.no_grad():
            plain.append(smollm2.model(ids).logits[0, -5:])
    assert float((last[0] - last[1]).abs().max()) <= 1e-4 * float(last[0].abs().max())
    assert float((plain[0] - plain[1]).abs().max()) > 1e-1 and answers[0] == answers[1]
