"""The command line, one file a command: ``headscope discover``, ``headscope evaluate`` ... (``COMMANDS``).

The one door that may import every room, inside its commands, so that ``--help`` is instant. Results go to stdout
(``--json`` for scripts), everything else to stderr. Exit codes: 0 done, 2 bad input (one line says what to do),
130 interrupted (run the same command again to resume), 1 a bug, and of ``doctor`` a machine that is not in order.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

# the commands' files, in help's order
COMMANDS = (
    "models",
    "listing",
    "trace",
    "exemplars",
    "explore",
    "discover",
    "compare",
    "taxonomy",
    "probe",
    "circuit",
    "intervene",
    "fit",
    "export",
    "evaluate",
    "masking",
    "lab",
    "report",
    "doctor",
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; returns never (exits with a code scripts can use)."""
    import typer

    from headscope.interp.cli.app import app
    from headscope.interp.errors import HeadscopeError

    usage: Any = typer.BadParameter.__base__  # of whichever click typer brings

    for name in COMMANDS:
        import_module(f"{__name__}.{name}")
    try:
        with _warnings_in_one_line():
            code = app(args=arguments, standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C; older ones raise Abort
            raise KeyboardInterrupt
        sys.exit(code)
    except usage as error:
        print(f"error: {error.format_message()} (see --help)", file=sys.stderr)
        sys.exit(2)
    except HeadscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (| head)
        sys.stderr.close()
        sys.exit(0)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings that are meant for users as a line on stderr, as errors are, without the code they came from."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if category is UserWarning:
                print(f"warning: {message}", file=sys.stderr)
            else:
                plain(message, category, *where, **more)

        warnings.showwarning = show
        yield
