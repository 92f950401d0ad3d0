"""Chats with images as model inputs with named spans: system, image, instruction, response.

Which tokens an image or a message became is taken from the processor, never guessed:

- An image's tokens are those that the processor put in place of its placeholder and that carry the model's image token
  id: where image features stand. Markers, row and column tags and line breaks between them are not among them, so an
  image may be several intervals.
- A message's tokens come from the tokenizer's character offsets. Where its text stands in the prompt is found by having
  the processor write the chat a second time with other texts: what stays the same is the template's. If that does not
  reproduce the prompt to the letter, the prompt is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.processors import processor_of
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.prompts.pictures import Message, with_bytes
from headscope.interp.prompts.spans import by_offsets
from headscope.interp.sites.given import ModelLike, PreTrained
from headscope.interp.sites.inputs import media_tokens
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics.spans import OPEN, Span, intervals, published_spans

SPAN_OF_ROLE = {"system": "system", "developer": "system", "user": "instruction", "assistant": "response"}
_FIRST, _LAST = "\ue000", "\ue001"  # private-use characters around the number that stands in for a text


@dataclass(frozen=True, eq=False)
class VisionPrompt:
    """A batch of chats as the model reads them. ``inputs`` go to ``model(**inputs)`` or ``model.generate(**inputs)``.

    ``spans`` holds, for every name, one list of ``(first, stop)`` pairs an example, counted from its first token, as
    ``SpanMass`` and every other span statistic take them (an empty list: the example has no such span):

    - ``system``, ``instruction``, ``response``: the texts of the system's, user's and assistant's messages, without the
      template's own tokens. With a generation prompt ``response`` also holds everything that will be generated.
    - ``image``: the image features of all images; ``image_0``, ``image_1`` ...: of each, in the order of the prompt.
      ``video`` and ``audio`` likewise.

    A system prompt that a template writes by itself has no span: give it as a message.
    """

    inputs: dict[str, Any]
    spans: dict[str, list[list[Span]]]

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block statistics and edits may name the spans of these chats (``span="image"``), and know where
        each ends."""
        mask, width = self.inputs.get("attention_mask"), self.inputs["input_ids"].shape[1]
        ends = prompt_boundary(width, padded=True)
        if mask is not None and not bool(mask[:, -1].all()):  # padded to the right
            ends = prompt_boundary(mask.sum(-1).tolist())
        with published_spans(self.spans), ends:
            yield


def vision_prompt(
    model: ModelLike,
    processor: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
) -> VisionPrompt:
    """Inputs and spans of one chat, or of a batch of chats.

    Args:
        model: load_model's result or a Hugging Face model of images and text.
        processor: its processor (``transformers.AutoProcessor``), with a fast tokenizer. None: that which
            load_model's result finds.
        messages: chats as ``processor.apply_chat_template`` takes them: ``{"role": "user", "content": [{"type":
            "image", "image": picture}, {"type": "text", "text": "What is this?"}]}``, pictures as ``pixels`` takes them
            (``headscope.interp.prompts.pictures``). A video is its frames, all of which are read: ``{"type": "video",
            "video": [picture, ...]}``; transformers' processors of videos need torchvision.
        add_generation_prompt: end with the opening of the assistant's turn; False for a chat that holds the response.
        chat_template: for a processor without one of its own (PaliGemma's).

    Raises:
        HeadscopeError: no processor, or one without template or fast tokenizer; no chat, or a picture that cannot be
            read; the processor does not say what became of an image, or its template rewrites a text, so that no span
            could be trusted.
    """
    inner = bare_model(model)
    if processor is None and isinstance(model, LanguageModel):
        processor = processor_of(model)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise HeadscopeError(
            f"{type(processor).__name__} is no processor of images and text: give the model's, "
            "transformers.AutoProcessor.from_pretrained(...)"
        )
    batch: Sequence[Any] = messages if _is_batch(messages) else [messages]
    chats = [with_bytes(chat) for chat in batch]
    if not chats or not all(chats):
        raise HeadscopeError("a chat needs at least one message, e.g. [{'role': 'user', 'content': 'Hello'}]")
    options = {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template}
    read = _Reading.of(processor, chats, options)
    blank = _Reading.of(processor, [_without_texts(chat) for chat in chats], options)
    rows = []
    for b, chat in enumerate(chats):
        spans = _text_spans(chat, read, blank.texts[b], b)
        if add_generation_prompt:
            spans.setdefault("response", []).append((len(read.ids[b]), OPEN))
        rows.append({**spans, **_media_spans(inner.config, read, b)})
    names = list(dict.fromkeys(name for row in rows for name in row))
    return VisionPrompt(_inputs(inner, read.output), {name: [row.get(name, []) for row in rows] for name in names})


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a processor made of chats: its ``output``; the ``texts`` that its tokenizer read; every example's token
    ``ids`` and character ``offsets`` without padding; the ``replaced`` placeholders."""

    output: Any
    texts: list[str]
    ids: list[list[int]]
    offsets: list[list[tuple[int, int]]]
    replaced: list[list[dict[str, Any]]]

    @classmethod
    def of(cls, processor: Any, chats: list[list[Message]], options: dict[str, Any]) -> _Reading:
        if options["chat_template"] is None and not getattr(processor, "chat_template", None):
            raise HeadscopeError(
                f"{type(processor).__name__} has no chat template: pass chat_template=, a Jinja template of its prompts"
            )
        listening = copy.copy(processor)
        listening.tokenizer = tokenizer = _Listening(processor.tokenizer)
        wanted = {"padding": True, "return_text_replacement_offsets": True}
        if any(part.get("type") == "video" for chat in chats for part in _parts(chat)):
            wanted["do_sample_frames"] = False  # the frames that were given are those that are meant
        try:
            output = listening.apply_chat_template(
                chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=wanted, **options
            )
        except ValueError as error:
            raise HeadscopeError(f"{type(processor).__name__} refuses this chat: {error}") from error
        replaced = output.pop("text_replacement_offsets", None) or [[] for _ in chats]
        return cls(output, *tokenizer.read(output["input_ids"].tolist(), type(processor).__name__), replaced)


class _Listening:
    """A processor's tokenizer that remembers its last call."""

    def __init__(self, tokenizer: Any) -> None:
        self._real, self._texts, self._made = tokenizer, [""], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        self._texts = [text] if isinstance(text, str) else list(text)
        self._made = self._real(text, **options)
        return self._made

    def read(self, ids: list[list[int]], who: str) -> tuple[list[str], list[list[int]], list[list[tuple[int, int]]]]:
        """Texts, ids and offsets; ``ids`` are those that the processor gives in the end."""
        made = getattr(self._made, "encodings", None)
        if not made:
            raise HeadscopeError(f"{who} has no fast tokenizer, so nobody knows which characters a token holds")
        if [list(one.ids) for one in made] != ids:
            raise HeadscopeError(f"{who} changes the tokens after its tokenizer, so no span in them could be trusted")
        real = [[i for i, seen in enumerate(one.attention_mask) if seen] for one in made]
        return (
            self._texts,
            [[one.ids[i] for i in kept] for one, kept in zip(made, real, strict=True)],
            [[one.offsets[i] for i in kept] for one, kept in zip(made, real, strict=True)],
        )


