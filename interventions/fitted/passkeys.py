"""Long texts that hold passkeys, and questions after them: what DuoAttention's gates are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack
from headscope.interp.prompts.tokens import body_tokens

WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
BEFORE, AFTER = "<|im_start|> This is a very long story book: <book> ", " </book>.\n\n"
NEEDLE = "Remeber this sequence of words, it's the {} passkey to the vault: "  # as they spell it
QUESTION = "Based on the content of the book, what is the {} passkey to the vault?\nPasskey: "


def passkeys(
    lm: LanguageModel,
    lengths: Sequence[int],
    *,
    needles: int = 10,
    words: int = 32,
    depths: tuple[float, float] = (0.05, 0.95),
    text: str | None = None,
    seed: int = 42,
) -> list[dict[str, str]]:
    """One row {"prompt", "response"} for each of ``lengths``: a book with passkeys in it, then questions and answers.

    As ``MultiplePasskeyRetrievalDataset`` makes them (mit-han-lab/duo-attention @ fe93c314, ``duo_attn/data.py``): so
    many tokens of prose; ``needles`` passkeys of ``words`` random words, in order, between paragraphs at sorted depths
    from a grid of 1,000 over ``depths``; the response asks for each in turn and answers. What differs: the draws, the
    prose (the bundled one for BookSum), no filling up to a multiple of 16 tokens, and tokens are made of the text as a
    whole. A length is of the prose alone; a passkey's needle and question add about 150 tokens.

    Raises:
        HeadscopeError: more needles than ten, or prose shorter than a length.
    """
    ids = body_tokens(lm, load_haystack() if text is None else text)
    if not 1 <= needles <= len(ORDINALS) or max(lengths) > len(ids) or min(lengths) < 1:
        raise HeadscopeError(
            f"passkeys: 1 to {len(ORDINALS)} needles, and lengths of 1 to {len(ids)} tokens, which the prose has"
        )
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        keys = [" ".join(rng.choice(WORDS, words)) for _ in range(needles)]
        grid = np.linspace(*depths, 1000)
        places = [int(length * depth) for depth in np.sort(rng.permutation(grid)[:needles])]
        parts = [lm.tokenizer.decode(ids[a:b]) for a, b in zip([0, *places], [*places, length], strict=True)]
        book = parts[0]
        for ordinal, key, part in zip(ORDINALS, keys, parts[1:], strict=False):
            book += f"\n\n{NEEDLE.format(ordinal)}{key}\n\n{part}"
        asked = "".join(f"{QUESTION.format(o)}{key}\n\n" for o, key in zip(ORDINALS, keys, strict=False))
        rows.append({"prompt": BEFORE + book + AFTER, "response": asked})
    return rows
