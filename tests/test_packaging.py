"""The rules that keep the repository installable and its rooms apart; every checker is shown to fail on a violation.

Rooms are folders, imported as ``headscope.ROOM``. Imports go one way: kernels <- interp <- probes <- interventions.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "interp", "probes", "interventions")
BELOW = {room: set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}  # where the import has another name
# interp, from the ground up: a folder or file imports those before it
FLOORS = (
    "errors",
    "registry",
    "attention",
    "sites",
    "statistics",
    "models",
    "machine",
    "runs",
    "prompts",
    "results",
    "records",
    "tracing",
    "heads",
    "analysis",
    "plots",
    "reports",
    "explorer",
    "sweeps",
    "cache",
    "survey",
    "laboratory",
    "cli",
)
NOT_PACKAGES = {"__pycache__", "data", "benchmarks"}


def sources(root: Path = ROOT, folders: tuple[str, ...] = ROOMS) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((root / folder).rglob("*.py")) if not is_hidden(path, root))


def is_hidden(path: Path, root: Path) -> bool:
    """Caches and scratch folders (their names begin with a dot) are not part of the repository."""
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


@functools.cache
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, made once: every rule reads the whole repository."""
    return _parsed(path, path.stat().st_mtime_ns)


def pyproject(root: Path = ROOT) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def imports(path: Path, *, types: bool = True) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file as a dotted name, and whether it is imported when the file is; with or without
    those that only type checkers import."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(child, False) if types else ()
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, top and not inside)

    yield from visit(parsed(path), True)


# -- the checkers: each returns what is wrong --------------------------------------------------------------------------


def package_faults(root: Path) -> set[str]:
    """Packages on disk that pyproject does not list, or the other way round; rooms mapped to other folders."""
    settings = pyproject(root)["tool"]["setuptools"]
    on_disk = set()
    for room in ROOMS:
        for folder in [root / room, *(p for p in (root / room).rglob("*") if p.is_dir())]:
            parts = folder.relative_to(root).parts
            if any(part in NOT_PACKAGES or part.startswith(".") for part in parts) or not list(folder.glob("*.py")):
                continue
            on_disk.add(".".join(("headscope", *parts)))
    faults = {f"{name} is not listed" for name in on_disk - set(settings["packages"])}
    faults |= {f"{name} is not there" for name in set(settings["packages"]) - on_disk}
    if settings["package-dir"] != {f"headscope.{room}": room for room in ROOMS}:
        faults.add("package-dir does not map the rooms")
    return faults


def init_faults(root: Path) -> set[str]:
    """``kernels`` must not be a regular package (Hugging Face has one of that name), nor tests; the others must."""
    faults = set()
    for folder in [root / room for room in ROOMS] + [p for p in (root / "interp").iterdir() if p.is_dir()]:
        if folder.name in NOT_PACKAGES or folder.name == "kernels":
            continue
        if list(folder.glob("*.py")) and not (folder / "__init__.py").exists():
            faults.add(f"{folder.relative_to(root)} has no __init__.py")
    for folder in ("kernels", "tests"):
        found = (path for path in sources(root, (folder,)) if path.name == "__init__.py")
        faults |= {f"{path.relative_to(root)} must not exist" for path in found}
    return faults


def direction_faults(root: Path) -> set[str]:
    """Imports against the direction of the rooms, and rooms imported by their bare names.

    The command line (``interp/cli``) may import every room inside its functions; benchmarks may also import interp.
    """
    faults = set()
    for path in sources(root):
        place = path.relative_to(root)
        allowed = set(BELOW[place.parts[0]])
        if "benchmarks" in place.parts:
            allowed.add("interp")
        command_line = place.parts[:2] in (("interp", "cli"), ("interp", "cli.py"))
        for name, top in imports(path):
            parts = name.split(".")
            if parts[0] in ROOMS:
                faults.add(f"{place} imports {parts[0]}, not headscope.{parts[0]}")
            elif parts[0] == "headscope" and len(parts) > 1 and parts[1] not in allowed:
                if not (command_line and not top and parts[1] in ROOMS):
                    faults.add(f"{place} imports headscope.{parts[1]}")
    return faults


