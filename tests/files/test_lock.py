"""The lock on a folder: who holds it, when it is free, and what stands in its way."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from cospadi.errors import UsageError
from cospadi.files.lock import Lock, holder


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": "1", "host": "x"}', b'{"pid": 1, "host": "\\u001b[2J"}'])
def test_a_holder_that_has_not_named_itself_is_another_process(tmp_path, text):
    lock = Lock(tmp_path / "lock")
    (tmp_path / "lock").write_bytes(text)
    with pytest.raises(UsageError, match="in use by another process:"):
        Lock(tmp_path / "lock")
    lock.release()


def test_the_lock_of_a_folder_that_was_deleted_meanwhile_is_not_taken(tmp_path, monkeypatch):
    import cospadi.files.lock as module

    lock = module._lock

    def delete_first(file, shared=False):
        (tmp_path / "lock").unlink()
        lock(file, shared)

    monkeypatch.setattr(module, "_lock", delete_first)
    with pytest.raises(UsageError, match="finished and deleted by another process"):
        Lock(tmp_path / "lock")


def test_a_file_system_without_locks_is_an_error_and_not_a_free_lock(tmp_path, monkeypatch):
    import cospadi.files.lock as module

    def refuse(file, shared=False):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module, "_lock", refuse)
    with pytest.raises(OSError, match=r"lock cannot be .*No locks available"):
        Lock(tmp_path / "lock")


HOLD_AND_FORK = """
import os, sys, time
from pathlib import Path
from cospadi.files.lock import Lock
lock = Lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_frees_the_lock_even_if_a_child_of_it_lives_on(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD_AND_FORK, str(path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert holder(path).pid == process.pid
        with pytest.raises(UsageError, match=f"process {process.pid} on host"):
            Lock(path)
        process.kill()
        process.wait()
        os.kill(child, 0)  # still there
        assert holder(path) is None
        Lock(path).release()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
        process.wait()
