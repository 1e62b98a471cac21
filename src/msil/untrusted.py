"""Settings are values: a settings file from elsewhere must not choose which code runs.

Hydra calls whatever `_target_` names in hydra.callbacks, and in the arguments of its launcher and sweeper; Python's
logging calls what `()` and `class` name in hydra.job_logging and hydra.hydra_logging. Hydra's own list of forbidden
names holds the worst of them, and not, for one, shutil.copyfile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from msil.errors import ConfigError
from msil.explain import one_line

PLUGINS = ("hydra.launcher", "hydra.sweeper")
PLUGIN_PACKAGES = ("hydra_plugins.", "hydra._internal.core_plugins.")  # what Hydra itself takes for a plugin
LOGGING = ("hydra.job_logging", "hydra.hydra_logging")
LOGGING_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter",
                   "colorlog.ColoredFormatter")  # fmt: skip
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")

# What is left of a text once these are replaced must hold no `${`: other resolvers (oc.create, oc.decode) can make a
# `_target_` out of text, unseen until Hydra looks.
_HARMLESS = re.compile(r"\$\{[\w.\[\]]*\}|\$\{(oc\.env|run_name|backbones|now):")


def refuse_code(composed: DictConfig) -> None:
    """Raises ConfigError, one sentence naming the setting, if anything in the composed settings, Hydra's own included,
    would make Hydra run code that is not a plugin of its or logging's own classes. Nothing is imported."""
    callbacks = OmegaConf.select(composed, "hydra.callbacks")
    if callbacks:
        names = ", ".join(f"hydra.callbacks.{name}" for name in callbacks)
        raise _refusal(names, "callbacks of Hydra's are code, and runs need none")
    for name, value in _entries(OmegaConf.to_container(composed, resolve=False, enum_to_str=True)):
        place, _, key = name.rpartition(".")
        if key == "_target_" and not (place in PLUGINS and str(value).startswith(PLUGIN_PACKAGES)):
            raise _refusal(f"{name}={value}", "only Hydra's own plugins are run by name")
        used = any(f"{name}.".startswith(f"{section}.") for section in (*PLUGINS, *LOGGING))
        if used and isinstance(value, str) and "${" in _HARMLESS.sub("(", value):
            raise _refusal(f"{name}={value}", "a resolver there could hide a name")
    for section in LOGGING:  # as Hydra will read them: an interpolation can bring them anything that stands elsewhere
        for name, value in _resolved(OmegaConf.select(composed, section), section):
            if name.endswith((".()", ".class")) and value not in LOGGING_CLASSES:
                raise _refusal(f"{name}={value}", f"logging may use {', '.join(LOGGING_CLASSES)}")
            if isinstance(value, str) and "ext://" in value and value not in STREAMS:
                raise _refusal(f"{name}={value}", f"logging may use {' and '.join(STREAMS)}")


def _entries(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of everything at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{path}.{key}" if path else str(key)
        yield name, value
        yield from _entries(value, name)


def _resolved(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """As `_entries`, with interpolations resolved, but for what Hydra itself sets later, such as a job's folder."""
    keys = list(node) if OmegaConf.is_dict(node) else range(len(node)) if OmegaConf.is_list(node) else ()
    for key in keys:
        try:
            value = node[key]
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            continue
        except OmegaConfBaseException as error:
            raise ConfigError(one_line(error)) from error
        yield f"{path}.{key}", value
        yield from _resolved(value, f"{path}.{key}")


def _refusal(what: str, why: str) -> ConfigError:
    return ConfigError(f"{what} would run code that a settings file names, which is refused ({why}): leave it out.")
