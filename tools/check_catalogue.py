#!/usr/bin/env python3
"""Fetch every model of the catalogue, or those named, and say whether it is the one that the catalogue tells of.

Asks the real registries, or those that PIP_INDEX_URL and npm_config_registry name; not run by the tests, which ask
nobody outside. Ends with 1 if any model cannot be had any more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from edge_agent.config import FetchOptions
from edge_agent.errors import ModelError
from edge_agent.models.catalogue import CatalogueEntry, catalogue, find
from edge_agent.models.fetch import fetch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of models; all if there are none")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files there, as <name>.onnx")
    parser.add_argument("--allow-private", action="store_true", help="where registries have addresses inside")
    parser.add_argument("--ca-file", metavar="PEM", help="the authority that a registry of your own is trusted by")
    given = parser.parse_args()
    options = FetchOptions(allow_private=given.allow_private, ca_file=given.ca_file)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return max([_check(name, folder / f"{name}.onnx", options) for name in given.names or catalogue()])


def _check(name: str, path: Path, options: FetchOptions) -> int:
    """1 if it is not what it should be."""
    began_s = time.monotonic()
    try:
        entry = find(name)
        fetch(entry.source, path, sha256=entry.sha256, options=options)
        problem = _problem(entry, path)
    except ModelError as error:
        problem = f"{error.code}: {error}"
    print(f"{name}: {problem or f'as it should be, {path.stat().st_size} bytes, {time.monotonic() - began_s:.1f} s'}")
    return 1 if problem else 0


def _problem(entry: CatalogueEntry, path: Path) -> str:
    size = path.stat().st_size
    return f"has {size} bytes, not {entry.size_bytes}" if size != entry.size_bytes else ""


if __name__ == "__main__":
    sys.exit(main())
