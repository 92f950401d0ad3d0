"""Pairs of the IOI task and of coloured objects align token by token; SmolLM2 does the first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.circuits.circuit import compare_circuits
from headscope.probes.circuits.coloured import coloured_objects
from headscope.probes.circuits.evaluation import evaluate_circuit, top_circuit
from headscope.probes.circuits.ioi import ioi
from headscope.probes.patching.attribution import attribution_patching


@pytest.mark.slow
def test_pairs_differ_in_the_second_subject_alone(smollm2: LanguageModel) -> None:
    pairs = ioi(smollm2, 48)
    tokens = smollm2.tokenizer.convert_ids_to_tokens
    for i, n in enumerate(pairs.lengths.tolist()):
        differ = np.flatnonzero(pairs.clean[i] != pairs.corrupt[i])
        (s2,) = differ
        assert pairs.spans["s2"][i] == (s2, s2 + 1) and pairs.spans["end"][i] == (n - 1, n)
        assert pairs.clean[i, s2] == pairs.others[i] and pairs.corrupt[i, s2] == pairs.answers[i]
        assert pairs.clean[i, slice(*pairs.spans["io"][i])] == pairs.answers[i]
        assert tokens(int(pairs.clean[i, n - 1])) == "Ġto"
    for group in range(12):
        rows = pairs.clean[pairs.groups == group]
        assert len(rows) == 4 and len(set(pairs.lengths[pairs.groups == group].tolist())) == 1
        assert ((rows != rows[0]).any(0).sum()) <= 5  # two names, S2, a place and a thing
    one, two = ioi(smollm2, 12, seed=3), ioi(smollm2, 12, seed=3)
    assert torch.equal(one.clean, two.clean) and not torch.equal(one.clean, ioi(smollm2, 12, seed=4).clean)


@pytest.mark.slow
def test_coloured_objects_ask_for_another_object(smollm2: LanguageModel) -> None:
    pairs = coloured_objects(smollm2, 20)
    text = smollm2.tokenizer.decode(pairs.clean[0, : pairs.lengths[0]])
    assert text.count("What color is the") == 2 and text.endswith("?\nA:")
    for i in range(20):
        (at,) = np.flatnonzero(pairs.clean[i] != pairs.corrupt[i])
        assert pairs.spans["object"][i] == (at, at + 1) and pairs.answers[i] != pairs.others[i]
        answer = smollm2.tokenizer.decode(pairs.answers[i]).strip().lower()
        thing = smollm2.tokenizer.decode(pairs.clean[i, at]).strip()
        assert f"{answer} {thing}" in smollm2.tokenizer.decode(pairs.clean[i, : pairs.lengths[i]])
        colours = [
            smollm2.tokenizer.decode(pairs.clean[i, slice(*pairs.spans[name][i])]).strip()
            for name in ("right", "wrong_0", "wrong_1")
        ]
        assert colours[0] == answer and len(set(colours)) == 3
        assert smollm2.tokenizer.decode(pairs.others[i]).strip().lower() in colours[1:]


@pytest.mark.slow
def test_a_circuit_of_smollm2_beats_random_ones(smollm2: LanguageModel) -> None:
    """Found by attribution on 12 pairs, a tenth of the heads carries more of 12 others than any of 4 random tenths."""
    found = attribution_patching(smollm2, ioi(smollm2, 12))
    assert (found.forwards, found.backwards) == (2, 1)
    circuit = top_circuit(found.scores, 27)
    others = ioi(smollm2, 12, seed=1)
    held = evaluate_circuit(smollm2, circuit, others, randoms=4, subsets=0, minimality=False)
    value = held.summary.set_index("measure")["value"]
    assert value["faithfulness"] > held.random.max() and held.metric["all"] > 2
    assert compare_circuits(circuit, circuit)["p"] < 0.01


def test_a_tokenizer_without_the_names_is_refused(planted: LanguageModel) -> None:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    planted.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0")
    for task in (ioi, coloured_objects):
        with pytest.raises(HeadscopeError, match="single tokens"):
            task(planted, 2)
