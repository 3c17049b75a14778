"""Commands out of specifications: the fields of a dataclass become the options of a command, once for all of them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from typer import Argument, Option, Typer

from ..data.spec import option
from .console import Screen


@dataclass(frozen=True, kw_only=True)
class ScreenSpec:
    """Say where the result goes, and how much is said beside it; every command has these."""

    json: Path | None = option("Write the result there; - prints only it.", metavar="FILE")
    quiet: bool = option("No progress and no notices.", False, flag="--quiet -q")
    verbose: bool = option("Let transformers and datasets say all they have to say.", False, flag="--verbose -v")


def add_command(app: Typer, name: str, kind: type, run: Callable[[Any, Screen], None]) -> None:
    """Add ``run(spec, screen)`` to ``app`` as the command ``name``, with the fields of ``kind`` as its options."""

    def command(**values: Any) -> None:
        screen = {field.name: values.pop(field.name) for field in fields(ScreenSpec)}
        spec = kind(**{name: value for name, value in values.items() if value is not None})
        files = [(getattr(spec, f.name), f.metadata["writes"]) for f in fields(kind) if "writes" in f.metadata]
        run(spec, Screen(**screen, files=files))

    shown = [*_in_order(kind), *fields(ScreenSpec)]
    hints = get_type_hints(kind) | get_type_hints(ScreenSpec)
    parameters = [_parameter(field, hints[field.name]) for field in shown]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    app.command(name)(command)


def _in_order(kind: type) -> list[Field]:
    """The fields that have a help text: those that are required, then those of the class itself, then of its bases."""
    known = {field.name: field for field in fields(kind) if field.metadata.get("help")}
    names = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    order = dict.fromkeys(["model", "data", "out", *names])
    return [known[name] for name in order if name in known]


def _parameter(field: Field, hint: Any) -> inspect.Parameter:
    """The parameter of a command that stands for a field: a flag, a value, or values with commas between them."""
    about, default = field.metadata, inspect.Parameter.empty if field.default is MISSING else field.default
    settings = {name: about[name] for name in ("help", "metavar", "min", "parser") if name in about}
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    many = [get_args(one)[0] for one in kinds if get_origin(one) in (tuple, Sequence)]
    if many:
        settings.setdefault("parser", listed(str.strip if many[0] is str else many[0]))
        default = ",".join(map(str, default)) or None if isinstance(default, tuple) else default
    if "parser" in settings:  # typer knows no type for its values
        hint = Any
    make = Argument if about.get("argument") else Option
    annotation = Annotated[hint, make(*about.get("flag", "").split(), **settings)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def listed(kind: Callable) -> Callable[[str], tuple]:
    """A reader of values with commas between them."""
    return lambda value: tuple(kind(part) for part in value.split(","))
