"""The command line uses rooms by their faces alone."""

import ast
from pathlib import Path

import cospadi_cli
import pytest

import cospadi

SOURCES = sorted(Path(cospadi_cli.__file__).parent.rglob("*.py"))
ROOMS = {
    path.parent.relative_to(Path(cospadi.__file__).parents[1]) for path in Path(cospadi.__file__).parent.rglob("*.pyi")
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_faces_and_the_ground_are_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cospadi."):
            room = Path(*node.module.split("."))
            assert room in ROOMS or len(room.parts) == 2, node.module
