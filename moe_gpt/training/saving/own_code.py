"""A user's own router or schedule: each checkpoint records its name and digest, and loading asks for it again."""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from moe_gpt.errors import InputError
from moe_gpt.model.router import MakeRouter, Router


def describe_source(own: object, ours: object) -> dict[str, str] | None:
    """Return the name and source digest of a user's class or function, for the checkpoint; None if it is ``ours``.

    The digest covers its own text only, not the code that it calls. It is "unknown" if Python has no source, for
    example for code typed at a prompt.
    """
    if own is ours:
        return None
    try:
        text = inspect.getsource(own)  # type: ignore[arg-type]  # a TypeError is caught
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    except (OSError, TypeError):
        digest = "unknown"
    return {"name": getattr(own, "__qualname__", type(own).__qualname__), "digest": digest}


def find_router(place: str) -> MakeRouter:
    """Import ``file.py`` of ``file.py:Name`` and return its router ``Name``.

    Raises:
        InputError: if the argument has another form, or the file cannot be imported or has no such class or function.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if path.suffix == ".py" and not path.exists():
        raise InputError(f"--router {place}: there is no file {path}")
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"--router must be a Python file and a name in it, such as my_router.py:MyRouter, got {place}")
    module = _import_file(path)
    if not callable(getattr(module, name, None)):
        raise InputError(f"--router {path} has no class or function {name}; the file has {_names_in(module) or 'none'}")
    return getattr(module, name)


def _names_in(module: ModuleType) -> str:
    """List the classes and functions that a module defines."""
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return ", ".join(own)


def _import_file(path: Path) -> ModuleType:
    loader = SourceFileLoader(f"router_of_{path.stem}", str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    sys.modules[loader.name] = module  # inspect looks for the source there
    try:
        loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--router {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def router_for(saved: dict[str, str] | None, given: MakeRouter | None, origin: str) -> MakeRouter:
    """Return the router to build a saved model with.

    Args:
        saved: name and digest from the checkpoint; None for our router.
        given: the router that the user gave, if any.
        origin: where the model comes from, for the messages.

    Raises:
        InputError: if the model was trained with another router than the one that was given.
    """
    router = given or Router
    found, got = describe_source(router, Router), getattr(given, "__qualname__", repr(given)) if given else "none"
    if saved is None:
        if found is not None:
            raise InputError(f"{origin} was trained with moe_gpt's Router, got {got}; leave your router out")
        return Router
    if found is None or found["name"] != saved["name"]:
        raise InputError(
            f"{origin} was trained with the router {saved['name']}, got {got}; add --router "
            f"FILE.py:{saved['name']}, or in Python make_router={saved['name']}"
        )
    if found["digest"] != saved["digest"]:
        text = f"the source of the router {saved['name']} has changed since {origin} was trained"
        warnings.warn(text, stacklevel=3)
    return router
