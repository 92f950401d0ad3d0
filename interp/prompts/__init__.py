"""What models read: named spans, token sequences, needles in a haystack, chats with images."""

from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.prompts.decoding import decode, prefill, stop_tokens
from headscope.interp.prompts.haystack import Needle, load_haystack, load_needles, rouge1_recall
from headscope.interp.prompts.needle import NeedlePrompt, NeedlePrompts
from headscope.interp.statistics.spans import published_spans

__all__ = [
    "Needle",
    "NeedlePrompt",
    "NeedlePrompts",
    "decode",
    "load_haystack",
    "load_needles",
    "prefill",
    "prompt_boundary",
    "published_spans",
    "rouge1_recall",
    "stop_tokens",
]
