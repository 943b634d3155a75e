"""Whether a model was signed by the owner of the key that the configuration names."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.config import FetchOptions
from edge_agent.errors import ConfigError, ModelError
from edge_agent.signing import public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def require_signature_allowed(options: FetchOptions, *, is_signed: bool) -> None:
    """Raises `ModelError` where a model without a signature is not wanted, or one with it cannot be checked."""
    if is_signed:
        _public_key(options)
    elif options.require_signature:
        raise ModelError(
            "the model has no signature, and fetch.require_signature asks for one: give the URL or the file of its "
            "Ed25519 signature",
            code="signature_missing",
        )


def check_signature(path: Path, signature: bytes, options: FetchOptions) -> None:
    """The file is signed by the owner of `options.public_key_file`. Raises `ModelError` (`signature_invalid`) if not.

    `signature`: Ed25519 of the file's bytes (RFC 8032), detached, as `openssl pkeyutl -sign -rawin` writes it.
    """
    key = _public_key(options)
    from cryptography.exceptions import InvalidSignature

    try:
        # Mapped, since the signature is of the whole, which may be larger than the memory.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            key.verify(signature, content)
    except InvalidSignature as error:
        raise _unsigned(
            f"{path.name} is not signed by the owner of {options.public_key_file}; a signature is the 64 bytes that "
            f"openssl pkeyutl -sign -rawin writes"
        ) from error
    except OSError as error:
        raise _unsigned(f"{path}: {error.strerror}") from error
    except ValueError as error:  # nothing to map
        raise _unsigned(f"{path.name} is empty") from error


def _public_key(options: FetchOptions) -> Ed25519PublicKey:
    """Raises `ModelError` (`signature_invalid`) where there is none to check with."""
    path = options.public_key_file
    if path is None:
        raise _unsigned("the model has a signature, and fetch.public_key_file names no key to check it with")
    try:
        return public_key(path, "fetch.public_key_file")
    except ConfigError as error:
        raise _unsigned(str(error)) from error


def _unsigned(message: str) -> ModelError:
    return ModelError(message, code="signature_invalid")
