"""The options of a server."""

from __future__ import annotations

import ipaddress
import re
from string import Formatter

from pydantic import Field, SecretStr, field_validator

from cosup_fast.data.strict import Strict


class ServeConfig(Strict):
    """Where a server listens, what it lets in, and how much it does at once."""

    host: str = Field(default="127.0.0.1", description="address to listen on; the default is reachable locally only")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="names under which clients may reach it, besides localhost and addresses; '*': any"
    )
    api_key: SecretStr | None = Field(default=None, description="clients must send it as a bearer token")
    cors_origins: tuple[str, ...] = Field(default=(), description="origins whose pages may call the API")
    max_batch: int = Field(default=16, ge=1, description="requests answered at once")
    max_waiting: int = Field(default=64, ge=0, description="requests that may wait; more are refused with 429")
    max_body_bytes: int = Field(default=1 << 20, ge=1, description="largest request body")
    drain_seconds: int = Field(default=30, ge=0, description="how long running requests may take after SIGTERM")
    passage_url: str | None = Field(
        default=None, description="url of a citation, with {id} and {title}; default: the server's own /passages/{id}"
    )

    @field_validator("api_key")
    @classmethod
    def _key_is_header_text(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not (key.get_secret_value().isascii() and key.get_secret_value().isprintable()):
            raise ValueError("api_key must be printable ASCII, as it travels in a header")
        if key is not None and not key.get_secret_value().strip():
            raise ValueError("api_key is empty: give a key, or leave the option out")
        return None if key is None else SecretStr(key.get_secret_value().strip())  # blanks at a header's edge are lost

    @field_validator("allowed_hosts")
    @classmethod
    def _names_alone(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name != "*" and not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
                raise ValueError(f"allowed_hosts has {name!r}: expected a host name without scheme and port, or '*'")
        return tuple(name.lower() for name in names)

    @field_validator("passage_url")
    @classmethod
    def _url_fields(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            fields = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
        except ValueError as error:
            raise ValueError(f"passage_url={value!r} is not a template: {error}") from None
        if not fields <= {"id", "title"} or not value.startswith(("http://", "https://")):
            raise ValueError(f"passage_url={value!r}: expected an http(s) URL with {{id}} or {{title}}")
        return value

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        address = address_of(self.host)
        return self.host == "localhost" or (address is not None and address.is_loopback)

    def knows(self, host: str) -> bool:
        """Whether a request may name this server `host`.

        A page of another site can have its own name resolve to this machine, and would then count as the server's own
        page (DNS rebinding). An address cannot be made to point elsewhere, and neither can localhost. A server that
        other machines can reach does not know its names, so there every name passes unless some are listed.
        """
        if "*" in self.allowed_hosts or not (self.local or self.allowed_hosts):
            return True
        return host in ("localhost", *self.allowed_hosts) or address_of(host) is not None


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that a host is written as; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
