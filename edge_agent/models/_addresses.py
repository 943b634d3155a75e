"""From where a model may come: which URLs may be asked, and which addresses may be connected to."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from edge_agent.config import FetchOptions
from edge_agent.errors import ModelError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = ("169.254.169.254", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192")
"""Where clouds hand out credentials: no model comes from there, whatever is allowed."""
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""IPv6 addresses that end in the IPv4 address which is meant (RFC 6052, RFC 4291)."""
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")
"""Private once (RFC 3879); `is_global` does not know."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URL that may be asked."""

    url: str
    scheme: str
    host: str
    port: int
    path: str


def allowed(url: str, options: FetchOptions) -> Place:
    """The URL's parts. Raises `ModelError` (`fetch_forbidden`) unless it may be asked."""
    parts, port = _split(url)
    host = (parts.hostname or "").rstrip(".")
    if "@" in parts.netloc:
        raise _forbidden("the URL names a user or a password, which would be shown and logged: leave them out")
    if parts.scheme not in ("https", "http") or not host or port == 0:
        raise _forbidden("the URL is not of the form https://host[:port]/path")
    hosts = [entry.lower().strip("[]").rstrip(".") for entry in options.hosts]
    if hosts and host not in hosts:
        raise _forbidden(
            f"{shown(url)}: {host} is not one of fetch.hosts, which allows {', '.join(hosts)} alone; it must list the "
            f"host of every redirect too, and for PyPI and npm those of the index and of the files"
        )
    if parts.scheme == "http" and not hosts:
        raise _forbidden(f"{shown(url)}: only https is allowed, and http from hosts that fetch.hosts lists")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(url, parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def addresses(place: Place, options: FetchOptions) -> list[tuple[socket.AddressFamily, Any]]:
    """What the host's name stands for, each with its port, to connect to. Raises `ModelError` (`fetch_forbidden`).

    All of them must be allowed. A name that leads into a private network as well as out of it is a mistake or an
    attack; to pick from its addresses would make it work by chance.
    """
    found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if why := _problem(ipaddress.ip_address(str(address[0]).partition("%")[0]), options):
            raise _forbidden(f"{shown(place.url)}: {place.host} is {address[0]}, {why}")
    return [(family, address) for family, *_, address in found]


def joined(url: str, further: str) -> str:
    """The URL that a page at `url` means. Raises `ModelError` (`fetch_forbidden`) if it means none."""
    try:
        return urljoin(url, further)
    except ValueError as error:
        raise _forbidden(f"{shown(url)} leads to what is no URL: {error}") from error


def shown(url: str) -> str:
    """A URL for people; its query may hold a secret, and so may what stands before the host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _split(url: str) -> tuple[SplitResult, int | None]:
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise _forbidden("the URL has spaces, backslashes or signs that are not ASCII: write them as %20, xn--…")
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError as error:
        raise _forbidden(f"the URL cannot be understood: {error}") from error


def _problem(address: Address, options: FetchOptions) -> str:
    """Why an address may not be connected to; empty if it may."""
    meant = _meant(address)
    if any(str(one) in _METADATA for one in meant):
        return "where clouds keep credentials: no model comes from there"
    if options.allow_private or all(_is_public(one) for one in meant):
        return ""
    return "which is no address of the Internet; fetch.allow_private = true allows it"


def _meant(address: Address) -> list[Address]:
    """The address, and those that are written in it: IPv4 in IPv6."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    inner += [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) for network in _TRANSLATED if address in network]
    return [address, *filter(None, inner)]


def _is_public(address: Address) -> bool:
    return address.is_global and not (address.is_multicast or address.is_reserved or address in _SITE_LOCAL)


def _forbidden(message: str) -> ModelError:
    return ModelError(message, code="fetch_forbidden")
