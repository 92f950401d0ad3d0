"""How a registered thing is used: its command line and its Python, written from its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from importlib import import_module
from typing import Any

from headscope.interp.registry import settings

TEXT_MODEL, PICTURE_MODEL = "smollm2-135m", "llava-smollm2"
PROMPT = "Attention heads move information."
HEADS = "L18H6,L17H3"
DIRECTIONS = "runs/probe/probe_truth.safetensors:mass_mean"


@dataclass(frozen=True)
class Example:
    """What an example gives a setting, where it has to be given or its default changes nothing.

    Args:
        shell: the option of the command line; "": the command line has none.
        python: the argument.
        idle: defaults that change nothing.
    """

    shell: str
    python: str
    idle: tuple[Any, ...] = ()


# a setting's name -> what examples give it
EXAMPLES: dict[str, Example] = {
    "heads": Example(f"--heads {HEADS}", f'"{HEADS}"'),
    "span": Example("--set 'span=[0,4]'", "(0, 4)"),
    "vectors": Example(f"--set vectors={DIRECTIONS}", "torch.ones(2, 64)"),
    "directions": Example(f"--set directions={DIRECTIONS}", "torch.ones(2, 64)"),
    "v": Example(f"--set v={DIRECTIONS}", "torch.ones(2, 64)", (None,)),
    "z": Example(
        f"--set 'prompt={PROMPT}' --set 'taken=[0,2]' --set 'positions=[0,2]'",
        "torch.zeros(2, 2, 64), positions=(0, 2)",
    ),
    "neurons": Example("--set 'neurons=[[0,3],[1,7]]'", "((0, 3), (1, 7))"),
    "factor": Example("--set factor=0.5", "0.5", (1.0,)),
    "temperature": Example("--set temperature=0.5", "0.5", (1.0,)),
    "outside": Example("--set outside=0.1", "0.1", (1.0,)),
    "ntk": Example("--set ntk=2", "2", (1.0,)),
    "grid": Example("--set 'grid=[10,10]'", "(10, 10)", ((24, 24),)),  # of the example's model
    "window": Example("--set window=4", "4", (16380,)),
    "low": Example("--set low=0", "0.0", (None,)),
    "task": Example("--set task=my_task.yaml", '"my_task.yaml"'),
    "encoder": Example("", "lambda x, layer: torch.cat([x, -x], -1)", (None,)),
    "kept": Example("", "kept"),
    "spans": Example("", '{"start": (0, 4)}', ({},)),
    "targets": Example("", '{"previous": lambda query: query - 1}', ({},)),
}


@dataclass(frozen=True)
class Use:
    """Commands and Python of one example; no commands where it is for Python alone."""

    commands: tuple[str, ...]
    python: str


def use(group: str, name: str, cls: type) -> Use:
    """The example of an entry of the registry ``group``."""
    return _WRITERS[group](name, cls)


def shown(cls: type) -> dict[str, Example]:
    """The settings that an example gives."""
    found = {}
    for name, one in settings(cls).items():
        example = EXAMPLES.get(name)
        if example is not None and (one.default is MISSING or one.default in example.idle):
            found[name] = example
    return found


def public(cls: type) -> str:
    """The shortest module that ``cls`` can be imported from by its name."""
    parts = cls.__module__.split(".")
    places = [".".join(parts[:n]) for n in range(2 if parts[0] == "headscope" else 1, len(parts))]
    return next((p for p in places if getattr(import_module(p), cls.__name__, None) is cls), cls.__module__)


def model(cls: type) -> str:
    """The model of the example: one that sees pictures where the entry is about them, or is a way to choose tokens."""
    named = settings(cls)
    pictures = getattr(cls, "reads", "text") == "images" or "image" in named or hasattr(cls, "continued")
    return PICTURE_MODEL if pictures or any(one.default == "image" for one in named.values()) else TEXT_MODEL


def _made(cls: type) -> str:
    if hasattr(cls, "found_in"):  # its settings are a model's own
        return f"{cls.__name__}.found_in(lm)"
    given = ", ".join(f"{name}={example.python}" for name, example in shown(cls).items())
    return f"{cls.__name__}({given})"


def _for_python(cls: type) -> bool:
    """Whether it needs something that no command line can give."""
    return any(not example.shell for example in shown(cls).values())


def _options(cls: type) -> str:
    return "".join(f" {example.shell}" for example in shown(cls).values() if example.shell)


def _python(cls: type, run: str, **names: str) -> str:
    """``run`` below the imports of ``cls`` and of ``names`` (a module's below ``headscope``, its dots as ``__``)."""
    wanted = {public(cls): {cls.__name__}}
    for module, name in names.items():
        wanted.setdefault(f"headscope.{module.replace('__', '.')}", set()).update(name.split())
    lines = [f"from {module} import {', '.join(sorted(wanted[module]))}" for module in sorted(wanted)]
    before = ["import torch", ""] if "torch." in run else []
    return "\n".join([*before, *lines, "", run])


def _load(cls: type) -> str:
    return f'lm = load_model("{model(cls)}")'


def _method(name: str, cls: type) -> Use:
    python = f"from headscope.interp import heads, load_model\n\n{_load(cls)}\nscores = heads.{name}(lm)\nscores.top(5)"
    return Use((f"headscope discover {name} --model {model(cls)} --out runs/heads",), python)


def _statistic(name: str, cls: type) -> Use:
    given = shown(cls)
    command = f'headscope trace --model {model(cls)} --prompt "{PROMPT}" --statistics {name} --out runs/{name}'
    run = f'with trace(lm, [{_made(cls)}]) as tracer:\n    lm(["{PROMPT}"])\ntracer.record'
    names = "load_model trace"
    if "kept" in given:
        names, run = f"{names} keep_attention", f'with keep_attention(lm) as kept:\n    lm(["{PROMPT}"])\n{run}'
    return Use(() if _for_python(cls) else (command,), _python(cls, f"{_load(cls)}\n{run}", interp=names))


def _policy(name: str, cls: type) -> Use:
    command = f"headscope discover cache --model {model(cls)} --policies {name} --budgets 128,256 --out runs/cache"
    run = f"{_load(cls)}\nlosses = lose(lm, {_made(cls)}, [128, 256], [load_haystack()[:4000]])"
    return Use(
        () if _for_python(cls) else (command,),
        _python(cls, run, interp="load_model", interp__cache="lose", interp__prompts="load_haystack"),
    )


def _judge(cls: type) -> tuple[str, str, str]:
    """A task on which an edit acts: its name, its options on the command line, and what Python calls it."""
    named = settings(cls)
    if model(cls) == PICTURE_MODEL:
        return "hallucination", "", '"hallucination"'
    if any(one.default == "document" for one in named.values()):
        return "documents", "", '"documents"'
    if {"at", "policy"} & set(named):  # it acts behind a prompt
        return "needle", " --lengths 600", "NeedleTask(lengths=[600])"
    return "text_loss", "", '"text_loss"'


def _edit(name: str, cls: type) -> Use:
    kind, (task, options, asked) = name.replace("_", "-"), _judge(cls)
    needs = [f"headscope probe truth --model {model(cls)} --out runs/probe"] if DIRECTIONS in _options(cls) else []
    build = f"headscope intervene {kind} --model {model(cls)}{_options(cls)} --out runs/{kind}"
    judge = f"headscope evaluate {task} --model {model(cls)} --with runs/{kind}{options} --controls 2 --out runs/{task}"
    run, names = f"{_load(cls)}\nedit = {_made(cls)}\n", "evaluate NeedleTask" if options else "evaluate"
    if task == "text_loss":
        run, names = f'{run}with apply(lm, edit):\n    lm.generate("The capital of France is")\n', f"apply {names}"
    run += f"result = evaluate(lm, [{asked}], [edit], controls=2)"
    return Use((*needs, build, judge), _python(cls, run, interp="load_model", interventions=names))


def _fit(name: str, cls: type) -> Use:
    command = f"headscope fit {name} --model {model(cls)} --data rows.jsonl --out edits/{name}"
    run = f'{_load(cls)}\nfound = {_made(cls)}.fit(lm, "rows.jsonl")\nfound.edit'
    return Use((command,), _python(cls, run, interp="load_model"))


def _task(name: str, cls: type) -> Use:
    options = f"--ablate {HEADS} --controls 2{_options(cls)} --out runs/evaluation"
    run = f'{_load(cls)}\nresult = evaluate(lm, [{_made(cls)}], [AblateHeads("{HEADS}")], controls=2)'
    python = _python(cls, run, interp="load_model", interventions="AblateHeads evaluate")
    return Use((f"headscope evaluate {name} --model {model(cls)} {options}",), python)


def _experiment(name: str, cls: type) -> Use:
    run = f"found = run_experiment({_made(cls)}.quick(), seeds=[0])\nfound.verdicts()"
    python = _python(cls, run, interp__laboratory="run_experiment")
    return Use((f"headscope lab {name} --quick --out runs/lab",), python)


def _variant(name: str, cls: type) -> Use:
    mask, more = (", mask=Mask.full()", {"kernels__masks": "Mask"}) if getattr(cls, "both_ways", False) else ("", {})
    made = f"model = Decoder(Shape(layers=2{mask}), {cls.__name__})"
    run = f'{made}\nwith trace(model, ["entropy"]) as tracer:\n    model(torch.arange(32)[None])\ntracer.record'
    python = _python(cls, run, interp="trace", interp__laboratory__decoder="Decoder Shape", **more)
    beside = name if name == "softmax" else f"softmax,{name}"
    return Use((f"headscope lab variants --set variants={beside} --set positions= --out runs/lab",), python)


_WRITERS: Mapping[str, Callable[[str, type], Use]] = {
    "methods": _method,
    "statistics": _statistic,
    "policies": _policy,
    "edits": _edit,
    "decodings": _edit,
    "fits": _fit,
    "tasks": _task,
    "experiments": _experiment,
    "variants": _variant,
}
