"""Streams behind layers are the model's own, padded or not; a label that the last token says is read at once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.probes.linear.dataset import Labelled
from headscope.probes.linear.layers import last_streams, probe_layers
from headscope.probes.tokens.dates import date_pairs


def test_last_streams_under_padding(tiny: Any) -> None:
    lm = tiny("llama", num_key_value_heads=2, head_dim=8)
    texts = ["w1 w2 w3 w4 w5", "w7 w8", "w9 w1 w2"]
    found = last_streams(lm, texts, "resid_post", batch_size=2, progress=False)
    normed = last_streams(lm, texts, "post_attention_norm", progress=False)
    seen: list[torch.Tensor] = []
    norm = lm.model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    for row, read, text in zip(found, normed, texts, strict=True):
        ids = lm.encode(text)["input_ids"]
        with torch.no_grad():
            hidden = lm.model.model(input_ids=ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(row[0], hidden[1][0, -1], atol=1e-5)
        np.testing.assert_allclose(read[1], seen[-1].detach(), atol=1e-5)
    handle.remove()


def test_a_label_of_the_last_token_is_read_and_its_control_is_not(tiny: Any) -> None:
    lm = tiny("llama", num_key_value_heads=2, head_dim=8)
    with torch.no_grad():  # the label stands in the stream far above what the layers add
        lm.model.model.embed_tokens.weight[2:4, 0] = torch.tensor([-60.0, 60.0])
    rng = np.random.default_rng(0)
    rows = [(f"{' '.join(f'w{i}' for i in rng.integers(4, 20, 3))} w{label}", label) for label in [0, 1] * 15]
    texts = list(dict.fromkeys(rows))
    held = Labelled([text for text, _ in texts], np.array([label for _, label in texts]))
    found = probe_layers(lm, held, seeds=(0, 1), progress=False)
    table = found.to_frame()
    assert found.tipping_point() == 0 and table["accuracy"].min() > 0.9 > 0.8 > table["control"].max()
    assert table["depth"].tolist() == [0.5, 1.0] and found.tipping_point(1.01) is None
    assert found.baselines["words"] > 0.9
    with pytest.raises(HeadscopeError, match="post_attention_layernorm"):
        probe_layers(tiny("gpt2"), held, place="post_attention_norm", progress=False)


def test_pairs_of_dates() -> None:
    held = date_pairs("future", 20, prompt="{first} {second}")
    assert held.balance == 0.5 and len(set(held.groups)) == 10
    for text, label in zip(held.texts, held.labels, strict=True):
        first, second = text.split()
        same = datetime.strptime(first, "%Y%m%d") == datetime.strptime(second, "%d/%m/%Y")
        assert same == bool(label) and 2025 <= int(first[:4]) < 2600 and 2025 <= int(second[-4:]) < 2600
    with pytest.raises(HeadscopeError, match="name one of past"):
        date_pairs("soon")
    with pytest.raises(HeadscopeError, match="even number"):
        date_pairs("past", 11)
