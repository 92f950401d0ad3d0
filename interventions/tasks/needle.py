"""The needle in a haystack as a task: see ``headscope.interp.prompts.needle``."""

from headscope.interp.prompts.needle import NeedleTask as NeedleTask