def modules(root: Path) -> dict[str, set[str]]:
    """Every module of the rooms, by its place (``interp/heads/base.py``), and the places that it imports, anywhere."""
    place = {}
    for path in sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        place["headscope." + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for path in place.values():
        names = {name for name, _ in imports(path, types=False)}
        known = {name if name in place else name.rpartition(".")[0] for name in names}
        found[str(path.relative_to(root))] = {
            str(place[name].relative_to(root)) for name in known if name in place and place[name] != path
        }
    return found


def cycle_faults(root: Path) -> set[str]:
    """Files that import each other in a circle, and folders of a room that do."""
    files = {a: bs for a, bs in modules(root).items() if "benchmarks" not in a}
    folders: dict[str, set[str]] = {}
    for a, bs in files.items():
        here = _folder(a)
        folders.setdefault(here, set()).update({_folder(b) for b in bs} - {here, a.split("/")[0]})
    return {f"{' and '.join(circle)} import each other" for graph in (files, folders) for circle in _circles(graph)}


def _folder(place: str) -> str:
    """A file's folder within its room: of ``interp/sites/huggingface/route.py`` it is ``interp/sites``."""
    parts = place.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] != "kernels" else parts[0]


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes of which each reaches each."""

    def reached(start: str) -> set[str]:
        found, queue = set(), [start]
        while queue:
            fresh = graph.get(queue.pop(), set()) - found
            found |= fresh
            queue += fresh
        return found

    from_each = {node: reached(node) for node in graph}
    circles = {tuple(sorted(b for b in there if a in from_each.get(b, set()))) for a, there in from_each.items()}
    return [list(circle) for circle in circles if len(circle) > 1]


def order_faults(root: Path) -> set[str]:
    """Imports inside interp that go up in ``FLOORS``, and folders that have no floor."""
    faults = set()
    for a, bs in modules(root).items():
        if not a.startswith("interp/") or "benchmarks" in a or a == "interp/__init__.py":
            continue
        here = a.split("/")[1].removesuffix(".py")
        if here not in FLOORS:
            faults.add(f"interp/{here} is on no floor")
            continue
        above = {b for b in bs if b.startswith("interp/") and b.split("/")[1].removesuffix(".py") in FLOORS}
        faults |= {
            f"{a} imports {b}" for b in above if FLOORS.index(b.split("/")[1].removesuffix(".py")) > FLOORS.index(here)
        }
    return faults


def size_faults(root: Path) -> set[str]:
    """Files too long to read in one sitting; a GPU kernel's device code may not be split."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    long = {path for path, n in lengths.items() if n > 300 and not set(path.parts) & {"hopper", "triton"}}
    return {f"{path.relative_to(root)} has {lengths[path]} lines" for path in long}


def bare_name_faults(root: Path) -> set[str]:
    """Rooms imported by their bare names anywhere, tests included: it would load a second copy."""
    found = {(path, name.split(".")[0]) for path in sources(root, (*ROOMS, "tests")) for name, _ in imports(path)}
    return {f"{path.relative_to(root)} imports {name}" for path, name in found if name in ROOMS}


def pickle_faults(root: Path) -> set[str]:
    """Code in the rooms that could run a pickle: the modules, torch.load without weights_only=True, numpy's option."""
    faults = set()
    for path in sources(root):
        place = path.relative_to(root)
        modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
        faults |= {
            f"{place} imports {name.split('.')[0]}" for name, _ in imports(path) if name.split(".")[0] in modules
        }
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load" and options.get("weights_only") != "True":
                faults.add(f"{place}:{node.lineno} torch.load without weights_only=True")
            if options.get("allow_pickle", "False") != "False":
                faults.add(f"{place}:{node.lineno} allow_pickle")
            if called in ("torch.save", "joblib.dump", "joblib.load") or called.endswith(
                (".to_pickle", ".read_pickle")
            ):
                faults.add(f"{place}:{node.lineno} {called}")
    return faults


def dependency_faults(root: Path) -> set[str]:
    """Packages that the rooms import and pyproject does not declare, as a dependency or an extra."""
    project = pyproject(root)["project"]
    extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for name, group in extras.items() if name != "dev" for line in group)]
    declared = {canonical(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]) for line in lines}
    faults = set()
    for path in sources(root):
        for name, _ in imports(path):
            first = name.split(".")[0]
            if first in sys.stdlib_module_names or first in (*ROOMS, "headscope"):
                continue
            if canonical(DISTRIBUTION.get(first, first)) not in declared:
                faults.add(f"{path.relative_to(root)} imports {first}, which pyproject does not declare")
    return faults


def stale_faults(root: Path) -> set[str]:
    """Modules that are not there, named by an import anywhere in the text of tests, notebooks and the README: a script
    within a string is seen by no other check. Tests of the packaging itself make up modules."""
    known = {place.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for place in modules(root)}
    known |= set(ROOMS) | {".".join(path.parent.relative_to(root).parts) for path in sources(root)}
    texts = [
        path for path in sources(root, ("tests",)) if path.name not in ("test_packaging.py", "test_contributing.py")
    ]
    texts += [*root.glob("notebooks/*.ipynb"), *root.glob("README.md")]
    return {
        f"{path.relative_to(root)} imports headscope.{name}, which is not there"
        for path in texts
        for name in re.findall(r"\b(?:from|import) headscope\.([\w.]+\w)", path.read_text(encoding="utf-8"))
        if name not in known
    }


