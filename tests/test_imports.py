"""The rooms: their order, their faces, their names, and that importing cospadi is light."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import networkx as nx
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
"""Each room may import those above it in this list; ``data`` holds texts alone."""
MAY_IMPORT_TRANSFORMERS = {"calibration", "models", "integrations", "pipeline", "evaluation"}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
FACES = sorted(path.parent for path in ROOT.rglob("__init__.pyi") if path.parent != ROOT)


def dotted(path):
    """The name of a module of the package."""
    return ".".join(("cospadi", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {dotted(path): path for path in SOURCES}


def imported(path):
    """The modules that a file imports, with the names that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)


def room_of(module):
    """The room of a module of the package; the file itself for those without a folder."""
    return module.split(".")[1]


def is_past_a_face(module):
    """Whether a module lies inside a room."""
    path = MODULES.get(module)
    return path is not None and path.parent != ROOT and path.name != "__init__.py"


def test_there_are_few_rooms():
    entries = {path.stem for path in ROOT.iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert entries == {*ROOMS, "data"}
    assert len(entries) <= 20


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_lower_rooms_and_only_by_their_faces(room):
    for name, path in MODULES.items():
        if room_of(name) != room:
            continue
        for module, what in imported(path):
            top = module.partition(".")[0]
            assert top not in ("click", "rich"), f"{name} imports {top}, which only the command line may"
            assert top != "transformers" or room in MAY_IMPORT_TRANSFORMERS, f"{name} imports transformers"
            if top != "cospadi" or room_of(f"{module}.{what}") == room:
                continue
            other = room_of(f"{module}.{what}")
            assert ROOMS.index(other) < ROOMS.index(room), f"{name} imports {other}, a room above it"
            assert not is_past_a_face(module), f"{name} imports {module} past the face of its room"


def test_the_command_line_and_the_documents_import_rooms_by_their_faces():
    found = [path.read_text(encoding="utf-8") for path in (ROOT.parent / "cli").rglob("*.py")]
    pages = [*(ROOT.parent / "docs").glob("*.md"), ROOT.parent / "README.md"]
    found += [code for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    for text in found:
        for module in re.findall(r"^\s*from (cospadi(?:\.\w+)*) import", text, re.MULTILINE):
            assert not is_past_a_face(module), f"{module} is not a face"


@pytest.mark.parametrize("folder", FACES, ids=dotted)
def test_a_face_names_what_is_there_and_hides_no_module(folder):
    face = import_module(dotted(folder))
    assert face.__doc__
    assert face.__all__ == sorted(face.__all__)
    inside = {path.stem for path in folder.iterdir()}
    for name in face.__all__:
        assert getattr(face, name) is not None
        assert name not in inside, f"{name} is a module of the room as well"


def test_no_two_modules_have_names_that_differ_by_an_ending():
    endings = re.compile(r"(ations?|ings?|ions?|ers?|ors?|ors|ed|es|e|s|y|ies)$")
    stems = defaultdict(set)
    for path in SOURCES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        shorter = endings.sub("", name)
        stems[shorter if len(shorter) > 3 else name].add(name)
    twins = {stem: names for stem, names in stems.items() if len(names) > 1}
    assert not twins


def test_modules_import_one_another_in_no_circle():
    graph = nx.DiGraph()
    for name, path in MODULES.items():
        for module, what in imported(path):
            target = f"{module}.{what}" if f"{module}.{what}" in MODULES else module
            if target in MODULES and target != name:
                graph.add_edge(name, target)
    assert not [part for part in nx.strongly_connected_components(graph) if len(part) > 1]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_cospadi_is_light():
    loaded = run("import sys, cospadi; print(*sys.modules)")
    heavy = {"torch", "transformers", "cupy", "spams", "numba", "sklearn", "click", "rich", "scipy"}
    assert not heavy & set(loaded)


def test_importing_every_module_needs_no_optional_package_and_starts_no_gpu():
    code = (
        "import sys, importlib\n"
        "for name in ('cupy', 'spams', 'gguf', 'datasets', 'ray'): sys.modules[name] = None\n"
        f"for name in {sorted(MODULES)!r}: importlib.import_module(name)\n"
        "import torch; print('cuda', torch.cuda.is_initialized())\n"
    )
    assert run(code)[-2:] == ["cuda", "False"]
