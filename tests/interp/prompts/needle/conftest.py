"""Small tokenizers of every kind, and tiny models for them."""

from __future__ import annotations

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from headscope.interp.models import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles

ALL = load_needles(10)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class SlowWords(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: words and punctuation, a space belongs to the word after it."""

    def __init__(self, words: list[str], **kwargs) -> None:
        self._words = ["<unk>", "<eos>", *words]
        self._ids = {word: i for i, word in enumerate(self._words)}
        super().__init__(unk_token="<unk>", eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return re.findall(r" ?\w+|[^\w ]| ", text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def _corpus() -> str:
    lines = [" ".join([n.needle, n.question, n.paraphrase or ""]) for n in ALL]
    return load_haystack()[:20_000] + "\n".join(lines) + "\n<book></book>Based on the content of the book, Question:"


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<eos>", "<|end|>"])
    tokenizer.train_from_iterator([_corpus()], trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    special = ["<unk>", "<eos>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator([_corpus()], trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>", "<eos>", "<|end|>"])
    tokenizer.train_from_iterator([_corpus()], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    def fast(tokenizer: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **kwargs)

    words = sorted(set(re.findall(r" ?\w+|[^\w ]| ", _corpus() + load_haystack()))) + [" Answer", "Answer"]
    return {
        "byte_bpe": fast(_byte_bpe()),
        "chat": fast(_byte_bpe(), chat_template=CHAT),
        "sentencepiece": fast(_sentencepiece(), unk_token="<unk>"),
        "wordpiece": fast(_wordpiece(), unk_token="<unk>"),
        "slow": SlowWords(words),
    }


def _tiny(tokenizer, context: int = 4096) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), 16),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


@pytest.fixture
def tiny_lm():
    """Makes a tiny random llama for a tokenizer."""
    return _tiny
