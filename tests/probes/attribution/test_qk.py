"""A score's table sums to the score the model attends with, and its entries are the formula written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites import attached
from headscope.probes.attribution.qk import QKAttribution, qk_attribution

TEXT = " ".join(f"w{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 1, 4))
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("qwen3", GROUPED),
    ("gemma2", GROUPED | {"attn_logit_softcapping": 5.0}),
    ("gemma3_text", GROUPED),
    ("olmo2", {"num_key_value_heads": 2}),
    ("gpt2", {}),
    ("gpt_neox", {"rotary_pct": 0.5}),
    ("phi", {}),
    ("cohere", {"num_key_value_heads": 2, "use_qk_norm": True}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
]


def random_biases(lm: LanguageModel) -> LanguageModel:
    for name, parameter in lm.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return lm


class Seen(Handler):
    """The largest numbers in one head's query and key, the call's scale and the width of a head."""

    only_reads = True

    def __init__(self, layer: int, head: int, query: int, key: int) -> None:
        self.layers, self.head, self.query, self.key = [layer], head, query, key
        self.factor = 0.0

    def edit_output(self, call, z):
        kv = self.head // (call.query.shape[1] // call.key.shape[1])
        q, k = call.query[0, self.head, self.query], call.key[0, kv, self.key]
        self.factor = abs(call.scale) * len(q) * float(q.abs().max()) * float(k.abs().max())
        return z


def rounding(lm: LanguageModel, found: QKAttribution, text: str) -> float:
    """How far a table may sum from its score.

    Parts of a query sum to q + e, those of a key to k + f. What sums further than 64 eps of the largest number from
    the whole's, or the whole's from what the model attends with, is refused, so that |e| <= 128 eps max|q| in each of d
    dimensions, and |f| likewise. The table, in float64, sums to scale (q + e) . (k + f), and that is off by at most
    scale d max|q| max|k| (2 x 128 eps + (128 eps)^2).
    """
    seen = Seen(found.layer, found.head, found.query, found.key)
    with attached(lm, seen, layers={found.layer: "the layer"}), torch.no_grad():
        lm.forward(lm.encode(text)["input_ids"], logits=1)
    room = 128 * torch.finfo(lm.model.dtype).eps
    return seen.factor * (2 * room + room**2)


def eager_weights(lm: LanguageModel, layer: int, head: int, query: int) -> np.ndarray:
    was = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    found = lm([TEXT], output_attentions=True).attentions[layer][0, head, query].double().numpy()
    lm.model.set_attn_implementation(was)
    return found


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_the_table_sums_to_the_score(tiny: Any, kind: str, changes: dict[str, Any]) -> None:
    """And scores are the model's own: differences of two are log ratios of eager weights."""
    lm = random_biases(tiny(kind, num_hidden_layers=3, **changes))
    one, other = (qk_attribution(lm, TEXT, 2, 3, -1, key) for key in (4, 9))
    cap = 5.0 if kind == "gemma2" else None
    for found in (one, other):
        near = rounding(lm, found, TEXT)
        assert found.table.sum() == pytest.approx(found.score, rel=0, abs=near)
        assert near < 0.02 * np.abs(found.table).max(), "a part left out, or a sign, would show"
        assert found.table.shape == (len(found.sources),) * 2 and len(found.sources) == 1 + 2 * (4 + 2) + 1
        assert found.by_query().sum() == pytest.approx(found.table.sum())
    p = eager_weights(lm, 2, 3, 11)
    scores = [cap * np.tanh(x.score / cap) if cap else x.score for x in (one, other)]
    assert scores[0] - scores[1] == pytest.approx(np.log(p[4] / p[9]), abs=1e-3)


def test_entries_are_the_formula_written_out(tiny: Any) -> None:
    """For a llama: scale * (R_i W_Q gain x_a / rms_i) . (R_j W_K gain x_b / rms_j), of the embedding and one head."""
    lm = tiny("llama", **GROUPED)
    found = qk_attribution(lm, TEXT, 1, 2, 10, 5)
    model, seen = lm.model.model, {}
    hooks = [
        model.layers[0].register_forward_pre_hook(lambda m, a: seen.update(embedding=a[0][0])),
        model.layers[1].register_forward_pre_hook(lambda m, a: seen.update(stream=a[0][0])),
        model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0][0])),
    ]
    ids = lm.encode(TEXT)["input_ids"]
    lm.forward(ids)
    for hook in hooks:
        hook.remove()
    cos, sin = model.rotary_emb(seen["stream"][None], torch.arange(12)[None])
    block = model.layers[1]

    def part(x: torch.Tensor, at: int, weight: torch.Tensor) -> torch.Tensor:
        scale = (seen["stream"][at].pow(2).mean() + 1e-6).rsqrt()
        v = weight @ (x * scale * block.input_layernorm.weight)
        turned = torch.cat([-v[4:], v[:4]])
        return v * cos[0, at] + turned * sin[0, at]

    with torch.no_grad():
        w_q = block.self_attn.q_proj.weight[16:24]
        w_k = block.self_attn.k_proj.weight[8:16]
        head = model.layers[0].self_attn.o_proj.weight[:, 8:16] @ seen["z"][5, 8:16]
        expected = part(seen["embedding"][10], 10, w_q) @ part(head, 5, w_k) / 8**0.5
    names = list(found.sources)
    entry = found.table[names.index("embedding"), names.index("L0H1")]
    assert entry == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert names[-1] == "constant" and not found.table[-1].any()  # no biases in a llama
    frame = found.to_frame(3)
    assert abs(frame["nats"].iloc[0]) == np.abs(found.table).max()


def test_the_adapters_of_peft_count(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    lm = tiny("llama", **GROUPED)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm.model, config).eval()
    found = qk_attribution(LanguageModel.wrap(adapted, lm.tokenizer), TEXT, 1, 0, -1, 3)
    merged = LanguageModel.wrap(adapted.merge_and_unload(), lm.tokenizer)
    np.testing.assert_allclose(found.table, qk_attribution(merged, TEXT, 1, 0, -1, 3).table, atol=1e-4)


def test_what_is_not_there_is_refused_and_nothing_stays(tiny: Any) -> None:
    lm = tiny("llama", **GROUPED)
    with pytest.raises(HeadscopeError, match="does not see it"):
        qk_attribution(lm, TEXT, 1, 0, 3, 5)
    with pytest.raises(HeadscopeError, match="no head 7"):
        qk_attribution(lm, TEXT, 1, 7, 5, 3)
    with pytest.raises(HeadscopeError, match="layer 4 does not exist"):
        qk_attribution(lm, TEXT, 4, 0, 5, 3)
    with pytest.raises(HeadscopeError, match="granite"):
        qk_attribution(tiny("granite", residual_multiplier=0.2), TEXT, 1, 0, 5, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert lm.model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_on_smollm2_an_induction_heads_keys_come_from_earlier_heads(smollm2: LanguageModel) -> None:
    """L18H6's score of the token after an earlier copy: parts sum to it, and some earlier head is in the key."""
    text = "The cat Zorblax sat down. Later the cat"
    ids = smollm2.encode(text)["input_ids"][0].tolist()
    key = ids.index(ids[-1]) + 1
    found = qk_attribution(smollm2, text, 18, 6, -1, key)
    assert found.table.sum() == pytest.approx(found.score, rel=0, abs=rounding(smollm2, found, text))
    assert any("H" in source for source in found.by_key().index[:5])
