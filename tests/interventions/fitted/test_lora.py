"""LoRA beside LoFiT: matched steps, numbers counted, and a model that is bitwise as it was after the block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import LoFiT, lora

pytest.importorskip("peft")
ROWS = [{"prompt": f"w{i} w{i + 1}", "response": f"w{3 * i} w9"} for i in range(10)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["response"], "rejected": "w1 w2"} for r in ROWS]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_an_adapter_is_worn_inside_the_block_alone(llama: LanguageModel, loss: Any) -> None:
    inputs, rows = llama.encode("w1 w2 w3"), ROWS if loss == "sft" else PAIRS
    names = list(llama.model.state_dict())
    before, plain = {n: x.clone() for n, x in llama.model.state_dict().items()}, llama.model(**inputs).logits
    settings: dict[str, Any] = {"loss": loss, "epochs": 2, "batch": 4, "progress": False}
    with lora(llama, rows, rate=1e-2, **settings) as found:
        worn = llama.model(**inputs).logits
        assert (worn - plain).abs().max() > 1e-2 * plain.abs().max()
    with lora(llama, rows, rate=1e-2, **settings) as again:
        assert torch.equal(llama.model(**inputs).logits, worn) and again.curve == found.curve
    # rank 8 on q (32 -> 32) and v (32 -> 16) of two layers
    assert found.trained == 2 * 8 * ((32 + 32) + (32 + 16))
    offsets = LoFiT(loss=loss, epochs=2, batch=4, heads=[(0, 1)]).fit(llama, rows, progress=False)
    assert len(found.curve) == len(offsets.curves["offsets"]) == 6
    assert found.provenance["steps"]["examples"] == 10
    if loss == "dpo":
        assert found.curve[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    with pytest.raises(KeyboardInterrupt), lora(llama, rows, **settings):
        raise KeyboardInterrupt
    assert list(llama.model.state_dict()) == names and torch.equal(llama.model(**inputs).logits, plain)
    assert all(torch.equal(before[n], x) for n, x in llama.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama.model.parameters())


def test_modules_that_are_not_there(llama: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="name its modules"), lora(llama, ROWS, modules=["nothing"]):
        raise AssertionError("entered")
