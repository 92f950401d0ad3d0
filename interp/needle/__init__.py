"""The needle-in-a-haystack task: prompts of an exact length with a fact at a chosen depth, answers and their recall."""

from headscope.interp.needle.run import decode, prefill, run_needle_trial, stop_tokens
from headscope.interp.needle.task import NeedlePrompt, NeedleTask
from headscope.interp.needle.text import Needle, load_haystack, load_needles, rouge1_recall

__all__ = [
    "Needle",
    "NeedlePrompt",
    "NeedleTask",
    "decode",
    "load_haystack",
    "load_needles",
    "prefill",
    "rouge1_recall",
    "run_needle_trial",
    "stop_tokens",
]
