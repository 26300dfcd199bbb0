"""Names to implementations, through entry points.

Solvers, formats and backends are chosen by name in recipes and on the command line.  Built-in ones and those
of third parties register in the same way: an entry point in the group ``cospadi.solvers``, ``cospadi.formats`` or
``cospadi.backends`` that points to a class.
"""

import difflib
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from cospadi.errors import CospadiError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Availability:
    """Whether something can run here, and if not, why."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Registry(Generic[T]):
    """The classes of one entry-point group by name, loaded on first use.

    Parameters
    ----------
    group : str
        Entry-point group, such as ``"cospadi.solvers"``.
    kind : str
        What a member is called in error texts, such as ``"solver"``.
    """

    def __init__(self, group: str, kind: str) -> None:
        self.group = group
        self.kind = kind

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        entries = {entry.name: entry for entry in entry_points(group=self.group)}
        if not entries:
            raise CospadiError(f"no {self.kind} is registered: install the package (pip install -e .) and try again")
        return entries

    def names(self) -> list[str]:
        """Give the registered names in alphabetical order."""
        return sorted(self._entries)

    def get(self, name: str) -> type[T]:
        """Give the class registered under a name.

        Raises
        ------
        UsageError
            The name is unknown; the text lists the known ones and suggests the nearest.
        """
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} {name!r}{nearest(name, self.names())}")
        return self._entries[name].load()

    def availability(self, name: str) -> Availability:
        """Tell whether the named implementation can run on this machine."""
        return self.get(name).availability()  # type: ignore[attr-defined]

    def create(self, name: str, options: dict[str, Any] | None = None) -> T:
        """Make an instance from a name and text or typed options.

        Raises
        ------
        UsageError
            The name or an option is unknown, or an option's value is not of the right type.
        """
        from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

        cls = self.get(name)
        options = dict(options or {})
        known = list(getattr(cls, "__dataclass_fields__", {}))
        for key in options:
            if key not in known:
                raise UsageError(f"{self.kind} {name!r} has no option {key!r}{nearest(key, known)}")
        if not options:
            return cls()
        try:
            with_config(ConfigDict(extra="forbid"))(cls)
            return TypeAdapter(cls).validate_python(options)
        except ValidationError as error:
            first = error.errors()[0]
            own = first.get("ctx", {}).get("error")
            if isinstance(own, CospadiError):  # the class checked its options itself
                raise UsageError(f"{self.kind} {name!r}: {own}") from error
            where = ".".join(str(part) for part in first["loc"])
            given = options.get(where, first["input"])
            raise UsageError(f"{self.kind} {name!r}, option {where}={given!r}: {first['msg']}") from error


def nearest(name: str, known: list[str]) -> str:
    """Phrase the nearest known name and the whole list, to end an error text."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    suggestion = f"; did you mean {match[0]!r}?" if match else ""
    return f"{suggestion} (known: {', '.join(known) or 'none'})"
