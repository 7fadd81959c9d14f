"""Who enters records into a zone: publishers, by the names that DNS_FILE gives them.

SECURITY: DNS_FILE holds secrets, none of which is ever shown. A publisher that says that it is done is not believed: `dkim.py`
asks every name server of the zone.
"""

import tomllib
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Protocol

import dns.asyncquery
import dns.exception
import dns.name
import dns.rcode
import dns.tsig
import dns.tsigkeyring
import dns.update
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from app.addresses import DomainName
from app.dns.records import Record

SECONDS = 10
"""For all that one publisher is asked at once."""


class PublishFailed(Exception):
    """It may pass, or somebody must mend the settings; the text says which, without a secret."""


class Publisher(Protocol):
    async def replace(self, zone: DomainName, name: str, kind: str, records: Sequence[Record]) -> None:
        """All records of this name and type become these; none: they go. Raises PublishFailed."""


class PublishersUnusable(Exception):
    """DNS_FILE cannot be used: one line, without a value."""


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError("takes an address such as 192.0.2.53") from None


class Update(BaseModel):
    """A primary name server that takes updates (RFC 2136), signed with a key (RFC 8945)."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: Literal["rfc2136"]
    server: Annotated[str, AfterValidator(_address)]
    port: Annotated[int, Field(ge=1, le=65535)] = 53
    key_name: DomainName | Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")]
    key_secret: SecretStr
    key_algorithm: Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"] = "hmac-sha256"

    async def replace(self, zone: DomainName, name: str, kind: str, records: Sequence[Record]) -> None:
        try:
            keyring = dns.tsigkeyring.from_text({str(self.key_name): self.key_secret.get_secret_value()})
            update = dns.update.UpdateMessage(zone, keyring=keyring, keyalgorithm=f"{self.key_algorithm}.")
            update.delete(f"{name}.", kind)
            for record in records:
                update.add(f"{name}.", record.ttl, kind, record.rdata)
            answer = await dns.asyncquery.tcp(update, self.server, timeout=SECONDS, port=self.port)
        except (dns.tsig.PeerError, dns.tsig.BadSignature, dns.tsig.BadKey):
            raise PublishFailed(f"The name server {self.server} refuses the key {self.key_name}.") from None
        except (dns.exception.DNSException, OSError, EOFError, ValueError) as error:
            raise PublishFailed(f"The name server {self.server} does not answer: {type(error).__name__}") from None
        if answer.rcode() != dns.rcode.NOERROR:
            said = dns.rcode.to_text(answer.rcode())
            raise PublishFailed(f"The name server {self.server} refuses the change of {zone}: {said}")


_PUBLISHERS: TypeAdapter[dict[str, Update]] = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")], Update]
)


def load_publishers(path: Path | None) -> dict[str, Update]:
    """Each `[name]` of the file, by its name. Raises PublishersUnusable, also for a file that others may read."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            if path.stat().st_mode & 0o027:
                raise PublishersUnusable(f"DNS_FILE: {path} holds secrets: chmod 0640 or 0600.")
            values = tomllib.load(file)
    except OSError as error:
        raise PublishersUnusable(f"DNS_FILE: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise PublishersUnusable(f"DNS_FILE: {path} is no TOML.") from None
    try:
        return _PUBLISHERS.validate_python(values)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in found["loc"] if part in (*values, *Update.model_fields))
        raise PublishersUnusable(f"DNS_FILE: {path}: {place or 'a key'}: {found['msg']}") from None
