"""Typed, frozen sections of settings whose problems are all found at once.

A section is a frozen dataclass that derives from ``Section``. Constructing one checks every field against its
annotation (pydantic does the types) and then asks ``problems()`` for what no single field can see. Everything
that is wrong is reported together, each with its key, its value and what would be right.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from moe_gpt.errors import ConfigError, shown


class Problem(NamedTuple):
    """What is wrong (``text``, which starts with a key) and the keys that are involved."""

    keys: tuple[str, ...]
    text: str

    def below(self, prefix: str) -> Problem:
        """Return the same problem as seen from the section that holds this one under ``prefix``."""
        return Problem(tuple(f"{prefix}.{key}" for key in self.keys), f"{prefix}.{self.text}")


def _number(value: Any) -> Any:
    """Read text such as ``1e-4`` or ``8_000_000`` as a number; leave everything else to the type check."""
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return float(value)  # a ValueError here is the right answer
    return value


def _whole_number(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = StrictBool
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, description="a whole number of at least 1")]
CountOrZero = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, description="a whole number of at least 0")]
Seed = Annotated[
    int, BeforeValidator(_whole_number), Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
]
AtMostOne = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1, description="a number above 0 and at most 1")]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False, description="a number above 0")]
NonNegative = Annotated[
    float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False, description="a number of at least 0")
]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1, description="a number above 0 and below 1")]
Rate = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, description="a number from 0 to 1")]
Fraction = Annotated[
    float, BeforeValidator(_number), Field(ge=0, lt=1, description="a number of at least 0 and below 1")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all settings: checked and coerced at construction, never changed afterwards."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        checked, problems = _build(type(self), values)
        if problems:
            raise ConfigError([problem.text for problem in problems])
        self.__dict__.update(checked.__dict__)

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the fields taken together."""
        yield from ()

    @classmethod
    def from_mapping(cls, values: Any) -> Self:
        """Build the section from plain data (parsed YAML or JSON).

        Raises:
            ConfigError: naming every unknown, missing, ill-typed and contradictory setting at once.
        """
        section, problems = _build(cls, values)
        if problems:
            raise ConfigError([problem.text for problem in problems])
        return section


def _build(cls: type[Section], values: Any) -> tuple[Any, list[Problem]]:
    """Build a section as far as its values allow, and list what is wrong with them."""
    if isinstance(values, cls):
        return values, []
    values = {} if values is None else values  # a section whose keys are all commented out
    if not isinstance(values, Mapping):
        return None, [Problem(("",), f" must be a section of settings, got {shown(values)}")]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [_unknown_key(cls, str(key)) for key in values if key not in fields]
    section = object.__new__(cls)
    for name, annotation in annotations_of(cls).items():
        if name in values:
            value, found = _check(annotation, values[name])
            problems += [_placed(problem, name) for problem in found]
        else:
            value, found = default_of(fields[name]), []
            if value is dataclasses.MISSING:
                problems.append(Problem((name,), f"{name} is required: give {expectation(annotation)}"))
                value, found = None, problems[-1:]
        if found and not isinstance(value, Section | tuple):
            fallback = default_of(fields[name])
            value = _stand_in(annotation) if fallback is dataclasses.MISSING else fallback
        section.__dict__[name] = value
    broken = {key for problem in problems for key in problem.keys}
    problems += [p for p in _consistency(section, broken) if not _touches(p, broken)]
    return section, problems


def _stand_in(annotation: Any) -> Any:
    """Return some valid value for a required one that is unusable, so that problems() can look at the others."""
    return next((value for value in (1, "x") if not _check(annotation, value)[1]), None)


def _consistency(section: Section, broken: set[str]) -> list[Problem]:
    try:
        return list(section.problems())
    except (TypeError, AttributeError, ZeroDivisionError):
        if broken:  # a required value is missing or unusable, and that is reported already
            return []
        raise


def _touches(problem: Problem, broken: set[str]) -> bool:
    return any(
        key == other or other.startswith(key + ".") or key.startswith(other + ".")
        for key in problem.keys
        for other in broken
    )


def _placed(problem: Problem, name: str) -> Problem:
    """Put a field's problem under the field's name; the empty key is the field itself."""
    if problem.keys == ("",):
        return Problem((name,), f"{name}{problem.text}")
    return problem.below(name)


def _check(annotation: Any, value: Any) -> tuple[Any, list[Problem]]:
    """Check one value: sections by recursion, lists of sections item by item, the rest by pydantic."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _build(annotation, value)
    if origin is tuple and isinstance(arguments[0], type) and issubclass(arguments[0], Section):
        if not isinstance(value, list | tuple) or not value:
            return None, [Problem(("",), f" must be a list with at least one entry, got {shown(value)}")]
        built = [_build(arguments[0], item) for item in value]
        problems = [_placed(problem, str(i)) for i, (_, found) in enumerate(built) for problem in found]
        return tuple(item for item, _ in built), problems
    try:
        return _adapter(annotation).validate_python(value), []
    except ValidationError:
        return None, [Problem(("",), f" must be {expectation(annotation)}, got {shown(value)}")]


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation)


def annotations_of(cls: type) -> dict[str, Any]:
    """Return the resolved type of each field, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default value, or ``dataclasses.MISSING`` where a value is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def expectation(annotation: Any) -> str:
    """Say in words what a value of this type must be."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        described = [item.description for item in arguments[1:] if isinstance(item, FieldInfo) and item.description]
        return described[0] if described else expectation(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(item) for item in arguments)
    if origin is tuple:
        length = "of any length" if arguments[-1] is Ellipsis else f"of {len(arguments)}"
        return f"a list {length}, each {expectation(arguments[0])}"
    if arguments:  # a union
        return " or ".join(expectation(item) for item in arguments)
    return {bool: "true or false", str: "text", type(None): "null"}.get(annotation, getattr(annotation, "__name__", ""))


def _unknown_key(cls: type[Section], key: str) -> Problem:
    """Name the nearest key: one of this section's, or one that a section inside it has to the letter."""
    nearest = difflib.get_close_matches(key, annotations_of(cls), n=1, cutoff=0.0)
    for name, annotation in annotations_of(cls).items():
        if isinstance(annotation, type) and issubclass(annotation, Section) and key in annotations_of(annotation):
            nearest = [f"{name}.{key}"]
    key = key or "''"  # the empty key means the section itself
    return Problem((key,), f"{key} is not a known key" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def field_docs(cls: type) -> dict[str, str]:
    """Return the one-line docstring that follows each field in the source of the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): " ".join(str(doc.value.value).split())
        for field, doc in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
