"""Ctrl-C and SIGTERM: a run that is asked to stop ends in order, by an exception."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME = 2.0
"""Seconds within which a second signal is part of the first: impatience, or a launcher that passes it on as well."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT and Terminated for SIGTERM, once for signals that come together.

    What stops is not interrupted by a second Ctrl-C at once; one that comes later gets through, should stopping hang.
    A signal that was ignored stays so (``nohup``), and outside the main thread nothing changes.
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
            # After one signal the process is about to end, and another must not fill the screen from its last steps.
            signal.signal(number, handler if last is None else signal.SIG_IGN)
