"""What models read: named spans, token sequences, needles in a haystack, chats with images."""

from headscope.interp.prompts.decoding import decode, prefill, stop_tokens
from headscope.interp.prompts.haystack import Needle, load_haystack, load_needles, rouge1_recall
from headscope.interp.prompts.needle import NeedlePrompt, NeedleTask

__all__ = [
    "Needle",
    "NeedlePrompt",
    "NeedleTask",
    "decode",
    "load_haystack",
    "load_needles",
    "prefill",
    "rouge1_recall",
    "stop_tokens",
]
