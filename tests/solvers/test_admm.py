"""Dictionary learning by ADMM beyond the laws of every solver: what iterations gain, and its options."""

import numpy as np
import pytest

from cospadi.errors import UsageError
from cospadi.solvers.admm import ADMM
from cospadi.solvers.base import relative_error
from cospadi.solvers.htp import HTP, first_factors
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import whitened_like


@pytest.mark.parametrize("shape", [(24, 60, 18, 8), (30, 40, 24, 12), (16, 80, 16, 5), (12, 60, 20, 3)])
def test_it_ends_below_its_start_and_its_own_polish(shape):
    d, n, k, s = shape
    for seed in range(3):
        target = whitened_like(d, n, seed)
        A, S = first_factors(target, k, s, 0)
        start = np.linalg.norm(target - A @ S) / np.linalg.norm(target)
        polished = relative_error(target, ADMM(n_iter=0).solve(Problem(target, k, s)))
        found = relative_error(target, ADMM().solve(Problem(target, k, s)))
        assert polished < start
        assert found < 0.97 * polished


def test_it_is_about_as_good_as_long_pursuit():
    ratios = []
    for seed in range(4):
        target = whitened_like(24, 60, seed)
        found = relative_error(target, ADMM().solve(Problem(target, 18, 8)))
        ratios.append(found / relative_error(target, HTP(n_iter=60).solve(Problem(target, 18, 8))))
    assert max(ratios) < 1.05


def test_a_hopeless_penalty_does_no_harm():
    """With next to no penalty the free coefficients leave the sparse ones behind; the start is kept then."""
    target = whitened_like(20, 50, 3)
    polished = relative_error(target, ADMM(n_iter=0).solve(Problem(target, 16, 4)))
    found = relative_error(target, ADMM(n_iter=5, first_penalty=1e-9, last_penalty=1e-9).solve(Problem(target, 16, 4)))
    assert found <= polished * (1 + 1e-9)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_iter": -1}, "n_iter=-1"),
        ({"cg_steps": -2}, "cg_steps=-2"),
        ({"first_penalty": 0.0}, "expected 0 < first <= last"),
        ({"first_penalty": 6.0}, "expected 0 < first <= last"),
        ({"last_penalty": float("inf")}, "expected 0 < first <= last"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(UsageError, match=text):
        ADMM(**options)


@pytest.mark.parametrize("relaxation", [0.0, -1.0, 4.5])
def test_htp_refuses_steps_out_of_range(relaxation):
    with pytest.raises(UsageError, match="relaxation="):
        HTP(relaxation=relaxation)
