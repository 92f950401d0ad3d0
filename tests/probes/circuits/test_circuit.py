"""Circuits: files, comparison, and a planted one that is found and is all that there is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.probes.circuits import evaluation, finding
from headscope.probes.circuits.ablation import ablated
from headscope.probes.circuits.circuit import Circuit, Edge, compare_circuits
from headscope.probes.circuits.evaluation import evaluate_circuit, faithfulness_curve
from headscope.probes.circuits.figure import circuit_figure
from headscope.probes.circuits.finding import find_circuit, measure_edges
from headscope.probes.circuits.ioi import ioi
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.pairs import Pairs
from headscope.probes.patching.path import path_effect

PLANTED = {(0, 1), (1, 2), (2, 3)}


def test_a_file_comes_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    edges = (Edge("L0H1", "L1H2.q", 0.5), Edge("L1H2", "logits", -0.25))
    circuit = Circuit(HeadSet(((0, 1), (1, 2)), (0.75, -0.25)), (3, 4), (1,), edges, "mine", {"seed": 1})
    path = circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(path)
    assert (again.heads.heads, again.heads.weights, again.mlps) == (circuit.heads.heads, (0.75, -0.25), (1,))
    assert (again.edges, again.size, again.provenance) == (edges, (3, 4), {"seed": 1})
    held = json.loads(path.read_text())
    held["edges"][0]["weight"] = 0.6
    path.write_text(json.dumps(held))
    for bad in (path, tmp_path / "none.json"):
        with pytest.raises(HeadscopeError, match="is not a circuit"):
            Circuit.load(bad)
    with pytest.raises(HeadscopeError, match="has no L3H0"):
        Circuit(HeadSet(((3, 0),)), (3, 4))


def test_overlap_beside_chance() -> None:
    """Two heads of four in one layer, both shared: of the 6 ways to lay them 1 shares both, and the mean is 1."""
    one = Circuit(HeadSet(((0, 0), (0, 1))), (1, 4))
    found = compare_circuits(one, one, draws=6000)
    assert (found["shared"], found["jaccard"]) == (2, 1)
    assert abs(found["p"] - 1 / 6) < 4 * np.sqrt(5 / 36 / 6000) + 1 / 6000  # four standard errors
    assert abs(found["expected"] - 1) < 4 * np.sqrt(1 / 3 / 6000)
    two = Circuit(HeadSet(((0, 2), (0, 3))), (1, 4))
    assert compare_circuits(one, two)["p"] == 1
    with pytest.raises(HeadscopeError, match="different models"):
        compare_circuits(one, Circuit(HeadSet(((0, 0),)), (2, 4)))


@pytest.mark.parametrize("method", ["attribution", "path"])
def test_a_planted_circuit_is_found(planted: LanguageModel, pairs: Pairs, method: str) -> None:
    found = find_circuit(planted, pairs, 3, method, threshold=1e-4)
    assert set(found.heads) == PLANTED
    edges = measure_edges(planted, pairs, found, threshold=1e-4)
    senders = {edge.sender for edge in (*edges.edges, *(found.edges if method == "path" else ()))}
    assert senders == {"L0H1", "L1H2", "L2H3"}
    assert {e.receiver.split(".")[0] for e in edges.edges} <= {"logits", "L1H2", "L2H3"}
    assert not edges.provenance["edges_ended"] and edges.provenance["edge_passes"] == 2 * (3 + 3 * 2 + 3 * 1)
    drawn = circuit_figure(edges)
    assert len(drawn.data) == len(edges.edges) + 2


@pytest.mark.parametrize("method", ["attribution", "path"])
def test_mlps_are_nodes_where_asked(planted: LanguageModel, pairs: Pairs, method: str) -> None:
    """Only the MLP of layer 1 writes anything beside the planted heads; edges are single paths, all else held."""
    with torch.no_grad():
        for layer in (0, 2):
            planted.model.model.layers[layer].mlp.down_proj.weight *= 1e-7
    found = find_circuit(planted, pairs, 4, method, mlps=True, threshold=1e-4)
    assert (set(found.heads), found.mlps) == (PLANTED, (1,))
    edges = measure_edges(planted, pairs, found, threshold=1e-4)
    assert {e.sender for e in edges.edges} == {"L0H1", "L1H2", "L1MLP", "L2H3"}
    into = [e for e in edges.edges if e.receiver == "L1MLP"]
    assert {e.sender for e in into} == {"L0H1", "L1H2"} and "L2H3.v" in {e.receiver for e in edges.edges}
    for edge in into:
        true = path_effect(planted, pairs, [edge.sender], edge.receiver, freeze_mlps=True).mean()
        assert edge.weight == pytest.approx(true, rel=1e-4, abs=1e-6)
    held = evaluate_circuit(planted, found, pairs, randoms=0, subsets=0)
    assert held.summary["value"].tolist() == pytest.approx([1, 0], abs=1e-4)
    assert list(held.nodes.node) == [*(f"L{n}H{h}" for n, h in found.heads), "L1MLP"]


def test_a_killed_search_goes_on(
    planted: LanguageModel, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, effects, stop = [], finding.direct_effects, 0

    def counted(*args):
        asked.append(args)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return effects(*args)

    monkeypatch.setattr(finding, "direct_effects", counted)
    whole = find_circuit(planted, pairs, 4, "path", threshold=1e-4)  # a fourth there is not: all three are asked
    count, settings = len(asked), dict(threshold=1e-4, out=tmp_path / "search.jsonl")
    for stop, left in ((3, 3), (0, count - 2)):
        asked.clear()
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            found = find_circuit(planted, pairs, 4, "path", **settings)
        assert len(asked) == left
    assert (found.edges, found.heads) == (whole.edges, whole.heads) and count == 1 + 3 + 3
    with pytest.raises(HeadscopeError, match="other settings"):
        find_circuit(planted, pairs, 2, "path", **settings)


def test_nodes_that_stand_in_for_each_other(
    planted: LanguageModel, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is there if any of L0H0, L0H1, L0H2 is. Of the first two none is needed by itself, each is where K
    holds the other; and where K holds both, the model still has the third, which the circuit has not."""

    def told(lm, circuits, pairs, **settings):
        some = np.array([circuit.mask[0, :3].any() for circuit in circuits], dtype=float)
        return some[:, None] * np.linspace(0.5, 1.5, len(pairs))

    monkeypatch.setattr(evaluation, "ablated", told)
    circuit = Circuit(HeadSet(((0, 0), (0, 1))), (3, 4))
    found = evaluate_circuit(planted, circuit, pairs, randoms=0, subsets=16, searched=16)
    assert found.nodes["minimality"].tolist() == [0, 0] and found.nodes["largest"].tolist() == [1, 1]
    row = found.summary.set_index("measure").loc["incompleteness"]
    share = row["value"]  # the share of 16 halves that hold both, a quarter of them
    assert 0 < share < 0.75 and share * 16 == pytest.approx(round(share * 16))
    assert row["ci_low"] == pytest.approx(share) == row["ci_high"]  # parts and whole are drawn together
    plain = evaluate_circuit(planted, circuit, pairs, randoms=0, subsets=2)
    assert plain.nodes["largest"].tolist() == [0, 0]
    with pytest.raises(HeadscopeError, match="searched=3"):
        evaluate_circuit(planted, circuit, pairs, subsets=2, searched=3)


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_the_planted_circuit_is_all_there_is(planted: LanguageModel, pairs: Pairs, ablation: str) -> None:
    circuit = Circuit(HeadSet(tuple(sorted(PLANTED))), (3, 4))
    found = evaluate_circuit(planted, circuit, pairs, ablation=ablation, randoms=6, subsets=3)
    value = found.summary.set_index("measure")["value"]
    np.testing.assert_allclose(
        [value["faithfulness"], value["complement"], value["incompleteness"]], [1, 0, 0], atol=1e-4
    )
    assert len(found.random) == 6
    assert list(found.nodes.node) == ["L0H1", "L1H2", "L2H3"]
    assert 1 / 7 <= found.p <= 1 and json.dumps(found.document())


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_ablation_is_the_same_by_plain_hooks(planted: LanguageModel, pairs: Pairs, ablation: str) -> None:
    pairs = replace(pairs, groups=torch.arange(8) % 2)
    circuit = Circuit(HeadSet(((0, 1), (2, 0))), (3, 4), (0, 2))
    found = ablated(planted, [circuit], pairs, ablation=ablation, batch_size=3)[0]
    attention = [block.self_attn.o_proj for block in planted.model.model.layers]
    mlps = [block.mlp for block in planted.model.model.layers]
    z, written = [], []
    hooks = [m.register_forward_pre_hook(lambda m, a: z.append(a[0].clone())) for m in attention]
    hooks += [m.register_forward_hook(lambda m, a, o: written.append(o.clone())) for m in mlps]
    planted.model(input_ids=pairs.corrupt)
    for hook in hooks:
        hook.remove()

    def put(x):
        if ablation == "resample":
            return x
        return torch.stack([x[i % 2 :: 2].mean(0) for i in range(8)]) if ablation == "mean" else torch.zeros_like(x)

    def change(layer):
        def hook(m, args):
            x, given = args[0].clone().view(8, 9, 4, 8), put(z[layer]).view(8, 9, 4, 8)
            for head in range(4):
                if not circuit.mask[layer, head]:
                    x[:, :, head] = given[:, :, head]
            return (x.flatten(2),)

        return hook

    hooks = [m.register_forward_pre_hook(change(n)) for n, m in enumerate(attention)]
    hooks.append(mlps[1].register_forward_hook(lambda m, a, o: put(written[1])))
    with torch.no_grad():
        logits = planted.model(input_ids=pairs.clean).logits[:, -1]
    for hook in hooks:
        hook.remove()
    want = logits[range(8), pairs.answers] - logits[range(8), pairs.others]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)  # as in test_activation


