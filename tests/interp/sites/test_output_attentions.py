"""``output_attentions=True`` inside a block: the maps of a model's own eager code, edited where an edit is in force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface import maps
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace
from headscope.interventions import AblateHeads, apply

IDS = torch.arange(5, 15)[None]


def model_of(implementation: str, name: str = "llama") -> Any:
    made = tiny_model(name)
    made.set_attn_implementation(implementation)
    return made


def eager_maps(name: str = "llama") -> Any:
    with torch.no_grad():
        return model_of("eager", name)(IDS, output_attentions=True).attentions


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "gemma3"])
@pytest.mark.parametrize("layers", [None, [1], []])
def test_the_maps_are_those_of_eager_code(name: str, layers: list[int] | None) -> None:
    wanted = eager_maps(name)
    with trace(model_of("eager", name), [Entropy()], layers=layers) as tracer:
        found = tracer.model(IDS, output_attentions=True).attentions
    assert len(found) == len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_model_that_is_not_eager_gives_them_too() -> None:
    with trace(model_of("sdpa"), [Entropy()]) as tracer:
        found = tracer.model(IDS, output_attentions=True).attentions
        assert not tracer.model(IDS).attentions
    torch.testing.assert_close(torch.stack(found), torch.stack(eager_maps()), atol=1e-5, rtol=0)


def test_generation_and_edits() -> None:
    model, wanted = model_of("eager"), eager_maps()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(IDS, output_attentions=True, **options).attentions
    with trace(model, [Entropy()]):
        found = model.generate(IDS, output_attentions=True, **options).attentions
    assert [[one.shape for one in step] for step in found] == [[one.shape for one in step] for step in plain]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=0)
    with apply(model, AblateHeads([(0, 0)])):
        ablated = model(IDS, output_attentions=True).attentions
    torch.testing.assert_close(ablated[0], wanted[0], atol=1e-5, rtol=0)  # the first layer sees no ablated head yet
    assert float((ablated[1] - wanted[1]).abs().max()) > 1e-5


def test_maps_that_are_too_large_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "LIMIT", 4 * 10 * 10 - 1)
    model = model_of("eager")
    with pytest.raises(HeadscopeError, match="asks for maps of .* MiB a layer: record statistics instead"):
        with trace(model, [Entropy()]):
            model(IDS, output_attentions=True)
