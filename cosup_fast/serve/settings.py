"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from string import Formatter

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class ServeConfig(BaseModel):
    """Where a server listens, what it lets in, and how much it does at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen on; the default is reachable locally only")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
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
        return key

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
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
