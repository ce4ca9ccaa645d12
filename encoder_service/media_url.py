"""A URL as text to the parts that a fetch checks and uses: the only parser on that way.

Stricter than the standard: what two parsers could read in two ways is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import urljoin

from encoder_service.public_address import Address
from protos.options import MAX_URL_CHARS

_PORTS = {"https": 443, "http": 80}
# Of ASCII without blanks, control characters and backslashes; userinfo does not fit a host.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[\x21\x22\x24-\x3e\x40-\x5b\x5d-\x7e]*)?(?P<query>\?[\x21\x22\x24-\x5b\x5d-\x7e]*)?"
    r"(?:#[\x21-\x5b\x5d-\x7e]*)?",
    re.IGNORECASE | re.ASCII,  # without it a long s and the Kelvin sign are letters, too
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE | re.ASCII)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# A resolver takes such an end for a number in some base, and the whole for an IPv4 address.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_HOST_CHARS = 253


class BadUrl(ValueError):
    """The text says what is wrong, and nothing that the client does not know."""


@dataclass(frozen=True)
class MediaUrl:
    scheme: str  # "https" or "http"
    host: str  # a name in lower case without a dot at its end, or an address as ipaddress writes it
    port: int
    target: str  # path and query, as they go into the request
    address: Address | None  # where the host is one

    @property
    def authority(self) -> str:
        """The value of a Host header; the port is the scheme's own."""
        return f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host

    def redirected(self, location: str) -> MediaUrl:
        """Where a Location header leads.

        Raises:
            BadUrl: it is no URL, or leads from https to http.
        """
        target = parse_media_url(self._absolute(location))
        if self.scheme == "https" and target.scheme != "https":
            raise BadUrl("the redirect leads from https to http")
        return target

    def _absolute(self, location: str) -> str:
        """Only what has no host of its own goes through another parser."""
        if _SCHEME.match(location):
            return location
        if location.startswith("//"):
            return f"{self.scheme}:{location}"
        return urljoin(f"{self.scheme}://{self.authority}{self.target}", location)


def parse_media_url(text: str) -> MediaUrl:
    """Raises BadUrl."""
    if len(text) > MAX_URL_CHARS:
        raise BadUrl(f"the URL is longer than {MAX_URL_CHARS} characters")
    match = _URL.fullmatch(text)
    if match is None:
        raise BadUrl("this is not an https or http URL of plain ASCII without a user's name")
    scheme = match["scheme"].lower()
    host, address = _host(match["host"].lower())
    if match["port"] is not None and int(match["port"]) != _PORTS[scheme]:
        raise BadUrl(f"the port of an {scheme} URL must be {_PORTS[scheme]}")
    target = (match["path"] or "/") + (match["query"] or "")
    return MediaUrl(scheme, host, _PORTS[scheme], target, address)


def _host(text: str) -> tuple[str, Address | None]:
    try:
        if text.startswith("["):
            address: Address = IPv6Address(text[1:-1])
            return str(address), address
        name = text.removesuffix(".")
        labels = name.split(".")
        if _NUMBER.fullmatch(labels[-1]):
            address = IPv4Address(name)  # four decimal numbers without zeros in front
            return str(address), address
    except AddressValueError:
        raise BadUrl("the URL's host is not a name or an address in its usual form") from None
    if len(name) > _MAX_HOST_CHARS or not all(map(_LABEL.fullmatch, labels)):
        raise BadUrl("the URL's host is not a name or an address in its usual form")
    return name, None
