"""What to compress and how: the recipe, checked when it is made.

Every field is reachable from Python, from a YAML recipe and from the command line under the same name.
"""

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cospadi.errors import UsageError
from cospadi.registry import nearest

RECIPE_VERSION = 1
WEIGHT_DTYPES = ("int8", "int6g64", "int5g64", "int4g64", "int4g32", "int3g64", "int3g32")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class CalibrationConfig(_Strict):
    """The calibration text, and how statistics are collected on it.

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
    order : {"one-shot", "sequential"}
        ``one-shot``: all inputs come from the dense model.  ``sequential``: the inputs of each layer come from the
        layers already compressed before it.
    mixing : float
        For sequential calibration, how far a layer is to make up for the errors before it: 0 keeps its own weight on
        the new inputs, 1 imitates the dense model's outputs.
    ridge : float
        For sequential calibration, how strongly a layer is held to its own weight where the tokens say little; without
        it the correction overfits.
    labels : {"model", "text"}
        Where the labels come from whose gradients tell how sensitive the loss is to each output: drawn from the
        model's own predictions (Fisher information), or the text's next tokens (the empirical variant).
    parts : int
        Number of parts into which the windows are divided and whose sums are then added: several workers can share
        them, and an interruption costs at most one.  Changes the result by rounding only.
    """

    text: str | None = None
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=2)
    batch_size: int = Field(default=8, ge=1)
    order: Literal["one-shot", "sequential"] = "one-shot"
    mixing: float = Field(default=0.5, ge=0, le=1)
    ridge: float = Field(default=0.1, ge=0)
    labels: Literal["model", "text"] = "model"
    parts: int = Field(default=1, ge=1)


