"""``selftest``: what it prints, and its exit code."""

import json

import pytest

from cospadi.backends import selftest
from cospadi.backends.selftest import Check, gpu
from tests.cli.conftest import error_line


def test_the_backends_of_the_cpu_pass_and_the_rest_is_skipped_with_reasons(run):
    from cospadi.backends.base import BACKENDS

    result = run("selftest", "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    checks = found["checks"]
    assert found["failed"] == 0
    assert {one["verdict"] for one in checks} == {"passed", "skipped"}
    for name in ("reference", "torch", "auto"):
        mine = [one for one in checks if one["subject"] == name]
        assert len(mine) == 3
        assert all(one["verdict"] == "passed" and one["cases"] > 100 for one in mine)
        assert all(0 < one["worst"] <= one["allowed"] for one in mine)
    assert set(BACKENDS.names()) <= {one["subject"] for one in checks}
    assert all(one["detail"] for one in checks if one["verdict"] == "skipped")
    assert not any(one["cases"] for one in checks if one["verdict"] == "skipped")
    assert {one["check"] for one in checks} >= set(gpu.NAMES)


@pytest.fixture
def pretended(monkeypatch):
    """Instant checks; gives the list of them."""
    found = [
        Check("product, bfloat16", "torch", "passed", 12, 2.5e-3, 1e-2),
        Check("CUDA graph", "cupy", "skipped", detail="cupy takes memory from a pool of its own"),
    ]
    monkeypatch.setattr(selftest, "checks", lambda gpu: iter(found))
    return found


def test_the_table_shows_every_check_and_counts_the_verdicts(run, pretended):
    result = run("selftest")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split(", ")[1].startswith("torch ")
    (row,) = (line for line in lines if line.startswith("product, bfloat16"))
    assert row.split() == ["product,", "bfloat16", "torch", "12", "2.5e-03", "1.0e-02", "passed"]
    assert "    cupy takes memory from a pool of its own" in lines
    assert lines[-1] == "1 passed, 0 failed, 1 skipped"
    assert "product, bfloat16, torch: passed" in result.stderr  # while it runs


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_a_failed_check_leaves_with_1_and_says_where(run, pretended, json_too):
    pretended.append(Check("product, float16", "cuda", "failed", 3, None, 1e-3, "8 tokens: relative error nan"))
    result = run("selftest", *json_too)
    assert result.exit_code == 1
    assert "8 tokens: relative error nan" in result.stdout
    if json_too:
        assert json.loads(result.stdout)["failed"] == 1
    else:
        assert result.stdout.splitlines()[-1] == "1 passed, 1 failed, 1 skipped"


def test_a_missing_gpu_is_one_line(run):
    from cospadi.arrays import cuda_availability

    if cuda_availability():
        pytest.skip("this machine has a GPU")
    line = error_line(run("selftest", "--gpu"))
    assert "torch finds no CUDA GPU on this machine" in line
    assert "without --gpu" in line
