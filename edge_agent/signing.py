"""Commands that were signed by whoever owns the fleet, so that a broker in other hands commands nobody.

A signed command is `{"signed": "<the command as JSON>", "signature": "<base64>"}`: Ed25519 (RFC 8032) of the bytes of
that text. It names its `device` or `group`, and when it expires; its id is carried out once.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_agent import plugins
from edge_agent.errors import CommandError, ConfigError
from edge_agent.messages import MAX_COMMAND_BYTES, SignedCommand

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Signatures:
    """Raises `ConfigError` where the key cannot be used."""

    def __init__(self, key_file: str | None) -> None:
        self._key = public_key(key_file, "mqtt.command_public_key_file") if key_file else None

    @property
    def are_wanted(self) -> bool:
        return self._key is not None

    def is_ours(self, payload: bytes) -> bool:
        """Whether a command would be carried out, as far as its signature goes."""
        try:
            self.opened(payload)
        except CommandError:
            return False
        return True

    def opened(self, payload: bytes) -> bytes:
        """The command in a payload, whose signature was checked if there is a key. Raises `CommandError`."""
        envelope = _envelope(payload)
        if self._key is None:
            return envelope.signed.encode() if envelope else payload
        if envelope is None:
            raise CommandError(
                "only signed commands are carried out here (mqtt.command_public_key_file)", code="unsigned"
            )
        from cryptography.exceptions import InvalidSignature

        text = envelope.signed.encode()
        try:
            self._key.verify(base64.b64decode(envelope.signature, validate=True), text)
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise CommandError("the command is not signed with the operator's key", code="unsigned") from error
        return text


def _envelope(payload: bytes) -> SignedCommand | None:
    if len(payload) > MAX_COMMAND_BYTES or b'"signed"' not in payload:
        return None
    try:
        return msgspec.json.decode(payload, type=SignedCommand)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def public_key(path: str, what: str) -> Ed25519PublicKey:
    """The Ed25519 key in a PEM file. Raises `ConfigError`, with the key of the configuration that names it (`what`)."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise ConfigError(plugins.missing(error, needed_by=what)) from error
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{what}: {path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what}: {path} holds no public key in PEM form") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{what}: {path} holds a public key, but not of Ed25519")
    return key