def test_the_curve_ends_at_the_model(planted: LanguageModel, pairs: Pairs) -> None:
    scores = attribution_patching(planted, pairs).scores
    curve = faithfulness_curve(planted, scores, pairs, [1, 3, 12], randoms=4)
    np.testing.assert_allclose(curve.faithfulness.iloc[1:], 1, atol=1e-4)
    assert curve.random.iloc[2] == pytest.approx(1, abs=1e-4) and curve.random.iloc[1] < 1
    assert (curve.random_low <= curve.random + 1e-9).all() and (curve.random <= curve.random_high + 1e-9).all()


def test_a_budget_ends_a_search_and_bad_inputs_are_refused(planted: LanguageModel, pairs: Pairs) -> None:
    found = find_circuit(planted, pairs, 3, "path", budget=24, threshold=1e-4)
    assert found.provenance["passes"] == 24 and (found.provenance["ended"] or len(found.heads) == 3)
    scores = HeadScores("any", np.ones((1, 3, 4)))
    for call, words in (
        (lambda: find_circuit(planted, pairs, 3, "path", budget=10), "raise the budget"),
        (lambda: find_circuit(planted, pairs, 3, "guess"), "method is"),
        (lambda: find_circuit(planted, pairs, 99), "choose 1 to 12"),
        (lambda: evaluate_circuit(planted, Circuit(HeadSet(((0, 0),)), (2, 4)), pairs), "the model has"),
        (lambda: ablated(planted, [found], pairs, ablation="noise"), "ablation is"),
        (lambda: evaluate_circuit(planted, found, pairs, randoms=-1), "randoms is a whole number of at least 0"),
        (lambda: evaluate_circuit(planted, found, pairs, together=0), "together is"),
        (lambda: faithfulness_curve(planted, scores, pairs, []), "no sizes were given"),
        (lambda: compare_circuits(found, found, draws=0), "draws is"),
        (lambda: ioi(planted, templates=[]), "no templates were given"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            call()
