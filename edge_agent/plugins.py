"""From a name in the config to a class: ours by module name, anybody's by `package.module:Class`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Literal

from edge_agent.errors import ConfigError

Kind = Literal["sources", "backends", "families", "sensors"]

_KINDS: dict[Kind, tuple[str, str]] = {  # what one is called, and its class
    "sources": ("source", "Source"),
    "backends": ("backend", "Engine"),
    "families": ("family", "Family"),
    "sensors": ("sensor", "Sensor"),
}
_EXTRAS = {
    "cv2": "opencv",
    "onnxruntime": "onnx",
    "amqtt": "demo",
    "cuda": "cuda",
    "cuda.bindings": "cuda",
    "scipy": "tracking",
    "prometheus_client": "prometheus",
    "cryptography": "signed",
    "pynvml": "nvml",
    "cryptography.exceptions": "signed",
    "scipy.optimize": "tracking",
}


def load(kind: Kind, name: str) -> Any:
    """The class that `name` stands for. Raises `ConfigError` with the nearest name there is."""
    called, our_class = _KINDS[kind]
    module_name, _, class_name = name.partition(":")
    if not module_name:
        raise ConfigError(f"{name!r} names no {called}; write a name, or package.module:Class")
    if not class_name:
        if name not in names(kind):
            raise ConfigError(f"unknown {called} {name!r}{nearest(name, names(kind))}")
        module_name, class_name = f"edge_agent.{kind}.{name}", our_class
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(missing(error, needed_by=f"{called} {name!r}")) from error
    except AttributeError as error:
        raise ConfigError(f"{module_name} has no class {class_name!r}, which {name!r} asks for") from error


def names(kind: Kind) -> Sequence[str]:
    """The names of ours of this kind."""
    package = importlib.import_module(f"edge_agent.{kind}")
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    helpers = getattr(package, "HELPERS", ())
    return sorted(name for name in modules if not name.startswith("_") and name not in helpers)


def nearest(name: str, known: Sequence[str], *, listing: bool = True) -> str:
    """A clause for an error's sentence: the nearest known name, or else all of them if `listing`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known and listing else ""


def missing(error: ImportError, *, needed_by: str) -> str:
    """A sentence that says how to install what an import lacked, or what it complained of."""
    if not isinstance(error, ModuleNotFoundError):
        return f"{needed_by} needs {error.name or 'a module'}, which cannot be imported here: {error}"
    extra = _EXTRAS.get(error.name or "")
    how = f"pip install 'edge-agent[{extra}]'" if extra else "install it, or correct the name"
    return f"{needed_by} needs the Python module {error.name!r}, which is not installed: {how}"
