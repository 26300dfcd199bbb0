"""The outcome of a task, result or error, as bytes that travel between processes.

Both executors use plain pickle, so that a result is the same kind of object whichever ran the task: torch's way of
sending tensors needs the sender alive, and Ray gives arrays that cannot be written to.
"""

import pickle
import traceback
from collections.abc import Callable
from typing import Any


class RemoteTraceback(Exception):
    """The cause of an error that was raised in another process: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def pack_outcome(call: Callable[[], Any]) -> bytes:
    """Call, and give the result or the error; a result that cannot be pickled is an error."""
    try:
        return pickle.dumps((call(), None, ""), protocol=5)
    except Exception as error:  # of any kind: it is raised again where the outcome is unpacked
        return pickle.dumps((None, _portable(error), traceback.format_exc()), protocol=5)


def unpack_outcome(data: bytes | memoryview) -> Any:
    """Give the result, or raise the error with its traceback as the cause."""
    result, error, trace = pickle.loads(data)
    if error is not None:
        raise error from RemoteTraceback(trace)
    return result


def _portable(error: Exception) -> Exception:
    """Give the error, or its type and text where pickle does not bring it back as it was."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the __init__ or __reduce__ of a foreign class raises
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
