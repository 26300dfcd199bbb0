"""kill -9 in the middle of a compression, then resume."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from cospadi.pipeline.stages import compress
from tests.helpers import tiny_model, token_windows
from tests.pipeline.test_compress import digests, recipe


def compress_and_die(out, kill_at, writes):
    """Compress with --resume; the process kills itself right before its n-th rename, the temporary file written."""
    count = 0
    replace = Path.replace

    def counted(self, target):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counted
    compress(tiny_model("llama"), out, recipe(), windows=token_windows(), resume=True)
    writes.value = count


@pytest.fixture(scope="module")
def run():
    # A server that has imported everything forks a child for each run: children start fast, and share no state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(out, kill_at=0):
        writes = context.Value("i", 0)
        child = context.Process(target=compress_and_die, args=(out, kill_at, writes))
        child.start()
        child.join()
        return child.exitcode, writes.value

    return run


@pytest.mark.slow
@pytest.mark.slow
def test_killed_at_any_write_a_resumed_run_gives_the_same_bytes(run, tmp_path):
    code, n_writes = run(tmp_path / "whole")
    assert code == 0
    assert n_writes > 15
    # The fingerprint, a group's tensors, a group's note, the last group, the shards, the report.
    for kill_at in (1, 2, 3, n_writes // 2, *range(n_writes - 4, n_writes + 1)):
        out = tmp_path / f"killed-{kill_at}"
        assert run(out, kill_at)[0] == -signal.SIGKILL
        assert run(out)[0] == 0
        assert digests(out) == digests(tmp_path / "whole")
