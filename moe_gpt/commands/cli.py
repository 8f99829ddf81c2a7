"""What the scripts share: arguments that name a config, help for every key, and errors as clear lines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Section, annotations_of, default_of, expectation, field_docs, section_in
from moe_gpt.errors import InputError


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all errors of the scripts are."""

    def error(self, message: str) -> typing.NoReturn:
        """Exit with status 2."""
        _fail(f"{message}; --help says what there is")


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main function and exit: status 2 and one line for each problem where the input is bad."""
    for stream in (sys.stdout, sys.stderr):  # a console may lack characters that a model writes
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(main() or 0)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> typing.NoReturn:
    for line in (message or "failed without a message").splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def count_argument(text: str) -> int:
    """Parse a whole number of at least 1, for argparse.

    Raises:
        ArgumentTypeError: where it is not one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def positive_argument(text: str) -> float:
    """Parse a number above 0, for argparse.

    Raises:
        ArgumentTypeError: where it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def command_line(*words: object) -> str:
    """Return a command for people to copy, run by this Python."""
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else "python"
    return shlex.join([python, *map(str, words)])


def describe_settings(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield a line for every key of a config: name, default, meaning."""
    docs = field_docs(section)
    for field, annotation in zip(dataclasses.fields(section), annotations_of(section).values(), strict=True):
        inner = section_in(annotation)
        key, doc, default = prefix + field.name, docs[field.name], default_of(field)
        if inner is None:
            shown = "required" if default is dataclasses.MISSING else json.dumps(default)
            yield f"  {key} ({shown}): {doc} [{expectation(annotation)}]"
            continue
        if inner is not annotation:
            key, doc = f"{key}.0", f"{doc} A list: 0, 1, ..."
        yield f"\n{key}: {doc}"
        yield from describe_settings(inner, f"{key}.")
