"""From where media are fetched by URL, and what a fetch may cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.options import MAX_FETCH_S

ANY_HOST = "*"


@dataclass(frozen=True)
class FetchLimits:
    """As it is by default nothing is fetched."""

    media_hosts: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "hosts from which media are fetched by URL, separated by commas; * is every host on the "
            "public internet; empty: none is"
        },
    )
    media_http: bool = field(
        default=False, metadata={"help": "fetch http URLs, too: anybody on the way can then change media"}
    )
    max_fetches: int = field(default=32, metadata={"help": "most media fetched at a time"})
    max_redirects: int = field(default=3, metadata={"help": "most redirects of one fetch"})
    fetch_timeout_s: float = field(
        default=5.0, metadata={"help": "seconds that a fetch may take, and may wait to begin"}
    )
    fetch_connect_timeout_s: float = field(
        default=2.0, metadata={"help": "seconds to connect to one address of a host"}
    )

    def __post_init__(self) -> None:
        if any(host != host.lower().strip(".") or not host for host in self.media_hosts):
            raise ValueError(f"media_hosts must be in lower case without dots around, got {self.media_hosts}")
        if self.max_fetches < 1:
            raise ValueError(f"max_fetches must be >= 1, got {self.max_fetches}")
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects must be >= 0, got {self.max_redirects}")
        for name in ("fetch_timeout_s", "fetch_connect_timeout_s"):
            if not 0 < getattr(self, name) <= MAX_FETCH_S:
                raise ValueError(f"{name} must be in (0, {MAX_FETCH_S:g}], got {getattr(self, name)}")

    def allows(self, host: str) -> bool:
        return host in self.media_hosts or ANY_HOST in self.media_hosts
