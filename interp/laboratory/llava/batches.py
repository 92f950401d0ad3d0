"""Scenes as training examples: all that is asked of an image shares its prefix, exactly as if each were asked alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from headscope.interp.models.llava import IMAGE_ID
from headscope.interp.prompts.scenes.drawing import arrays
from headscope.interp.prompts.scenes.language import Kind, caption, question, request
from headscope.interp.prompts.scenes.world import GRID, Scene, balanced_scene, prior_scene

HEAD, MIDDLE, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
# how often a question is of a kind
KINDS: tuple[Kind, ...] = (
    "colour", "where", "count", "count_class", "relation", "relation", "relation", "exists", "exists", "background",
)  # fmt: skip
QUESTIONS = 9  # an image, at most
ANSWERED, CAPTIONED = 2.0, 1.0  # weights of a token of an answer and of a caption
KEPT = 100  # characters, up to which the ids of a text are kept
FOGGY = 0.5  # above it nothing is asked but what is there


@dataclass(frozen=True)
class Segment:
    """One question with its answer, and the weight of the answer's tokens in the loss."""

    question: str
    answer: str
    weight: float


def segments(draw: random.Random, scene: Scene, *, captioned: bool) -> list[Segment]:
    """A caption (short or long; in a quarter of them the question names an object that is there) and questions."""
    found = []
    if captioned:
        detail = draw.random() < 0.5
        mention = draw.choice(sorted(scene.names)) if draw.random() < 0.25 else None
        found.append(Segment(request(detail=detail, mention=mention), caption(scene, detail=detail), CAPTIONED))
    for _ in range(QUESTIONS):
        kind: Kind = draw.choice(KINDS) if scene.fog <= FOGGY else "exists"
        asked = question(draw, scene, kind)
        if asked:
            found.append(Segment(*asked, ANSWERED))
    return found


class Packing:
    """Token ids of prompts as the processor makes them, packed: a prefix with the image, then segments."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}  # questions and short answers come again and again
        self.prefix = self.ids(HEAD) + [IMAGE_ID] * GRID**2 + self.ids("\n")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        if text not in self._known:
            found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) > KEPT:
                return found
            self._known[text] = found
        return self._known[text]

    def pack(self, parts: list[Segment], length: int) -> dict[str, Tensor]:
        """Segments that fit ``length`` tokens, behind the prefix: (prefix + length,) each.

        ``segment`` is -1 for the prefix and -2 for padding; ``position`` restarts after the prefix; ``target`` is the
        next token where it is of an answer, else -100, and ``weight`` its weight.
        """
        first, total = len(self.prefix), len(self.prefix) + length
        ids = torch.full((total,), self.tokenizer.pad_token_id)
        segment, position = torch.full((total,), -2), torch.zeros(total, dtype=torch.long)
        target, weight = torch.full((total,), -100), torch.zeros(total)
        ids[:first], segment[:first], position[:first] = torch.tensor(self.prefix), -1, torch.arange(first)
        at = first
        for number, part in enumerate(parts):
            asked, answer = self.ids(part.question + MIDDLE), self.ids(part.answer + END)
            count = len(asked) + len(answer)
            if at + count > total:
                continue
            ids[at : at + count] = torch.tensor(asked + answer)
            segment[at : at + count], position[at : at + count] = number, first + torch.arange(count)
            spoken = slice(at + len(asked) - 1, at + count - 1)
            target[spoken], weight[spoken] = torch.tensor(answer), part.weight
            at += count
        return {"ids": ids, "segment": segment, "position": position, "target": target, "weight": weight}


def visible(segment: Tensor) -> Tensor:
    """(batch, 1, query, key) who sees whom: the prefix and the own segment, backwards."""
    length = segment.shape[1]
    own = (segment[:, None, :] == -1) | (segment[:, :, None] == segment[:, None, :])
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    return (own & causal)[:, None]


class Scenes(IterableDataset[dict[str, Tensor]]):
    """Batches without end: six in ten scenes follow the prior and have a caption, the others are balanced."""

    def __init__(self, tokenizer: Any, batch: int, length: int, seed: int) -> None:
        self.packing, self.batch, self.length, self.seed = Packing(tokenizer), batch, length, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        draw = random.Random(f"llava-{self.seed}-{worker.id if worker else 0}")
        while True:
            made = [
                (True, prior_scene(draw)) if draw.random() < 0.6 else (False, balanced_scene(draw))
                for _ in range(self.batch)
            ]
            packed = [self.packing.pack(segments(draw, scene, captioned=prior), self.length) for prior, scene in made]
            things, background, fog = arrays([scene for _, scene in made])
            batch = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
            yield batch | {"things": things, "background": background, "fog": fog}
