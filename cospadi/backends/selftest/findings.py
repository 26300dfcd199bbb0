"""What a check looked at and how it ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes
    ----------
    check, subject : str
        What was checked, and of which backend or solver.
    verdict : {"passed", "failed", "skipped"}
    cases : int
        How many products or solutions were looked at.
    worst, allowed : float or None
        Relative error where one was measured; None also where the worst is not finite.
    detail : str
        The first failure, or why the check was skipped.
    """

    check: str
    subject: str
    verdict: Verdict
    cases: int = 0
    worst: float | None = None
    allowed: float | None = None
    detail: str = ""


@dataclass
class Findings:
    """What the cases of a check found so far."""

    cases: int = 0
    worst: float = 0.0
    failure: str = ""

    def compare(self, found: Tensor, expected: Tensor, allowed: float, case: str) -> None:
        """Count one case by its relative error; NaN fails."""
        norm = float(expected.norm())
        error = float((found.double() - expected).norm()) / (norm or 1.0)
        self.cases += 1
        # NaN compares with nothing, so it must be caught before it is forgotten.
        self.worst = max(self.worst, error) if error == error else float("inf")
        self.require(error <= allowed, f"{case}: relative error {error:.3g}")

    def require(self, held: bool, failure: str) -> None:
        """Note the first thing that did not hold."""
        if not held and not self.failure:
            self.failure = failure


def guarded(check: str, subject: str, allowed: float | None, run: Callable[[Findings], str]) -> Check:
    """Run a check; what it raises is a failure, and what it returns a reason to skip it.

    Parameters
    ----------
    check, subject, allowed
        See ``Check``.
    run : callable
        Fills the findings.  Gives why nothing could be looked at, else an empty text.
    """
    findings = Findings()
    try:
        reason = run(findings)
    except Exception as error:  # whatever a backend or its libraries raise is a finding, and the next check still runs
        findings.require(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
        reason = ""
    if findings.failure:
        verdict: Verdict = "failed"
    else:
        verdict = "skipped" if reason or findings.cases == 0 else "passed"
    measured = findings.cases > 0 and allowed is not None and findings.worst != float("inf")
    detail = findings.failure or reason or ("" if findings.cases else "there was nothing to look at")
    return Check(check, subject, verdict, findings.cases, findings.worst if measured else None, allowed, detail)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit: NaN equals itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
