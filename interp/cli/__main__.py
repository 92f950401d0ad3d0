"""``python -m headscope.interp.cli``."""

from headscope.interp.cli import main

main()
