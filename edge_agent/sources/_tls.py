"""Who is trusted over TLS: the system's authorities or one of the user's, checked unless that is switched off."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from edge_agent.errors import SourceError

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def context(ca: str | None, *, insecure: bool) -> ssl.SSLContext:
    """For connections of our own. Raises `SourceError` if the file of authorities cannot be read."""
    try:
        trusted = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise SourceError(f"tls_ca: {ca} holds no certificates in PEM form: {error}", reason="tls") from error
    if insecure:
        trusted.check_hostname = False
        trusted.verify_mode = ssl.CERT_NONE
    return trusted


def ffmpeg_options(ca: str | None) -> Sequence[str]:
    """The same for FFmpeg, which does not check unless it is told to, and knows no authorities by itself."""
    known = (ca, ssl.get_default_verify_paths().cafile, *_BUNDLES)
    bundle = next((path for path in known if path and Path(path).is_file()), None)
    if bundle is None:
        raise SourceError("no file of trusted authorities was found; name one as tls_ca", reason="tls")
    return ("tls_verify;1", f"ca_file;{bundle}")
