import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import UsageError
from cospadi.recipe.options import CalibrationConfig, CompressionConfig


@given(
    ratio=st.floats(0.01, 0.99),
    rho=st.floats(1, 8),
    groups=st.sampled_from(["none", "natural", "consecutive:3"]),
    samples=st.integers(1, 999),
    exclude=st.lists(st.text("abc.*", min_size=1), max_size=3),
)
def test_to_dict_and_from_dict_are_inverse(ratio, rho, groups, samples, exclude):
    config = CompressionConfig(
        ratio=ratio, rho=rho, groups=groups, exclude=tuple(exclude), calibration=CalibrationConfig(samples=samples)
    )
    assert CompressionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"ratoi": 0.2}, "unknown option 'ratoi'; did you mean 'ratio'"),
        ({"calibration": {"sample": 3}}, "did you mean 'samples'"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": 0}, "ratio=0"),
        ({"rho": 0.5}, "rho=0.5"),
        ({"groups": "consecutive:0"}, "expected none, natural, natural:N, consecutive:N"),
        ({"groups": "pairs"}, "expected none, natural, natural:N, consecutive:N"),
        ({"value_dtype": "int3"}, "value_dtype"),
        ({"version": 2}, "version 2"),
        ({"calibration": {"samples": 0}}, "calibration.samples=0"),
    ],
)
def test_wrong_recipes_are_one_clear_line(data, text):
    with pytest.raises(UsageError) as caught:
        CompressionConfig.from_dict(data)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nratio: 0.3\nsolver_options: {n_iter: 4}\ncalibration: {samples: 8}\n")
    config = CompressionConfig.from_yaml(path)
    assert (config.ratio, config.solver_options, config.calibration.samples) == (0.3, {"n_iter": 4}, 8)


@pytest.mark.parametrize(
    ("content", "text"), [("- a\n", "expected a mapping"), ("a: [\n", "not valid YAML"), (None, "read")]
)
def test_unreadable_recipes(tmp_path, content, text):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=text):
        CompressionConfig.from_yaml(path)


@pytest.mark.parametrize(
    "option", [{"storage": "quantized"}, {"dictionary": "identity"}, {"side": "output"}, {"limits": ["*=0:0.5"]}]
)
def test_the_uniform_allocation_refuses_what_it_would_ignore(option):
    CompressionConfig.from_dict(option)
    with pytest.raises(UsageError, match=r"'uniform' knows learned dictionaries .*not .*choose another allocation"):
        CompressionConfig.from_dict({"allocation": "uniform"} | option)