def shadow_faults(root: Path) -> set[str]:
    """Files in a folder of scripts that hide a module of the standard library from whatever such a script imports."""
    benchmarks = (path for path in sources(root) if path.parent.name == "benchmarks")
    return {
        f"{path.relative_to(root)} hides {path.stem}" for path in benchmarks if path.stem in sys.stdlib_module_names
    }


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


CHECKERS = (
    package_faults,
    init_faults,
    direction_faults,
    bare_name_faults,
    pickle_faults,
    dependency_faults,
    shadow_faults,
    stale_faults,
    cycle_faults,
    order_faults,
    size_faults,
)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_repository_keeps_the_rule(checker) -> None:
    assert sum(1 for _ in sources()) > 50, "the rooms were not found"
    assert checker(ROOT) == set()


# -- seeded violations -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of one line a file that keeps every rule."""
    files = {
        "kernels/masks.py": "import torch\n",
        "kernels/benchmarks/speed.py": "from headscope.interp import trace\n",
        "interp/__init__.py": "",
        "interp/errors.py": "",
        "interp/tracing/__init__.py": "from headscope.kernels.masks import Mask\nimport numpy as np\n",
        "interp/heads/__init__.py": "from headscope.interp import errors\n",
        "interp/tracing/b.py": "import headscope.interp.tracing\n",
        "interp/cli/__init__.py": "def main():\n    from headscope.interventions import evaluate\n",
        "probes/__init__.py": "from headscope.interp import trace\nfrom sklearn.svm import SVC\n",
        "interventions/__init__.py": "from headscope import probes\nfrom headscope.kernels import masks\n",
        "tests/kernels/test_masks.py": "from headscope.kernels import masks\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    packages = [f"headscope.{name}" for name in (*ROOMS, "interp.heads", "interp.tracing", "interp.cli")]
    folders = "\n".join(f'"headscope.{room}" = "{room}"' for room in ROOMS)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "headscope"\ndependencies = ["torch>=2", "numpy", "scikit-learn>=1"]\n'
        '[project.optional-dependencies]\ntriton = ["triton; platform_system == \'Linux\'"]\ndev = ["pytest"]\n'
        f"[tool.setuptools]\npackages = {packages}\n[tool.setuptools.package-dir]\n{folders}\n"
    )
    return tmp_path


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_a_repository_that_keeps_the_rules_has_no_fault(small: Path, checker) -> None:
    assert checker(small) == set()


