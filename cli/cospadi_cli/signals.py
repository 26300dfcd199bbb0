"""Ctrl-C and SIGTERM as exceptions, so that a run that is asked to stop cleans up."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME = 2.0
"""Seconds within which a second signal counts as the same: a launcher may pass on a signal that arrived anyway."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT and Terminated for SIGTERM, once for signals that come together.

    A second signal within two seconds does not interrupt the clean-up; a later one does, in case it hangs.  A signal
    that was ignored stays ignored (``nohup``).  Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last >= _SAME:
            last = now
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # After a signal the process is about to end; another one must not print a traceback from its last steps.
            signal.signal(number, handler if last is None else signal.SIG_IGN)
