"""Options that commands share; those of the recipe are made from its fields and their documentation."""

import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cospadi.errors import UsageError
from cospadi.recipe import CompressionConfig, Execution, parse_size, read_recipe
from cospadi.registry import Registry

_FLAGS = {
    "text": "calibration",
    "solver_options": "solver-option",
    "limits": "limit",
    "weight_dtypes": "weight-dtype",
}
"""Fields whose flag has another name than the field."""
_METAVARS = {
    "limits": "PATTERN=LOW:HIGH",
    "weight_dtypes": "DTYPE",
    "text": "FILE|hf:NAME",
    "solver_options": "KEY=VALUE",
    "include": "PATTERN",
    "exclude": "PATTERN",
}
_REGISTRIES = {"solver", "format", "backend"}
"""Fields that name a member of the registry ``cospadi.<field>s``."""

Path = tuple[str, ...]
Command = Callable[..., Any]


def recipe_options(*names: str) -> Callable[[Command], Command]:
    """Add ``--recipe`` and the flags of the recipe's fields (all, or the named ones) to a command.

    Values arrive as keyword arguments for ``recipe_from``; those that were not given are None or empty.
    """

    def add(command: Command) -> Command:
        for path, model, field in reversed(_fields(CompressionConfig)):
            if not names or path[-1] in names:
                command = _option(path, model, field)(command)
        if not names:
            recipe = click.option("--recipe", metavar="FILE.yaml", help="Recipe file; flags override what it says.")
            command = recipe(command)
        return command

    return add


def recipe_from(values: dict[str, Any]) -> CompressionConfig:
    """Make the recipe from a command's values: flags override the recipe file, which overrides the defaults.

    Raises
    ------
    UsageError
        The file or a value is not allowed.
    """
    data = read_recipe(values["recipe"]) if values.get("recipe") else {}
    for path, _, _ in _fields(CompressionConfig):
        value = values.get("_".join(path))
        if value is None or value == ():
            continue
        place = data
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UsageError(f"recipe {values['recipe']}: expected a mapping under {key!r}")
        if path[-1] == "solver_options":
            value = {**(place.get("solver_options") or {}), **dict(map(_key_value, value))}
        place[path[-1]] = value
    return CompressionConfig.from_dict(data)


def execution_options(command: Command) -> Command:
    """Add the flags of ``Execution``, which ``execution_from`` reads."""
    for option in (
        click.option(
            "--ray-inputs",
            type=click.Choice(["shared", "object-store"]),
            default="shared",
            show_default=True,
            help="How weights and Grams reach a worker: from folders that all machines see, or through Ray.",
        ),
        click.option("--ray-address", help="Ray cluster to join, such as auto or HOST:6379; default: a new one here."),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Threads of each task; they may change the last digits."
        ),
        click.option("--workers", type=click.IntRange(min=1), help="Tasks at a time; by default the executor decides."),
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Work on this machine, or on a Ray cluster.",
        ),
        click.option(
            "--max-memory",
            metavar="SIZE",
            help="Memory that the run may take, such as 8GiB: the model is read block by block; default: no limit.",
        ),
    ):
        command = option(command)
    return command


def execution_from(values: dict[str, Any]) -> Execution:
    """Remove the values of ``execution_options`` from a command's values, and give them as an ``Execution``.

    Raises
    ------
    UsageError
        A value is not allowed.
    """
    names = ("max_memory", "executor", "workers", "threads", "ray_address", "ray_inputs")
    given = {name: values.pop(name) for name in names}
    if given["max_memory"] is not None:
        given["max_memory"] = parse_size(given["max_memory"])
    return Execution(**given)


def _fields(model: type[BaseModel], prefix: Path = ()) -> list[tuple[Path, type[BaseModel], FieldInfo]]:
    """List the leaves of the recipe with the class that documents each."""
    leaves: list[tuple[Path, type[BaseModel], FieldInfo]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves += _fields(field.annotation, (*prefix, name))
        else:
            leaves.append(((*prefix, name), model, field))
    return leaves


def _option(path: Path, model: type[BaseModel], field: FieldInfo) -> Callable[[Command], Command]:
    name = path[-1]
    kind = _plain(field.annotation)
    many = get_origin(kind) in (tuple, dict)
    help_text = describe(model, name)
    if name in _REGISTRIES:
        help_text += f" One of: {', '.join(Registry(f'cospadi.{name}s', name).names())}."
    default = field.get_default(call_default_factory=True)
    if many:
        help_text += " May be repeated."
    if kind is bool:
        help_text += f"  [default: {'on' if default else 'off'}]"
    elif default not in (None, {}, ()):
        help_text += f"  [default: {' '.join(default) if isinstance(default, tuple) else default}]"
    flag = _FLAGS.get(name, name).replace("_", "-")
    return click.option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        "_".join(path),
        type=bool
        if kind is bool
        else click.Choice(get_args(kind))
        if get_origin(kind) is Literal
        else kind
        if kind in (int, float)
        else str,
        multiple=many,
        metavar=_METAVARS.get(name),
        default=None,  # a flag that was not given must not override the recipe file
        help=help_text,
    )


def _plain(annotation: Any) -> Any:
    """Drop the None of an optional type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def describe(documented: type, name: str) -> str:
    """Give the description of an attribute in a class's numpydoc section ``Attributes``, on one line."""
    entry = re.compile(rf"^    (?:\w+, )*{name}(?:, \w+)* : .*\n((?:        .*\n?)+)", re.MULTILINE)
    found = entry.search(documented.__doc__ or "")
    text = " ".join(found.group(1).replace("`", "").split()) if found else ""
    # In Python a field is None; on the command line its flag is left out.
    return text.replace("None takes", "by default")


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key.strip() or not equals:
        raise UsageError(f"--solver-option {text!r}: expected KEY=VALUE, such as n_iter=20")
    return key.strip(), value.strip()