@pytest.mark.parametrize(
    ("checker", "file", "text", "fault"),
    [
        (package_faults, "interp/sites/__init__.py", "", "headscope.interp.sites is not listed"),
        (package_faults, "kernels/triton/rows.py", "", "headscope.kernels.triton is not listed"),
        (package_faults, "interp/heads/__init__.py", None, "headscope.interp.heads is not there"),
        (init_faults, "kernels/__init__.py", "", "kernels/__init__.py must not exist"),
        (init_faults, "tests/__init__.py", "", "tests/__init__.py must not exist"),
        (init_faults, "tests/kernels/__init__.py", "", "tests/kernels/__init__.py must not exist"),
        (init_faults, "interp/sites/hf.py", "", "interp/sites has no __init__.py"),
        (init_faults, "interp/__init__.py", None, "interp has no __init__.py"),
        (
            direction_faults,
            "kernels/a.py",
            "from headscope.interp import trace",
            "kernels/a.py imports headscope.interp",
        ),
        (
            direction_faults,
            "interp/a.py",
            "import headscope.probes.linear.heads",
            "interp/a.py imports headscope.probes",
        ),
        (
            direction_faults,
            "interp/a.py",
            "def f():\n    from headscope.interventions import apply",
            "interp/a.py imports headscope.interventions",
        ),
        (direction_faults, "interp/a.py", "from headscope import probes", "interp/a.py imports headscope.probes"),
        (
            direction_faults,
            "probes/a.py",
            "import headscope.interventions",
            "probes/a.py imports headscope.interventions",
        ),
        (
            direction_faults,
            "interp/cli/a.py",
            "from headscope.interventions import apply",
            "interp/cli/a.py imports headscope.interventions",
        ),
        (
            direction_faults,
            "kernels/benchmarks/a.py",
            "import headscope.probes",
            "kernels/benchmarks/a.py imports headscope.probes",
        ),
        (direction_faults, "interp/a.py", "import kernels", "interp/a.py imports kernels, not headscope.kernels"),
        (bare_name_faults, "tests/test_a.py", "def f():\n    import interp.tracer", "tests/test_a.py imports interp"),
        (bare_name_faults, "tests/test_a.py", "from kernels import masks", "tests/test_a.py imports kernels"),
        (pickle_faults, "probes/a.py", "import pickle", "probes/a.py imports pickle"),
        (pickle_faults, "probes/a.py", "def f():\n    from dill import load", "probes/a.py imports dill"),
        (pickle_faults, "probes/a.py", "torch.load('x')", "probes/a.py:1 torch.load without weights_only=True"),
        (
            pickle_faults,
            "probes/a.py",
            "torch.load('x', weights_only=False)",
            "probes/a.py:1 torch.load without weights_only=True",
        ),
        (pickle_faults, "probes/a.py", "np.load('x', allow_pickle=True)", "probes/a.py:1 allow_pickle"),
        (pickle_faults, "probes/a.py", "torch.save(x, 'x')", "probes/a.py:1 torch.save"),
        (pickle_faults, "probes/a.py", "frame.to_pickle('x')", "probes/a.py:1 frame.to_pickle"),
        (
            dependency_faults,
            "interp/a.py",
            "import joblib",
            "interp/a.py imports joblib, which pyproject does not declare",
        ),
        (
            dependency_faults,
            "interp/a.py",
            "import pytest",  # declared for development only
            "interp/a.py imports pytest, which pyproject does not declare",
        ),
        (
            cycle_faults,
            "interp/errors.py",
            "def f():\n    from headscope.interp.heads import a",
            "interp/errors.py and interp/heads/__init__.py import each other",
        ),
        (
            cycle_faults,
            "interp/tracing/__init__.py",
            "from headscope.interp.tracing import b",
            "interp/tracing/__init__.py and interp/tracing/b.py import each other",
        ),
        (
            order_faults,
            "interp/errors.py",
            "from headscope.interp import heads",
            "interp/errors.py imports interp/heads/__init__.py",
        ),
        (order_faults, "interp/attic/a.py", "", "interp/attic is on no floor"),
        (size_faults, "probes/a.py", "x = 1\n" * 301, "probes/a.py has 301 lines"),
        (
            stale_faults,
            "tests/test_a.py",
            'RUN = "from headscope.interp.models.tiny import tiny_model"',
            "tests/test_a.py imports headscope.interp.models.tiny, which is not there",
        ),
        (shadow_faults, "kernels/benchmarks/profile.py", "", "kernels/benchmarks/profile.py hides profile"),
    ],
)
def test_a_violation_is_found(small: Path, checker, file: str, text: str | None, fault: str) -> None:
    path = small / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert fault in checker(small)


def test_allowed_loads_are_no_faults(small: Path) -> None:
    (small / "probes/a.py").write_text("torch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)\n")
    assert pickle_faults(small) == set()


# -- what is installed and imported ------------------------------------------------------------------------------------


def test_the_installed_package_is_this_repository_and_its_version() -> None:
    assert metadata.version("headscope") == pyproject()["project"]["version"]
    code = "import headscope.kernels.masks as m, headscope.interp as i; print(m.__file__, i.__file__)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert [Path(name).parts[-2:] for name in run.stdout.split()] == [
        ("kernels", "masks.py"),
        ("interp", "__init__.py"),
    ]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_loaded_modules_are_seen() -> None:
    assert "torch" in loaded_by("import torch")


@pytest.mark.parametrize(
    "module", ["headscope.interp", "headscope.probes", "headscope.interventions", "headscope.interp.heads"]
)
def test_importing_a_room_does_not_import_torch(module: str) -> None:
    heavy = {"torch", "transformers", "triton", "scipy", "sklearn", "plotly", "xarray", "pandas"}
    assert not loaded_by(f"import {module}") & heavy


@pytest.mark.parametrize("module", ["headscope.interp", "headscope.probes", "headscope.interventions"])
def test_every_public_name_exists_and_nothing_else_is_promised(module: str) -> None:
    import importlib

    room = importlib.import_module(module)
    for name in room.__all__:
        assert getattr(room, name) is not None
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
        _ = room.nothing_of_that_name


def test_importing_everything_patches_nothing_and_tracing_imports_no_other_site() -> None:
    """In one process, for importing transformers takes seconds."""
    statement = (
        "import torch, transformers\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "before = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)\n"
        "import headscope.interp.tracing.tracer, headscope.interp.sites.huggingface.verify\n"
        "import headscope.interventions.evaluation.evaluate\n"
        "after = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)\n"
        "assert before == after, (before, after)\n"
        "from headscope.interp import trace\n"
        "from headscope.interp.statistics import Entropy\n"
        "from headscope.interp.survey.tiny import tiny_model\n"
        "with trace(model := tiny_model('llama'), [Entropy()]):\n"
        "    model(input_ids=torch.ones(1, 3, dtype=torch.long))"
    )
    found = loaded_by(statement)
    assert "transformers" in found and not {"transformer_lens", "nnsight"} & found
