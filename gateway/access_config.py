"""Who may call the gateway, from which pages, and how much: settings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AccessConfig:
    api_keys_file: str = field(
        default="",
        metadata={"help": "file of API keys, one 'NAME SHA256' a line; callers must then have one of them"},
    )
    api_key_hashes: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "SHA-256 of more keys in hexadecimal, separated by commas; the keys themselves can stand "
            "in the variable TESSERA_API_KEYS"
        },
    )
    allow_no_keys: bool = field(
        default=False, metadata={"help": "answer everybody, also on an address that others can reach"}
    )
    key_requests_per_minute: int = field(
        default=0, metadata={"help": "most requests of one key a minute; 0: no limit"}
    )
    key_tokens_per_minute: int = field(
        default=0, metadata={"help": "most tokens of one key a minute, prompts and answers; 0: no limit"}
    )
    key_concurrency: int = field(
        default=0, metadata={"help": "most requests of one key at a time; 0: no limit"}
    )
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata={"help": "origins whose pages may call this gateway, separated by commas; * is every one"},
    )

    def __post_init__(self) -> None:
        for name in ("key_requests_per_minute", "key_tokens_per_minute", "key_concurrency"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for origin in self.cors_origins:
            if origin != "*" and (not origin.startswith(("https://", "http://")) or origin.endswith("/")):
                raise ValueError(f"cors_origins must be like https://example.org, got {origin!r}")
