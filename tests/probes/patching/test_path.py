"""Path patching equals the loop of the paper written with plain hooks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.edges import edge_attribution
from headscope.probes.patching.nodes import Node
from headscope.probes.patching.pairs import Pairs
from headscope.probes.patching.path import Stage, path_effect, path_patching

LAYERS, HEADS, D = 3, 4, 8
CLOSE = dict(rtol=1e-4, atol=2e-5)  # as in test_activation, of two passes


def loop(plain, pairs, i, senders, receivers, at, freeze_mlps=False, mlps=()) -> float:
    """D' - D_clean of one pair. ``receivers``: (layer, head, "q" or "z"), or () for the last layer's output; ``at``:
    positions patched, of senders and receivers."""
    n = int(pairs.lengths[i])
    clean, corrupt = pairs.clean[i, :n], pairs.corrupt[i, :n]
    own, given = plain.z(clean), plain.z(corrupt)
    own_mlp, given_mlp = plain.outputs(plain.mlp, clean), plain.outputs(plain.mlp, corrupt)
    kept, hooks = {}, []

    def freeze(layer):
        def hook(m, args):
            kept["z", layer] = args[0].clone().view(n, HEADS, D)  # before it is frozen
            x = own[layer].clone()
            for head in [h for at_layer, h in senders if at_layer == layer]:
                x[at, head] = given[layer][at, head]
            return (x.reshape(args[0].shape), *args[1:])

        return plain.out[layer].register_forward_pre_hook, hook

    def freeze_mlp(layer):
        def hook(m, args, out):
            x = own_mlp[layer].clone() if freeze_mlps else out.clone().view(n, -1)
            if layer in mlps:
                x[at] = given_mlp[layer].view(n, -1)[at]
            return x.view(out.shape)

        return plain.mlp[layer].register_forward_hook, hook

    def keep(layer):
        return plain.q[layer].register_forward_hook, lambda m, a, out: kept.update(
            {("q", layer): out.clone().view(n, HEADS, D)}
        )

    def keep_last(m, a, out):
        kept["end"] = (out[0] if isinstance(out, tuple) else out).clone()

    for layer in range(LAYERS):
        hooks += [freeze(layer)]
        hooks += [freeze_mlp(layer)] if freeze_mlps or layer in mlps else []
        hooks += [keep(layer)] if any(c == "q" for _, _, c in receivers) else []
    with plain.hooked(*hooks, (plain.blocks[-1].register_forward_hook, keep_last)):
        plain(clean)

    def give(layer, component):
        def change(x):
            x = x.clone()
            for _, head, _ in [r for r in receivers if r[0] == layer and r[2] == component]:
                x.view(n, HEADS, D)[at, head] = kept[component, layer][at, head]
            return x

        if component == "q":
            return plain.q[layer].register_forward_hook, lambda m, a, out: change(out)
        return plain.out[layer].register_forward_pre_hook, lambda m, a: (change(a[0]), *a[1:])

    def end(m, a, out):
        held = (out[0] if isinstance(out, tuple) else out).clone()
        held.view(n, -1)[at] = kept["end"].view(n, -1)[at]
        return (held, *out[1:]) if isinstance(out, tuple) else held

    last = [give(layer, component) for layer, component in {(r[0], r[2]) for r in receivers}]
    with plain.hooked(*last, *([] if receivers else [(plain.blocks[-1].register_forward_hook, end)])):
        patched = plain.difference(plain(clean), pairs, i)
    return patched - plain.difference(plain(clean), pairs, i)


def named(receivers) -> str:
    return ",".join(f"L{layer}H{head}.{c}" for layer, head, c in receivers) or "logits"


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("receivers", [(), ((2, 1, "z"),), ((2, 0, "z"), (1, 3, "z"))], ids=named)
def test_it_is_the_paper_s_loop(lm: LanguageModel, plain, pairs: Pairs, receivers, freeze_mlps, unchanged) -> None:
    found = path_patching(
        lm, pairs, named(receivers), freeze_mlps=freeze_mlps, normalize=False, batch_size=3, together=5
    )
    end = [int(n) - 1 for n in pairs.lengths]
    for layer, head in ((0, 1), (1, 2)):
        want = [loop(plain, pairs, i, [(layer, head)], receivers, [end[i]], freeze_mlps) for i in range(5)]
        np.testing.assert_allclose(found.trials[:, layer, head], want, **CLOSE)
    assert np.nanmax(np.abs(found.trials)) > 1e-3, "the authors' code gives 0 for z"
    assert bool(np.isnan(found.trials[:, 2]).all()) == bool(receivers)
    assert unchanged()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_queries_of_several_layers(pairs: Pairs, tiny_model, make_plain, kind: str) -> None:
    """A sender between the lowest and the highest receiver counts, which the authors' code leaves out."""
    lm = tiny_model(kind)
    plain, receivers = make_plain(lm), ((1, 0, "q"), (2, 2, "q"))
    found = path_patching(lm, pairs, named(receivers), positions=(2, 5), normalize=False)
    for sender in ((0, 1), (0, 3), (1, 2), (1, 0)):
        want = [loop(plain, pairs, i, [sender], receivers, slice(2, 5)) for i in range(5)]
        np.testing.assert_allclose(found.trials[:, *sender], want, **CLOSE)
    one = path_patching(lm, pairs, [Node(2, 2, "q")], normalize=False)
    two = path_patching(lm, pairs, "L2H2", component="q", normalize=False)
    assert np.array_equal(one.trials, two.trials, equal_nan=True)


