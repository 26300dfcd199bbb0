"""The formula that predicts memory, against the committed measurements."""

import json
from pathlib import Path

import pytest
from solving_memory import covering

from cospadi.pipeline import memory_plan as memory

WAYS = json.loads((Path(memory.__file__).parents[2] / "benchmarks/results/solving-memory.json").read_text())["ways"]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["way"])
def test_the_formula_covers_what_was_measured_and_not_much_more(way):
    a, b, c = memory._SOLVING[way["way"]]
    for row in way["rows"]:
        d, n = row["in_features"], row["out_features"]
        predicted = 8 * sum(f * term for f, term in zip((a, b, c), memory.solving_terms(way["way"], d, n), strict=True))
        assert row["bytes"] <= predicted < 1.45 * row["bytes"]


def test_the_factors_are_the_least_that_cover():
    rows = [
        {"in_features": d, "out_features": n, "bytes": 8 * (2 * d * d + 3 * d * n + 4 * min(d, n) ** 2)}
        for d, n in ((10, 10), (10, 30), (30, 10), (20, 15))
    ]
    assert covering("htp", rows) == pytest.approx([2, 3, 4])
    rows[0]["bytes"] *= 1.01
    more = covering("htp", rows)
    for row in rows:
        d, n = row["in_features"], row["out_features"]
        assert 8 * (more[0] * d * d + more[1] * d * n + more[2] * min(d, n) ** 2) >= row["bytes"] * (1 - 1e-9)
