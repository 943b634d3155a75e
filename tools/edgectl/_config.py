"""Which configuration edgectl means: the file that is named, or the one that is found."""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent import config, migrations
from edge_agent.config import Config
from edge_agent.errors import ConfigError

SERVICE = Path("/etc/edge-agent/config.toml")
"""The service's own file."""
_SERVICE_STATE = Path("/var/lib/edge-agent")
_HERE = Path("config.toml")
_OF_MODELS = ("model", "models", "fetch", "policy", "inference", "backends", "tracking")


def config_file(given: Path | None) -> Path | None:
    """The file that is named, else `./config.toml`, else the service's; None where there is none of these. With the
    service's file goes the service's state directory. Raises `ConfigError` where the named one is not there."""
    if given is not None and not _is_there(given):
        raise ConfigError(f"--config {given}: there is no such file")
    found = given or next(filter(_is_there, (_HERE, SERVICE)), None)
    if found is not None and found.absolute() == SERVICE and _SERVICE_STATE.is_dir():
        os.environ.setdefault("STATE_DIRECTORY", str(_SERVICE_STATE))  # as systemd does for the service
    return found


def required_config_file(given: Path | None) -> Path:
    """As `config_file`, for what cannot do without one. Raises `ConfigError`."""
    found = config_file(given)
    if found is None:
        raise ConfigError(f"there is neither {_HERE} here nor {SERVICE}; give the agent's own file with --config")
    return found


def configuration(given: Path | None) -> Config:
    """The file's, or the built-in defaults where there is none. Raises `ConfigError`."""
    found = config_file(given)
    return config.load(found) if found else config.parse({"cameras": {"none": {"source": "synthetic"}}})


def models_configuration(given: Path | None) -> Config:
    """As `configuration`, of the tables alone that say how models are kept and run: what is wrong with a camera, or a
    broker's password that only the service may read, does not matter then. Raises `ConfigError`."""
    found = config_file(given)
    raw = migrations.migrated(config.read(found))[0] if found else {}
    kept = {key: raw[key] for key in ("config_version", *_OF_MODELS) if key in raw}
    kept["cameras"] = {"none": {"source": "synthetic"}}
    return config.parse(kept, folder=found.parent if found else Path())


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:  # reading it will tell
        return True
