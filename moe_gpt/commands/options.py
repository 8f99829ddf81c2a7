"""What the options of several commands have in common."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter
from pydantic import TypeAdapter, ValidationError

from moe_gpt.config import RunConfig
from moe_gpt.config.section import (
    Count,
    CountOrZero,
    Positive,
    Section,
    annotations_of,
    default_of,
    expectation,
    field_docs,
    is_list,
    section_in,
)
from moe_gpt.terminal.wrapping import wrap


def read_as(kind: Any) -> Parameter:
    """Return a parameter whose text is read and checked as a setting of this kind is."""

    def convert(_: Any, tokens: tuple[cyclopts.Token, ...]) -> Any:
        text = tokens[0].value
        try:
            return TypeAdapter(kind).validate_python(text)
        except ValidationError:
            raise ValueError(f"must be {expectation(kind)}, got {text}") from None

    return Parameter(converter=convert)


Whole = Annotated[Count, read_as(Count)]
WholeOrZero = Annotated[CountOrZero, read_as(CountOrZero)]
AboveZero = Annotated[Positive, read_as(Positive)]
Switch = Annotated[bool, Parameter(negative="", show_default=False)]
"""A flag without a value."""
Words = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
"""A flag that may be repeated."""
Device = str
"""auto, cpu, cuda, cuda:1 and so on, mps; ``pick_device`` checks it."""
Precision = Literal["auto", "bf16", "fp32"]
Quantize = Literal["int8", "int4"]
flat = Parameter(name="*")
"""For a dataclass of options: its fields are flags of their own."""


def describe_settings(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config with default, meaning and what a value must be, in lines that fit the terminal."""
    docs = field_docs(section)
    for field, annotation in zip(dataclasses.fields(section), annotations_of(section).values(), strict=True):
        inner = section_in(annotation)
        key, doc, default = prefix + field.name, docs[field.name], default_of(field)
        if inner is None:
            shown = "required" if default is dataclasses.MISSING else json.dumps(default)
            yield wrap(f"  {key} ({shown}): {doc} [{expectation(annotation)}]")
            continue
        if is_list(annotation):
            key, doc = f"{key}.0", f"{doc} A list: 0, 1, ..."
        yield wrap(f"\n{key}: {doc}")
        yield from describe_settings(inner, f"{key}.")
