"""Typed, frozen sections of settings that report all their problems at once.

A section is a frozen dataclass that derives from ``Section``. Its construction checks every field against its
annotation (pydantic checks the types) and then calls ``problems()``, which compares fields with each other. All
problems are reported together, each with its key, its value and a remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from moe_gpt.errors import ConfigError, InputError, shown


class Problem(NamedTuple):
    """The involved keys, and a text that begins with one of them."""

    keys: tuple[str, ...]
    text: str

    def under(self, prefix: str) -> Problem:
        """Return the problem as its parent section reports it."""
        return Problem(tuple(prefix + key for key in self.keys), prefix + self.text)

    def touches(self, wrong: set[str]) -> bool:
        """Return whether one of the keys is a wrong one, contains one, or lies within one."""
        return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in self.keys for b in wrong)


def divisors(number: int) -> str:
    """List the divisors of a number up to 10,000, for a message."""
    return ", ".join(str(n) for n in range(1, min(number, 10_000) + 1) if number % n == 0)


def _number(value: Any) -> Any:
    """Read text such as "1e-4" or "8_000_000" as a number, and 8e6 as a whole number, which a count needs."""
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    value = _parsed(value) if isinstance(value, str) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parsed(text: str) -> int | float:
    try:
        return int(text)  # exact, however large
    except ValueError:
        return float(text)  # pydantic reports a ValueError


# The title of a field's type says what a value must be, in messages and in --help.
Flag = StrictBool
# A count is below 2^63, so that eight bytes hold it in torch, numpy and itertools.
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, lt=2**63, title="a whole number from 1 to 2^63 - 1")]
CountOrZero = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**63, title="a whole number from 0 to 2^63 - 1")]
Seed = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**63, title="a whole number from 0 to 2^63 - 1")]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
AtMostOne = Annotated[Real, Field(gt=0, le=1, title="a number above 0 and at most 1")]
Positive = Annotated[Real, Field(gt=0, title="a number above 0")]
NonNegative = Annotated[Real, Field(ge=0, title="a number of at least 0")]
Share = Annotated[Real, Field(gt=0, lt=1, title="a number above 0 and below 1")]
Rate = Annotated[Real, Field(ge=0, le=1, title="a number from 0 to 1")]
Fraction = Annotated[Real, Field(ge=0, lt=1, title="a number of at least 0 and below 1")]


def require(kind: Any, **values: Any) -> None:
    """Raise ``InputError`` unless all values are of a kind, such as ``Positive`` or ``Count``."""
    for name, value in values.items():
        try:
            _adapter(kind).validate_python(value)
        except ValidationError:
            raise InputError(f"{name} must be {expectation(kind)}, got {shown(value)}") from None


def unless(holds: bool, text: str, *keys: str) -> Iterator[Problem]:
    """Yield a problem unless the condition holds."""
    if not holds:
        yield Problem(keys, text)


def divides(section: Section, part: str, whole: str) -> Iterator[Problem]:
    """Yield a problem unless the setting ``part`` divides the setting ``whole``."""
    number, total = getattr(section, part), getattr(section, whole)
    if total % number:
        text = f"{whole} must be a multiple of {part}, got {whole}={total}, {part}={number}"
        yield Problem((whole, part), f"{text}; choose one of {divisors(total)} for {part}")


def regular_expressions(section: Section, field: str) -> Iterator[Problem]:
    """Yield the entries of a list, which may be None, that are no regular expressions."""
    for index, pattern in enumerate(getattr(section, field) or ()):
        try:
            re.compile(pattern)
        except re.error as error:
            key = f"{field}.{index}"
            yield Problem((key,), f"{key} must be a regular expression, got {pattern!r}: {error}")


def one_of(section: Section, *keys: str, needed: bool = False) -> Iterator[Problem]:
    """Yield a problem if more than one of the keys is given, or none although one is needed."""
    given = [f"{key}={getattr(section, key)!r}" for key in keys if getattr(section, key)]
    names, wanted = f"{', '.join(keys[:-1])} or {keys[-1]}", "exactly one" if needed else "at most one"
    text = f"{names}: give {wanted}, got {' and '.join(given) or 'none of them'}"
    yield from unless(len(given) in range(needed, 2), text, *keys)


def _refuse_positional(cls: Any, values: tuple) -> None:
    first = dataclasses.fields(cls)[0]
    if values and first.kw_only:
        text = f"{cls.__name__} takes settings by name, such as {first.name}=..., got {shown(values[0])}"
        raise ConfigError([text])


class _ByName(type):
    """Builds sections from keyword arguments; an unknown key is an error that names the nearest known one."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:
        _refuse_positional(cls, values)
        known = annotations_of(cls)
        unknown = [_unknown(known, name, "").text for name in settings if name not in known]
        if unknown:
            raise ConfigError(unknown)
        return super().__call__(*values, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section(metaclass=_ByName):
    """Base of all settings: checked and coerced at construction, then unchangeable."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    def __post_init__(self) -> None:
        self.__dict__.update(vars(self.from_mapping(vars(self))))

    def problems(self) -> Iterator[Problem]:
        """Yield contradictions between fields."""
        yield from ()

    @classmethod
    def from_mapping(cls, values: Any) -> Self:
        """Build the section from plain data (parsed YAML or JSON).

        Raises:
            ConfigError: naming every unknown, missing, ill-typed and contradictory setting at once.
        """
        section, problems = _build(cls, values, "")
        if problems:
            raise ConfigError([problem.text for problem in problems])
        return section


def _build(cls: type[Section], values: Any, key: str) -> tuple[Any, list[Problem]]:
    """Build the section at a key as far as its values allow, and list their problems."""
    if isinstance(values, cls):
        return values, []
    if not isinstance(values, Mapping | None):  # in YAML, a section without keys is null
        return None, [_unfit(cls, values, key or cls.__name__)]
    return _fill(cls, values or {}, f"{key}.".lstrip("."))


def _fill(cls: type[Section], values: Mapping, prefix: str) -> tuple[Any, list[Problem]]:
    annotations = annotations_of(cls)
    problems = [_unknown(annotations, str(name), prefix) for name in values if name not in annotations]
    section = object.__new__(cls)
    for field in dataclasses.fields(cls):
        section.__dict__[field.name], found = _setting(field, annotations[field.name], values, prefix + field.name)
        problems += found
    return section, problems + _contradictions(section, prefix, problems)


def _setting(field: dataclasses.Field, annotation: Any, values: Mapping, key: str) -> tuple[Any, list[Problem]]:
    """Return a field's value with its problems. An unusable value is replaced, so that other problems can be found."""
    if field.name in values:
        value, problems = _check(annotation, values[field.name], key)
    elif default_of(field) is dataclasses.MISSING:
        value, problems = None, [Problem((key,), f"{key} is required: give {expectation(annotation)}")]
    else:
        return default_of(field), []
    if problems and value is None:
        value = _stand_in(field, annotation, key)
    return value, problems


def _stand_in(field: dataclasses.Field, annotation: Any, key: str) -> Any:
    """Return a valid value for a field: its default, or else 1, "x" or None."""
    default = default_of(field)
    if default is not dataclasses.MISSING:
        return default
    return next((valid for valid in (1, "x") if not _check(annotation, valid, key)[1]), None)


def _check(annotation: Any, value: Any, key: str) -> tuple[Any, list[Problem]]:
    """Check one value: a section by recursion, several sections one by one, anything else by pydantic."""
    section = section_in(annotation)
    if section is not None:
        if is_list(annotation):
            return _check_list(annotation, section, value, key)
        if typing.get_origin(annotation) is dict:
            return _check_mapping(annotation, section, value, key)
        is_left_out = value is None and annotation is not section  # it may be null
        return (None, []) if is_left_out else _build(section, value, key)
    try:
        return _adapter(annotation).validate_python(value), []
    except ValidationError:
        return None, [_unfit(annotation, value, key)]


def _check_list(annotation: Any, section: type[Section], value: Any, key: str) -> tuple[Any, list[Problem]]:
    if not isinstance(value, list | tuple) or not value:
        return None, [_unfit(annotation, value, key)]
    entries = [_build(section, entry, f"{key}.{index}") for index, entry in enumerate(value)]
    sections, problems = zip(*entries, strict=True)
    return sections, list(itertools.chain(*problems))


def _check_mapping(annotation: Any, section: type[Section], value: Any, key: str) -> tuple[Any, list[Problem]]:
    if not isinstance(value, Mapping) or not value:
        return None, [_unfit(annotation, value, key)]
    entries = {name: _build(section, entry, f"{key}.{name}") for name, entry in value.items()}
    problems = [problem for _, found in entries.values() for problem in found]
    return {name: entry for name, (entry, _) in entries.items()}, problems


def _contradictions(section: Section, prefix: str, problems: list[Problem]) -> list[Problem]:
    """List a section's contradictions, except those that follow from known problems."""
    wrong = set(itertools.chain.from_iterable(keys for keys, _ in problems))
    try:
        found = [problem.under(prefix) for problem in section.problems()]
    except (TypeError, AttributeError, ZeroDivisionError):
        if wrong:  # no valid value could stand in for a wrong one, which is reported already
            return []
        raise
    return [problem for problem in found if not problem.touches(wrong)]


def _unfit(annotation: Any, value: Any, key: str) -> Problem:
    is_half = isinstance(value, str) and re.search("[\ud800-\udfff]", value)
    wanted = "text without halves of surrogate pairs" if is_half else expectation(annotation)
    return Problem((key,), f"{key} must be {wanted}, got {shown(value)}")


def _unknown(annotations: dict[str, Any], name: str, prefix: str) -> Problem:
    """Name the nearest key of this section, or the same key in a section inside it."""
    nearest = difflib.get_close_matches(name, annotations, n=1, cutoff=0.0)
    nearest += [f"{place}.{name}" for place, inside in _sections(annotations) if name in annotations_of(inside)]
    key = prefix + (name or "''")  # an empty key is not its section
    return Problem((key,), f"{key} is not a known key; did you mean {nearest[-1]}?")


def _sections(annotations: dict[str, Any]) -> Iterator[tuple[str, type[Section]]]:
    """Yield the fields that hold sections, with the key of the first section in a list."""
    for field, annotation in annotations.items():
        inside = section_in(annotation)
        if inside:
            yield f"{field}.0" if is_list(annotation) else field, inside


@cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation)


