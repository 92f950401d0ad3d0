"""lm-evaluation-harness's own command with the model class ``headscope``, which puts a saved edit in force:

    python -m headscope.interventions.evaluation.lm_eval --model headscope \\
        --model_args pretrained=smollm2-135m,edit=runs/half --tasks my_task --include_path my_tasks

Arguments are those of ``lm_eval`` (0.4.13 has no entry points for model classes, so its own script cannot find one that
is installed beside it; this registers ours and goes on as that script does).
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from headscope.interp.errors import HeadscopeError


def main() -> None:
    """Register ``HeadscopeLM`` and run lm-evaluation-harness's command; a bad input is one line and exit code 2."""
    try:
        if find_spec("lm_eval") is None:
            raise HeadscopeError("lm-evaluation-harness is not installed: pip install 'headscope[evaluation]'")
        import lm_eval.models  # noqa: F401 (its own classes)
        from lm_eval.__main__ import cli_evaluate

        from headscope.interventions.tasks import harness  # noqa: F401 (registers the class)

        cli_evaluate()
    except HeadscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
