"""Outcomes of checks."""

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
        Number of products or solutions that were checked.
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
    """Results of the cases of a check so far."""

    cases: int = 0
    worst: float = 0.0
    failure: str = ""

    def compare(self, found: Tensor, expected: Tensor, allowed: float, case: str) -> None:
        """Count one case by its relative error; NaN fails."""
        norm = float(expected.norm())
        error = float((found.double() - expected).norm()) / (norm or 1.0)
        self.cases += 1
        # max() would drop NaN, so it becomes infinity.
        self.worst = max(self.worst, error) if error == error else float("inf")
        self.require(error <= allowed, f"{case}: relative error {error:.3g}")

    def require(self, held: bool, failure: str) -> None:
        """Keep the first failure."""
        if not held and not self.failure:
            self.failure = failure


def guarded(check: str, subject: str, allowed: float | None, run: Callable[[Findings], str]) -> Check:
    """Run a check; an exception is a failure, and a returned text is the reason why it is skipped.

    Parameters
    ----------
    check, subject, allowed
        See ``Check``.
    run : callable
        Fills the findings.  Gives the reason why nothing could be checked, else an empty text.
    """
    findings = Findings()
    try:
        reason = run(findings)
    except Exception as error:  # any error of a backend is a failure of this check; the next check still runs
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
