"""FocuSFT (arXiv 2605.09932) in small: conversations, the mask of turns, fast weights, and what is measured."""
