"""The solver for those who do not want to choose one."""

from dataclasses import dataclass
from typing import final

from array_api_compat import device

from cospadi.arrays import Array
from cospadi.solvers.base import SOLVERS, Solution, Solver


@final
@dataclass(frozen=True, kw_only=True)
class Auto(Solver):
    """The recommended solver.

    Delegates to the solver that ``choose`` names; ``statistics`` say which one it was and why.
    """

    @classmethod
    def choose(cls, device: str) -> tuple[str, str]:
        """Name the solver for a device such as ``cpu`` or ``cuda:1``, and the reason.

        Returns
        -------
        name, reason : str
        """
        where = "GPU" if device.startswith("cuda") else "CPU"
        return "htp", f"the lowest error for its time, by matrix products that keep the {where} busy"

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        name, reason = self.choose(str(device(target)))
        solution = SOLVERS.create(name)._factorize(target, n_atoms, n_nonzero, seed)
        statistics = {**solution.statistics, "solver": name, "reason": reason}
        return Solution(solution.dictionary, solution.coefficients, solution.status, statistics)
