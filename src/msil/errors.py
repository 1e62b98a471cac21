"""Errors that end a command with one printed sentence and an exit code: what is wrong, where, and what to do."""

from __future__ import annotations

import codecs
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """What a user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data set is missing, malformed or unsafe to read."""


class WeightsError(UserError):
    """Weights are missing, cannot be downloaded, or do not fit the net."""


class RunError(Exception):
    """A run that ended before its end, for no mistake of the user's. A subclass has its own exit code."""

    exit_code = 1


def listed(names: Sequence[str], count: int) -> str:
    """The first `count` names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def counted(count: int, noun: str) -> str:
    """`1 image`, `2,500 images`."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural}"


# What Hydra's grammar reads as text without quotes: not the words that it reads as a number, a bool or null.
_BARE = re.compile(
    r"(?!(true|false|null|[+-]?(inf|nan|\.?\d[\d._]*(e[+-]?\d+)?))$)[\w./:+-]+", re.ASCII | re.IGNORECASE
)


def quoted(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, dict):  # whose keys it reads without quotes
        keys = [re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key)) for key in value]
        return "{" + ",".join(f"{key}:{quoted(item)}" for key, item in zip(keys, value.values(), strict=True)) + "}"
    if not isinstance(value, str) or _BARE.fullmatch(value):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def typed(setting: str, value: Any) -> str:
    """A setting as it is typed in a shell."""
    return shlex.quote(f"{setting}={quoted(value)}")


def install(extra: str) -> str:
    """How to install what one of pyproject.toml's extras brings."""
    return f'pip install -e ".[{extra}]" -c constraints.txt'


def plain_output() -> None:
    """A warning is one line without the line of code; a sign that the terminal's encoding lacks is printed as -."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    codecs.register_error("msil.dash", lambda error: ("-" * (error.end - error.start), error.end))  # pyright: ignore
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="msil.dash")


def exit_code_of(command: Callable[[], int], stopped: str) -> int:
    """The exit code of a whole command: what it returns, or that of the error that ended it, which is printed.

    stopped: what to print after Ctrl-C.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, or Python would complain of a closed pipe while it exits
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, RunError) as error:
        # An error in a loader's worker arrives with that process's traceback in its text.
        said = str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2]
        print("error:", " ".join(said.split("\n")).strip(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
