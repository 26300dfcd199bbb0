"""The direction of imports, and that importing cospadi is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cospadi

ROOT = Path(cospadi.__file__).parent

ROOMS = [
    "errors",
    "registry",
    "arrays",
    "events",
    "files",
    "executors",
    "recipe",
    "formats",
    "models",
    "calibration",
    "whitening",
    "solvers",
    "allocation",
    "backends",
    "integrations",
    "evaluation",
    "reporting",
    "pipeline",
]
"""Each may import those above it; ``data`` holds texts alone."""
MAY_IMPORT_TRANSFORMERS = {"calibration", "models", "integrations", "pipeline", "evaluation"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


SOURCES = sorted(p for p in ROOT.rglob("*.py") if part(p) != "__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_only_from_lower_levels(path):
    own = part(path)
    for module in imported(path):
        top, _, rest = module.partition(".")
        if top in ("click", "rich"):
            pytest.fail(f"{own} imports {top}, which only the command line may")
        if top == "transformers":
            assert own in MAY_IMPORT_TRANSFORMERS
        if top == "cospadi" and rest:
            other = rest.partition(".")[0]
            assert ROOMS.index(other) <= ROOMS.index(own), f"{own} imports {other}, a room above it"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_cospadi_is_light():
    loaded = run("import sys, cospadi; print(*sys.modules)")
    heavy = {"transformers", "cupy", "spams", "numba", "sklearn", "click", "rich", "scipy"}
    assert not heavy & set(loaded)


def test_importing_every_module_needs_no_optional_package_and_starts_no_gpu():
    names = [".".join(("cospadi", *p.relative_to(ROOT).with_suffix("").parts)) for p in SOURCES]
    names = [n.removesuffix(".__init__") for n in names]
    code = (
        "import sys, importlib\n"
        "for name in ('cupy', 'spams', 'gguf', 'datasets', 'ray'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import torch; print('cuda', torch.cuda.is_initialized())\n"
    )
    assert run(code)[-2:] == ["cuda", "False"]