def test_sets_of_heads_and_mlps(lm: LanguageModel, plain, pairs: Pairs) -> None:
    for freeze in (False, True):
        found = path_effect(lm, pairs, ["L0H1", "L1H2", "L0MLP"], "L2H1.z", freeze_mlps=freeze, normalize=False)
        want = [
            loop(plain, pairs, i, [(0, 1), (1, 2)], ((2, 1, "z"),), slice(None), freeze, mlps=(0,)) for i in range(5)
        ]
        np.testing.assert_allclose(found, want, **CLOSE)


def test_everything_sent_everywhere_is_the_corrupt_run(lm: LanguageModel, pairs: Pairs) -> None:
    """All heads and MLPs corrupt: only what enters the first layer is clean, the same in both prompts at the end."""
    senders = [f"L{n}H{h}" for n in range(LAYERS) for h in range(HEADS)] + [f"L{n}MLP" for n in range(LAYERS)]
    np.testing.assert_allclose(path_effect(lm, pairs, senders, positions=-1).mean(), 1, atol=1e-4)


def test_the_published_number(lm: LanguageModel, pairs: Pairs) -> None:
    ours, theirs = path_patching(lm, pairs), path_patching(lm, pairs, published=True)
    assert len(theirs.trials) == 1 and theirs.provenance["unit"].startswith("-100")
    np.testing.assert_allclose(theirs.mean, -100 * ours.mean, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on(tiny_model, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third step: two are on disk, and are not run again."""
    lm, asked, settings = tiny_model("llama"), [], dict(receivers="L1H1.q", together=2, batch_size=3, progress=False)
    effects = Stage.effects

    def counted(self, groups):
        asked.append(groups)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return effects(self, groups)

    monkeypatch.setattr(Stage, "effects", counted)
    stop = 0
    whole = path_patching(lm, pairs, **settings)
    assert len(asked) == 4  # two batches, four senders
    for stop, words in ((3, 3), (0, 2)):
        asked.clear()
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            found = path_patching(lm, pairs, out=tmp_path, **settings)
        assert len(asked) == words
    assert np.array_equal(found.trials, whole.trials, equal_nan=True)
    kept = HeadScores.load(tmp_path / "path_patching.json")
    assert np.array_equal(kept.trials, whole.trials, equal_nan=True)
    for other in ({"receivers": "L1H0.q"}, {"metric": lambda logits, those: logits[:, 0]}):
        with pytest.raises(HeadscopeError, match="other settings"):
            path_patching(lm, pairs, out=tmp_path, **settings | other)


def test_a_name_is_not_taken_for_other_tokens(tiny_model, pairs: Pairs, tmp_path: Path) -> None:
    lm, settings = tiny_model("llama"), dict(receivers="L1H1.q", positions="s", out=tmp_path, progress=False)
    here, there = (replace(pairs, spans={"s": [(first, first + 1)] * 5}) for first in (2, 3))
    path_patching(lm, here, **settings)
    with pytest.raises(HeadscopeError, match="other settings .where"):
        path_patching(lm, there, **settings)


def test_a_span_an_example_is_cut_with_the_batches(tiny_model, pairs: Pairs) -> None:
    """Spans are of the pairs, not of whatever batch they are run in."""
    lm, spans = tiny_model("llama"), [(int(n) - 1 - 4 * (i % 2), int(n)) for i, n in enumerate(pairs.lengths)]

    def effect(positions: object, batch: int) -> np.ndarray:
        return path_effect(lm, pairs, "L0H1", "L2H1.v", positions=positions, batch_size=batch)

    assert np.allclose(effect(spans, 2), effect(spans, 9), **CLOSE)
    assert not np.allclose(effect(spans, 9), effect(-1, 9), **CLOSE)
    paths = [path_patching(lm, pairs, "L2H0.v", positions=spans, batch_size=n, progress=False) for n in (2, 9)]
    estimates = [attribution_patching(lm, pairs, positions=spans, batch_size=n, progress=False) for n in (2, 9)]
    edges = [edge_attribution(lm, pairs, positions=spans, batch_size=n, sample=0, progress=False) for n in (2, 9)]
    for one, two in (
        [found.trials for found in paths],
        [found.scores.trials for found in estimates],
        [found.values for found in edges],
    ):
        assert np.allclose(one, two, equal_nan=True, **CLOSE)


def test_one_sender_by_name_and_logits_in_a_list(lm: LanguageModel, pairs: Pairs) -> None:
    assert np.array_equal(path_effect(lm, pairs, "L0H1"), path_effect(lm, pairs, ["L0H1"], ["logits"]))


def test_equal_prompts_send_nothing(lm: LanguageModel, pairs: Pairs) -> None:
    found = path_patching(lm, replace(pairs, corrupt=pairs.clean), "L2H0.v", normalize=False)
    assert np.nanmax(np.abs(found.trials)) < 1e-5


def test_nodes_by_name_and_what_is_refused(pairs: Pairs, tiny_model, unchanged_of) -> None:
    assert [str(Node.of(x)) for x in ("L3H2.q", "l3mlp", (3, 2))] == ["L3H2.q", "L3MLP", "L3H2"]
    lm = tiny_model("llama")
    check = unchanged_of(lm)
    for call, words in (
        (lambda: path_patching(lm, pairs, "H3"), "names no node"),
        (lambda: path_patching(lm, pairs, []), "no heads were given"),
        (lambda: path_effect(lm, pairs, "L0H0", ["logits", "L2H1"]), "the logits are no head"),
        (lambda: path_effect(lm, pairs, ["L0H0"], HeadSet(())), "no heads were given"),
        (lambda: path_patching(lm, pairs, "L0H0"), "none can send"),
        (lambda: path_patching(lm, pairs, "L5H0"), "has no L5H0.q"),
        (lambda: path_patching(lm, pairs, "L2H0", component="o"), "no component"),
        (lambda: path_effect(lm, pairs, []), "at least one sender"),
        (lambda: path_effect(lm, pairs, ["L8H0"]), "has no L8H0"),
        (lambda: path_patching(lm, pairs, (2, -1)), "count from 0"),
        (lambda: path_effect(lm, pairs, ["L0H1.q"]), "is no sender"),
        (lambda: path_effect(lm, pairs, ["L0H1", "L2H1"], "L1H0.q"), "L2H1 can send nothing to L1H0.q"),
        (lambda: path_effect(lm, pairs, ["L1H1"], "L1H0.q"), "not before them"),
        (lambda: path_effect(lm, pairs, ["L0H1"], positions=(3, 100)), "reach beyond prompt 0 of 9 tokens"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            call()
    assert check()
