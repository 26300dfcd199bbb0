"""Import paths that documents named before: the same objects, with a warning at the line that imports them."""

import importlib
import subprocess
import sys

import pytest

from cospadi.integrations.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_the_old_path_warns_and_gives_what_the_room_gives(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import from {MOVED[old]}"):
        module = importlib.import_module(old)
    room = importlib.import_module(MOVED[old])
    assert all(getattr(module, name) is getattr(room, name) for name in room.__all__)
    assert not hasattr(module, "nothing_of_this_name")


def test_the_warning_names_the_line_of_the_user():
    code = "import cospadi\nfrom cospadi.progress import TimeLeft\n"
    found = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "<string>:2: DeprecationWarning: cospadi.progress has moved" in found.stderr
