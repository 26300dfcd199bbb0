import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import UsageError
from cospadi.recipe.resources import Execution, parse_size

POWERS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)
}


@given(st.integers(1, 4096), st.sampled_from(sorted(POWERS)), st.sampled_from(["", " "]), st.booleans())
def test_a_whole_number_of_units_is_exact(number, unit, space, lower):
    text = f"{number}{space}{unit}"
    assert parse_size(text.lower() if lower else text) == number * POWERS[unit]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8e9", 8 * 10**9), ("1.5GiB", 3 * 2**29), (" 500MiB ", 500 * 2**20), (".5kB", 500), ("1", 1), ("1e3kB", 10**6)],
)
def test_sizes_that_people_write(text, expected):
    assert parse_size(text) == expected


WRONG = ["", "GiB", "8G", "8 G iB", "-1GiB", "0", "0.2", "nan", "inf", "1e30", "8GiBB", "8,5GB", "0x10", "٣GB", "1_0"]


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "8GiB" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_gives_bytes_or_a_usage_error(text):
    with contextlib.suppress(UsageError):
        assert 1 <= parse_size(text) < 2**63


@pytest.mark.parametrize(
    "fields",
    [
        {"max_memory": 0},
        {"workers": 0},
        {"threads": -1},
        {"executor": "slurm"},
        {"executor": "ray", "ray_inputs": "disk"},
        {"ray_address": "auto"},
        {"ray_inputs": "object-store"},
    ],
)
def test_what_is_not_allowed_is_refused(fields):
    with pytest.raises(UsageError, match=next(iter(fields)) + "|ray"):
        Execution(**fields)


def test_ray_takes_its_own_options():
    assert Execution(executor="ray", ray_address="auto", ray_inputs="object-store").workers is None