def section_in(annotation: Any) -> type[Section] | None:
    """Return the type of section that a field holds, alone, in a list or by names; None if it holds plain values."""
    while arguments := typing.get_args(annotation):
        annotation = arguments[-1 if typing.get_origin(annotation) is dict else 0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def is_list(annotation: Any) -> bool:
    """Return whether a field holds a list, not one value."""
    return typing.get_origin(annotation) is tuple


@functools.cache
def annotations_of(cls: type) -> dict[str, Any]:
    """Return the resolved type of each field, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default value; ``dataclasses.MISSING`` if a value is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_docs(cls: type[Section]) -> dict[str, str]:
    """Return the docstring that follows each field in the source of the class, on one line."""
    properties = TypeAdapter(cls).json_schema()["properties"]
    return {name: " ".join(values.get("description", "").split()) for name, values in properties.items()}


def expectation(annotation: Any) -> str:
    """Describe the values of a type: the title of an ``Annotated`` type, else a description of its parts."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _title(arguments) or expectation(arguments[0])
    if arguments:
        return _CONTAINERS.get(origin, _union)(arguments)
    return "a section of settings" if section_in(annotation) else _WORDS.get(annotation, annotation.__name__)


def _title(arguments: tuple) -> str:
    return next((a.title for a in reversed(arguments) if isinstance(a, FieldInfo) and a.title), "")


def _union(members: tuple) -> str:
    return " or ".join(map(expectation, members))


def _list(members: tuple) -> str:
    if section_in(members[0]):
        return "a list with at least one entry"
    length = "of any length" if members[-1] is Ellipsis else f"of {len(members)}"
    return f"a list {length} (each entry: {expectation(members[0])})"


_WORDS = {bool: "true or false", str: "text", float: "a number", int: "a whole number", type(None): "null"}
_CONTAINERS: dict[Any, Callable[[tuple], str]] = {
    tuple: _list,
    dict: lambda members: f"a mapping{' with at least one entry' * bool(section_in(members[-1]))}",
    typing.Literal: lambda choices: "one of " * (len(choices) > 1) + ", ".join(map(str, choices)),
}
