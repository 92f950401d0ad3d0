"""Tiny random models of three kinds (shared keys; norms behind what is written; parallel blocks), and aligned pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.pairs import Pairs

LAYERS, HEADS, D, VOCAB = 3, 4, 8, 40
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    initializer_range=0.25,
    max_position_embeddings=64,
)
GROUPED = dict(num_key_value_heads=2, head_dim=D)
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gemma2": GROUPED | {"query_pre_attn_scalar": D, "sliding_window": 4, "pad_token_id": 0},
    "gpt_neox": {"use_parallel_residual": True},
}


def tiny(kind: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **KINDS[kind], **changes})).eval()
    for name, parameter in model.named_parameters():  # gains and shifts that matter
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return LanguageModel.wrap(model, name=kind)


@pytest.fixture(params=KINDS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny(request.param)


@pytest.fixture
def pairs() -> Pairs:
    """Five pairs of 6 to 9 tokens that differ in two tokens."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 7, 9, 6, 8])
    clean = torch.randint(1, VOCAB, (5, 9), generator=draw)
    corrupt = clean.clone()
    corrupt[:, 2:4] = torch.randint(1, VOCAB, (5, 2), generator=draw)
    answers, others = torch.randint(1, VOCAB, (2, 5), generator=draw)
    return Pairs(clean, corrupt, lengths, answers, others, torch.zeros(5, dtype=torch.long))


class Plain:
    """The model by plain hooks on its own modules, one prompt at a time without padding."""

    def __init__(self, lm: LanguageModel) -> None:
        self.model, inner = lm.model, lm.model.base_model
        self.blocks = list(inner.layers)
        neox = hasattr(self.blocks[0], "attention")
        self.out = [b.attention.dense if neox else b.self_attn.o_proj for b in self.blocks]
        # what an MLP adds to the stream: behind a norm of it in gemma2
        self.mlp = [getattr(b, "post_feedforward_layernorm", b.mlp) for b in self.blocks]
        self.q = [None if neox else b.self_attn.q_proj for b in self.blocks]
        self.v = [None if neox else b.self_attn.v_proj for b in self.blocks]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=ids[None]).logits[0, -1]

    @contextmanager
    def hooked(self, *hooks: Any) -> Iterator[None]:
        handles = [register(call) for register, call in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def z(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What every output projection reads: (token, head, d)."""
        seen: list[torch.Tensor] = []
        take = [(m.register_forward_pre_hook, lambda m, a: seen.append(a[0][0].clone())) for m in self.out]
        with self.hooked(*take):
            self(ids)
        return [x.view(len(ids), HEADS, D) for x in seen]

    def outputs(self, modules: list[Any], ids: torch.Tensor) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        take = [(m.register_forward_hook, lambda m, a, o: seen.append(o[0].clone())) for m in modules]
        with self.hooked(*take):
            self(ids)
        return seen

    @staticmethod
    def difference(logits: torch.Tensor, pairs: Pairs, i: int) -> float:
        return float(logits[pairs.answers[i]] - logits[pairs.others[i]])


@pytest.fixture
def plain(lm: LanguageModel) -> Plain:
    return Plain(lm)


@pytest.fixture
def unchanged(lm: LanguageModel) -> Callable[[], bool]:
    return untouched(lm)


def untouched(lm: LanguageModel) -> Callable[[], bool]:
    """Whether the model's weights, hooks and answers are bit for bit what they were."""
    ids = torch.arange(1, 9)[None]
    weights = {name: x.clone() for name, x in lm.model.state_dict().items()}
    with torch.no_grad():
        before = lm.model(input_ids=ids).logits

    def check() -> bool:
        same = all(torch.equal(x, weights[name]) for name, x in lm.model.state_dict().items())
        bare = not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
        asked = all(p.requires_grad for p in lm.model.parameters())
        with torch.no_grad():
            return same and bare and asked and torch.equal(lm.model(input_ids=ids).logits, before)

    return check


@pytest.fixture
def tiny_model() -> Callable[..., LanguageModel]:
    return tiny


@pytest.fixture
def make_plain() -> Callable[[LanguageModel], Plain]:
    return Plain


@pytest.fixture
def unchanged_of() -> Callable[[LanguageModel], Callable[[], bool]]:
    return untouched


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w39."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0")