class CompressionConfig(_Strict):
    """The whole recipe.

    Attributes
    ----------
    ratio : float
        Fraction of the bytes of the compressed layers to remove, 0 < ratio < 1.
    convention : {"honest", "paper"}
        ``honest`` counts every byte that lands on disk against bfloat16; ``paper`` leaves the mask out as
        arXiv 2509.22075 does.
    rho : float, optional
        Atoms per non-zero of a column, k / s.  None takes what the allocation finds best for each group, and 2 where
        the allocation is uniform.
    allocation : {"knapsack", "pooled-spectrum", "equal-ratio", "uniform"}
        How the budget is spread over the layers.  ``knapsack``: the least total cost.  ``pooled-spectrum``: by the
        singular values, as COMPOT does.  ``equal-ratio``: the best way of storing each group at the same ratio.
        ``uniform``: the same ratio by formula, in bfloat16 factors, with nothing measured beforehand.
    cost : {"sensitivity", "functional-error", "relative-error"}
        What the knapsack adds up: the predicted increase of the model's loss, the error of the layers' outputs, or that
        error relative to the size of each layer's outputs (ROCKET).
    storage : {"auto", "factors", "quantized"}
        What the allocation may choose: ``factors`` (dictionary and sparse coefficients), ``quantized`` weights without
        factors, or both.
    dictionary : {"auto", "learned", "identity"}
        ``identity`` takes no bytes: the weight itself becomes sparse.  ``auto`` lets the allocation choose, and is
        ``learned`` for the uniform one.
    column_weights : bool
        Weigh each output in the solver by the sensitivity of the loss to its errors.
    token_weights : bool
        Weigh each calibration token by the sensitivity of the loss to errors there.
    side : {"auto", "input", "output"}
        Side of the weight that the dictionary is on.  ``output`` factors the transpose, for layers that share no
        dictionary, with solvers that can; the uniform allocation knows ``input`` only.
    limits : tuple of str
        Least and largest part of its bytes that a group may lose, as PATTERN=LOW:HIGH; the last pattern that matches
        one of its layers counts.  PATTERN=0:0 keeps layers dense within the budget.
    groups : str or list of lists of str
        Which layers share a dictionary: ``none``, ``natural`` (those that receive the same input), ``natural:N`` (these
        over runs of N blocks), ``consecutive:N`` (runs of N layers of the same kind) or ``matching`` (natural groups in
        pairs that lose least by sharing).  In a recipe also a list of lists of layer names.
    solver : str
        Registry name of the dictionary solver.
    solver_options : dict
        Fields of the solver.
    format : str, optional
        Storage format of the coefficients; None takes ``bitmask`` for sparse solvers and ``dense`` for dense ones.
    value_dtype : str
        Of the factors: ``bfloat16``, ``float16``, ``float32``, ``bfloat14`` (coefficients only; the dictionary is then
        bfloat16) or ``int8`` (with one scale per atom and per column of coefficients).  ``auto`` lets the allocation
        choose between bfloat16 and int8.
    weight_dtypes : tuple of str
        Dtypes that the allocation may choose for quantised weights.
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
    rho: float | None = Field(default=None, ge=1)
    allocation: Literal["knapsack", "pooled-spectrum", "equal-ratio", "uniform"] = "knapsack"
    cost: Literal["sensitivity", "functional-error", "relative-error"] = "sensitivity"
    storage: Literal["auto", "factors", "quantized"] = "auto"
    dictionary: Literal["auto", "learned", "identity"] = "auto"
    column_weights: bool = True
    token_weights: bool = False
    side: Literal["auto", "input", "output"] = "auto"
    limits: tuple[str, ...] = ()
    groups: str | tuple[tuple[str, ...], ...] = "natural"
    solver: str = "auto"
    solver_options: dict[str, Any] = Field(default_factory=dict)
    format: str | None = None
    value_dtype: Literal["auto", "bfloat16", "float16", "float32", "bfloat14", "int8"] = "auto"
    weight_dtypes: tuple[str, ...] = WEIGHT_DTYPES
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    damping: float = Field(default=1e-6, gt=0, lt=1)
    backend: str = "auto"
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("groups")
    @classmethod
    def _known_grouping(cls, value: str | tuple[tuple[str, ...], ...]) -> str | tuple[tuple[str, ...], ...]:
        if not isinstance(value, str):
            return value
        kind, _, length = value.partition(":")
        runs = kind in ("consecutive", "natural") and length.isdecimal() and int(length) >= 1
        if value in ("none", "natural", "matching") or runs:
            return value
        raise ValueError("expected none, natural, natural:N, consecutive:N with N >= 1, or matching")

    @field_validator("limits")
    @classmethod
    def _readable_limits(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            read_limit(text)
        return value

    @field_validator("weight_dtypes")
    @classmethod
    def _known_dtypes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [dtype for dtype in value if not re.fullmatch(r"int8|int[2-6]g(32|64|128)", dtype)]
        if unknown:
            raise ValueError(f"unknown dtype {unknown[0]!r}: expected some of {', '.join(WEIGHT_DTYPES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "CompressionConfig":
        if self.convention == "paper" and self.storage != "factors":
            raise ValueError("convention 'paper' counts factors only: add storage 'factors'")
        if self.allocation == "uniform":
            wants = {
                "storage 'quantized'": self.storage == "quantized",
                "dictionary 'identity'": self.dictionary == "identity",
                "side 'output'": self.side == "output",
                "limits": bool(self.limits),
            }
            for what in (name for name, wanted in wants.items() if wanted):
                raise ValueError(
                    f"allocation 'uniform' knows learned dictionaries on the input side only, not {what}: "
                    "choose another allocation, such as knapsack or equal-ratio"
                )
        return self

    @property
    def cost_is_sensitivity(self) -> bool:
        """Whether the allocation adds up predicted loss increases."""
        return self.allocation != "uniform" and self.cost == "sensitivity"

    @property
    def needs_sensitivities(self) -> bool:
        """Whether calibration needs a backward pass."""
        return self.column_weights or self.token_weights or self.cost_is_sensitivity

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


def read_limit(text: str) -> tuple[str, float, float]:
    """Read PATTERN=LOW:HIGH.

    Raises
    ------
    ValueError
        It reads otherwise, or not 0 <= LOW <= HIGH <= 1.
    """
    pattern, _, bounds = text.rpartition("=")
    low, _, high = bounds.partition(":")
    try:
        limits = float(low), float(high)
    except ValueError:
        limits = (1.0, 0.0)
    if not pattern or not 0 <= limits[0] <= limits[1] <= 1:
        raise ValueError(
            f"limit {text!r}: expected PATTERN=LOW:HIGH with 0 <= LOW <= HIGH <= 1, such as *.down_proj=0:0.3"
        )
    return pattern, *limits


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
    if not where:
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        fields = CalibrationConfig.model_fields if first["loc"][0] == "calibration" else cls.model_fields
        return f"unknown option {where!r}{nearest(str(first['loc'][-1]), list(fields))}"
    return f"option {where}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
