"""What to compress and how: the recipe, checked when it is made.

Every field is reachable from Python, from a YAML recipe and from the command line under the same name.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cospadi.errors import UsageError
from cospadi.registry import nearest

RECIPE_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class CalibrationConfig(_Strict):
    """The text that the layers' outputs are kept on.

    Attributes
    ----------
    text : str, optional
        A UTF-8 text file, or ``hf:DATASET`` / ``hf:DATASET:CONFIG`` for the train split of a Hugging Face dataset; None
        takes the public-domain text that the package carries.
    samples : int
        Number of windows; the first ones of the text are taken.
    seq_len : int
        Tokens per window.
    batch_size : int
        Windows per forward pass; changes memory and speed.
    """

    text: str | None = None
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=2)
    batch_size: int = Field(default=8, ge=1)


class CompressionConfig(_Strict):
    """The whole recipe.

    Attributes
    ----------
    ratio : float
        Fraction of the bytes of the compressed layers to remove, 0 < ratio < 1.
    convention : {"honest", "paper"}
        ``honest`` counts every byte that lands on disk against bfloat16; ``paper`` leaves the mask out as
        arXiv 2509.22075 does.
    rho : float
        Atoms per non-zero of a column, k / s; less where k would exceed the layer's input features (honest convention).
    allocation : {"uniform"}
        How the budget is spread over the layers.
    groups : str
        ``none``, ``natural`` (layers that receive the same input share a dictionary) or ``consecutive:N`` (runs of N
        layers of the same kind).
    solver : str
        Registry name of the dictionary solver.
    solver_options : dict
        Fields of the solver.
    format : str, optional
        Storage format of the coefficients; None takes ``bitmask`` for sparse solvers and ``dense`` for dense ones.
    value_dtype : str
        ``bfloat16``, ``float16``, ``float32``, ``bfloat14`` (coefficients only; the dictionary is then bfloat16) or
        ``int8`` (with one scale per atom and per column of coefficients).
    include, exclude : tuple of str
        Shell patterns over layer names; a layer is compressed if it matches an include and no exclude pattern.
    damping : float
        Fraction of the mean of the Gram's diagonal added to it when it is not safely positive definite.
    backend : str
        Runtime that the checkpoint recommends and the closing evaluation uses.
    device : str
        Torch device that calibrates and solves: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU if there is one.
    seed : int
        Seed of whatever is random.
    calibration : CalibrationConfig
        The calibration text.
    """

    ratio: float = Field(default=0.2, gt=0, lt=1)
    convention: Literal["honest", "paper"] = "honest"
    rho: float = Field(default=2.0, ge=1)
    allocation: Literal["uniform"] = "uniform"
    groups: str = "natural"
    solver: str = "auto"
    solver_options: dict[str, Any] = Field(default_factory=dict)
    format: str | None = None
    value_dtype: Literal["bfloat16", "float16", "float32", "bfloat14", "int8"] = "bfloat16"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    damping: float = Field(default=1e-6, gt=0, lt=1)
    backend: str = "auto"
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("groups")
    @classmethod
    def _known_grouping(cls, value: str) -> str:
        kind, _, length = value.partition(":")
        if value in ("none", "natural") or (kind == "consecutive" and length.isdecimal() and int(length) >= 1):
            return value
        raise ValueError("expected none, natural or consecutive:N with N >= 1")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CompressionConfig":
        """Read plain values, such as those of a recipe file; ``version`` may be among them.

        Raises
        ------
        UsageError
            An unknown key, a value out of range or a version that this library does not know.
        """
        data = dict(data)
        version = data.pop("version", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            raise UsageError(f"recipe version {version!r} is not known here (known: {RECIPE_VERSION})")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UsageError(_explain(error, cls)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> "CompressionConfig":
        """Read a recipe file; see ``from_dict``."""
        return cls.from_dict(read_recipe(path))

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values with the recipe's version."""
        return {"version": RECIPE_VERSION, **self.model_dump(mode="json")}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the mapping that a YAML recipe holds, unchecked.

    Raises
    ------
    UsageError
        The file is missing, is not YAML or is not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise UsageError(f"recipe {path}: expected a mapping of options, got {type(data).__name__}")
    return data


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """Phrase the first fault of a validation in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = CalibrationConfig.model_fields if first["loc"][0] == "calibration" else cls.model_fields
        return f"unknown option {where!r}{nearest(str(first['loc'][-1]), list(fields))}"
    return f"option {where}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
