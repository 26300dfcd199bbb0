"""Comparison of K-SVD on torch and cupy arrays with the compiled K-SVD on numpy arrays."""

import torch

from cospadi.backends.selftest.findings import Check, Findings, guarded
from cospadi.solvers import SOLVERS
from cospadi.whitening import Problem

PAPER = {"block": 1, "power_iterations": 8, "pursue_every": 1}
"""Updates one atom after the other, for which the solver on numpy arrays has a compiled loop."""


def ksvd(name: str, device: torch.device) -> Check:
    """Compare a K-SVD with the compiled one of numpy on a target that is sparse in a random dictionary."""
    allowed = 1e-6

    def run(findings: Findings) -> str:
        state = SOLVERS.availability(name)
        if not state:
            return state.reason
        generator = torch.Generator().manual_seed(0)
        dictionary = torch.randn(24, 36, generator=generator, dtype=torch.float64)
        S = torch.randn(36, 300, generator=generator, dtype=torch.float64)
        S[torch.rand(S.shape, generator=generator).argsort(0) >= 3] = 0
        target = dictionary @ S
        # Rounding errors grow with the alternations, so after several only the errors of the fits are compared.
        for n_iter, recipe in ((1, PAPER), (6, PAPER), (1, {}), (6, {})):
            options = {"n_iter": n_iter, "tolerance": 0.0, **recipe}
            ours = SOLVERS.create(name, {**options, "compiled": False}).solve(Problem(target.to(device), 36, 3))
            theirs = SOLVERS.create("ksvd-numpy", options).solve(Problem(target, 36, 3))
            found, expected = ((one.dictionary @ one.coefficients).cpu() for one in (ours, theirs))
            if n_iter == 1:
                findings.compare(found, expected, allowed, "one alternation")
                continue
            errors = [float((target - one).norm() / target.norm()) for one in (found, expected)]
            findings.cases += 1
            findings.require(
                errors[0] <= 1.1 * errors[1] + 0.01, f"{n_iter} alternations: {errors[0]:.4f}, numpy {errors[1]:.4f}"
            )
        return ""

    return guarded("K-SVD beside numpy", name, allowed, run)
