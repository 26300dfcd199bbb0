"""kill -9 in the middle of a compression, then resume."""

import signal
import subprocess
import sys

import pytest

from tests.pipeline.test_compress import digests

SCRIPT = """
import os, signal, sys
from pathlib import Path
import cospadi.work
from cospadi.events import GroupFinished
from cospadi.pipeline import compress
from tests.helpers import tiny_model, token_windows
from tests.pipeline.test_compress import recipe

out, kill_at = sys.argv[1], int(sys.argv[2])
writes = 0
replace = Path.replace

def counted(self, target):  # the process dies right before its n-th rename, with the temporary file written
    global writes
    writes += 1
    if writes == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = counted
compress(tiny_model("llama"), out, recipe(), windows=token_windows(), resume=True)
print(writes)
"""


def run(out, kill_at):
    return subprocess.run([sys.executable, "-c", SCRIPT, str(out), str(kill_at)], capture_output=True, text=True)


@pytest.mark.slow
def test_killed_at_any_write_a_resumed_run_gives_the_same_bytes(tmp_path):
    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    n_writes = int(whole.stdout)
    assert n_writes > 15
    # The fingerprint, a group's tensors, a group's note, the last group, the shards, the report.
    for kill_at in (1, 2, 3, n_writes // 2, n_writes - 2, n_writes - 1, n_writes):
        out = tmp_path / f"killed-{kill_at}"
        assert run(out, kill_at).returncode == -signal.SIGKILL
        again = run(out, 0)
        assert again.returncode == 0, again.stderr
        assert digests(out) == digests(tmp_path / "whole")