def _is_batch(messages: Sequence[Any]) -> bool:
    return isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], list | tuple)


def _parts(chat: list[Message]) -> list[Any]:
    return [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]


def _texts(chat: list[Message]) -> list[tuple[str, str]]:
    """(role, text) of every text of a chat, in the order in which ``_without_texts`` numbers them."""
    found = []
    for message in chat:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [(str(message["role"]), str(part["text"])) for part in parts if part.get("type") == "text"]
    return found


def _without_texts(chat: list[Message]) -> list[Message]:
    """The chat with a number in place of every text."""
    numbers = iter(f"{_FIRST}{i}{_LAST}" for i in range(len(_texts(chat))))
    made: list[Message] = []
    for message in chat:
        content = message["content"]
        if isinstance(content, str):
            made.append({**message, "content": next(numbers)})
        else:
            parts = [{**p, "text": next(numbers)} if p.get("type") == "text" else p for p in content]
            made.append({**message, "content": parts})
    return made


def _text_spans(chat: list[Message], read: _Reading, blank: str, example: int) -> dict[str, list[Span]]:
    """The spans of the messages' texts: ``blank`` says what stands between them."""
    texts, whole = _texts(chat), read.texts[example]
    pieces, order = _split(blank, len(texts))
    found: dict[str, list[Span]] = {}
    at = len(pieces[0]) if whole.startswith(pieces[0]) else -1
    for number, after in zip(order, pieces[1:], strict=True):
        role, text = texts[number]
        written = next((t for t in (text, text.strip()) if at >= 0 and whole.startswith(t + after, at)), None)
        if written is None:
            raise HeadscopeError(
                f"the chat template rewrites or reorders the texts (message text {text[:40]!r}), so no span could be "
                "trusted; give the texts as the template writes them"
            )
        span = by_offsets(read.offsets[example], at, at + len(written))
        found.setdefault(SPAN_OF_ROLE.get(role, role), []).extend([span] if span else [])
        at += len(written) + len(after)
    if at != len(whole):
        raise HeadscopeError("the chat template writes another prompt for other texts, so no span could be trusted")
    return {name: sorted(spans) for name, spans in found.items()}


def _split(blank: str, count: int) -> tuple[list[str], list[int]]:
    """The template's pieces around the numbers, and the numbers in order of appearance."""
    pieces, order = [], []
    head, *rest = blank.split(_FIRST)
    pieces.append(head)
    for part in rest:
        number, _, after = part.partition(_LAST)
        order.append(int(number))
        pieces.append(after)
    if sorted(order) != list(range(count)):
        raise HeadscopeError(
            "the chat template leaves out or repeats a message's text, so its span is not one place; change the "
            "messages or pass chat_template="
        )
    return pieces, order


def _media_spans(config: Any, read: _Reading, example: int) -> dict[str, list[Span]]:
    """The tokens of images, videos and sounds that carry features, together and one by one."""
    ids, found, tokens = read.ids[example], {}, media_tokens(config)
    for kind in sorted({*tokens, *(place["type"] for place in read.replaced[example])}):
        marked = {i for i, one in enumerate(ids) if one == tokens.get(kind)}
        each = []
        for place in (place for place in read.replaced[example] if place["type"] == kind):
            inside = by_offsets(read.offsets[example], *place["new_span"]) or (0, 0)
            each.append([i for i in range(*inside) if i in marked])
        if marked != {i for one in each for i in one} or not all(each):
            raise HeadscopeError(
                f"the prompt holds {len(marked)} {kind} tokens and the processor accounts for "
                f"{sum(map(len, each))}: it does not say what became of every {kind}, so no span could be trusted"
            )
        if each:
            found[kind] = intervals(sorted(marked))
            found |= {f"{kind}_{i}": intervals(one) for i, one in enumerate(each)}
    return found


def _inputs(model: PreTrained, output: Any) -> dict[str, Any]:
    """What the model's forward names, where its parameters are."""
    named = set(inspect.signature(model.forward).parameters) - {"labels"}
    moved = output.to(model.device, dtype=model.dtype)
    return {name: value for name, value in moved.items() if name in named}
