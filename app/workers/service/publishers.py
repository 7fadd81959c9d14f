"""Who enters records into a zone: publishers, by the names that DNS_FILE gives them.

SECURITY: DNS_FILE holds secrets, none of which is ever shown. A publisher that says that it is done is not believed: `dkim.py`
asks every name server of the zone.
"""

import asyncio
import tomllib
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import dns.asyncquery
import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.tsig
import dns.tsigkeyring
import dns.update
import httpx
import orjson
from dns.rdataclass import IN
from dns.rdatatype import TXT
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from app.addresses import DomainName
from app.dns.records import TTL, Record, of_purpose

SECONDS = 10
"""For all that one publisher is asked at once."""


LARGEST_ZONE = 32 * 2**20
"""Octets of a zone that an older PowerDNS, which knows no filter, shows as a whole."""


class PublishFailed(Exception):
    """It may pass, or somebody must mend the settings; the text says which, without a secret."""


class Publisher(Protocol):
    async def replace(
        self, zone: DomainName, name: str, kind: str, records: Sequence[Record], *, purpose: str = ""
    ) -> None:
        """All records of this name and type become these; none: they go. With `purpose` only those that matter to it, as
        `of_purpose` tells: what else is there stays. Raises PublishFailed."""


class PublishersUnusable(Exception):
    """DNS_FILE cannot be used: one line, without a value."""


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError("takes an address such as 192.0.2.53") from None


def _is_header(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not (text and text.isascii() and text.isprintable()):
        raise ValueError("takes one line of ASCII")
    return secret


class Update(BaseModel):
    """A primary name server that takes updates (RFC 2136), signed with a key (RFC 8945)."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: Literal["rfc2136"]
    server: Annotated[str, AfterValidator(_address)]
    port: Annotated[int, Field(ge=1, le=65535)] = 53
    key_name: DomainName | Annotated[str, Field(pattern=r"^[a-z0-9-]{1,63}$")]
    key_secret: SecretStr
    key_algorithm: Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"] = "hmac-sha256"

    async def replace(
        self, zone: DomainName, name: str, kind: str, records: Sequence[Record], *, purpose: str = ""
    ) -> None:
        try:
            keyring = dns.tsigkeyring.from_text({str(self.key_name): self.key_secret.get_secret_value()})
            update = dns.update.UpdateMessage(zone, keyring=keyring, keyalgorithm=f"{self.key_algorithm}.")
            if purpose == "spf":
                # Each by its value: what somebody adds at this moment stays too.
                query = dns.message.make_query(f"{name}.", kind)
                query.use_tsig(keyring, algorithm=f"{self.key_algorithm}.")
                present = await dns.asyncquery.tcp(query, self.server, timeout=SECONDS, port=self.port)
                if present.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    said = dns.rcode.to_text(present.rcode())
                    raise PublishFailed(f"The name server {self.server} does not say what is in {zone}: {said}")
                for rdata in present.get_rrset(present.answer, query.question[0].name, IN, TXT) or ():
                    if of_purpose(purpose, [text_of(rdata)]):
                        update.delete(f"{name}.", rdata)
            else:
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


def _base(text: str) -> str:
    """The key goes with each request, so the way is TLS, or stays on this machine."""
    try:
        url = httpx.URL(text)
        near = url.scheme == "http" and ip_address(url.host).is_loopback
    except (httpx.InvalidURL, ValueError):
        near = False
        url = httpx.URL()
    if not (near or (url.scheme == "https" and url.host)) or url.userinfo or url.query or url.fragment:
        raise ValueError("takes https://HOST, or http:// with an address of this machine")
    return text.rstrip("/")


class PowerDns(BaseModel):
    """PowerDNS's own HTTP API: https://doc.powerdns.com/authoritative/http-api/zone.html"""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: Literal["powerdns"]
    url: Annotated[str, AfterValidator(_base)]
    api_key: Annotated[SecretStr, AfterValidator(_is_header)]
    server: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "localhost"
    """What PowerDNS calls itself there; `localhost` unless a proxy speaks for several."""

    async def replace(
        self, zone: DomainName, name: str, kind: str, records: Sequence[Record], *, purpose: str = ""
    ) -> None:
        url = f"{self.url}/api/v1/servers/{self.server}/zones/{zone}."
        values = [{"content": record.rdata, "disabled": False} for record in records]
        if purpose == "spf":
            values = await self._foreign(zone, url, name, purpose) + values
        rrset: dict[str, Any] = {"name": f"{name}.", "type": kind, "changetype": "DELETE"}
        if values:
            rrset |= {"changetype": "REPLACE", "ttl": records[0].ttl if records else TTL, "records": values}
        await self._ask(zone, "PATCH", url, json={"rrsets": [rrset]})

    async def _foreign(self, zone: DomainName, url: str, name: str, purpose: str) -> list[dict[str, Any]]:
        """The texts of this name that do not matter to the purpose, as PowerDNS has them."""
        try:
            said = orjson.loads(await self._ask(zone, "GET", f"{url}?rrset_name={name}.&rrset_type=TXT"))
            found = [each for each in said["rrsets"] if (each["name"].lower(), each["type"]) == (f"{name}.", "TXT")]
            return [
                {"content": record["content"], "disabled": record["disabled"]}
                for each in found
                for record in each["records"]
                if not of_purpose(purpose, [text_of(dns.rdata.from_text(IN, TXT, record["content"]))])
            ]
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, dns.exception.DNSException):
            raise PublishFailed(f"PowerDNS at {self.url} does not say what is in {zone}.") from None

    async def _ask(self, zone: DomainName, method: str, url: str, **options: Any) -> bytes:
        headers = {"X-API-Key": self.api_key.get_secret_value()}
        said = b""
        try:
            # Neither a proxy of the environment nor a redirect is to see the key. What is said of a failure may be long, or
            # slow, or repeat the question: it is not read.
            async with (
                asyncio.timeout(SECONDS),
                httpx.AsyncClient(trust_env=False, timeout=SECONDS) as client,
                client.stream(method, url, headers=headers, **options) as answer,
            ):
                status = answer.status_code
                if method == "GET" and status == 200:
                    async for part in answer.aiter_bytes():
                        said += part
                        if len(said) > LARGEST_ZONE:
                            raise PublishFailed(f"PowerDNS at {self.url} says too much of {zone}.")
        except TimeoutError:
            raise PublishFailed(f"PowerDNS at {self.url} does not answer within {SECONDS} seconds.") from None
        except (httpx.HTTPError, OSError) as error:
            raise PublishFailed(f"PowerDNS at {self.url} does not answer: {type(error).__name__}") from None
        if status != (200 if method == "GET" else 204):
            raise PublishFailed(
                f"PowerDNS at {self.url} {_REFUSALS.get(status, 'answers').format(zone=zone)} ({status})."
            )

        return said


def text_of(rdata: Any) -> str:
    """The whole string of a TXT record. Octets beyond ASCII are kept apart, so that they are nobody's of ours."""
    return b"".join(rdata.strings).decode("latin-1")


_REFUSALS = {
    401: "refuses the key",
    403: "refuses the key",
    404: "has no zone {zone}",
    422: "refuses these records of {zone}",
}

_Publisher = Annotated[Update | PowerDns, Field(discriminator="kind")]
_PUBLISHERS: TypeAdapter[dict[str, Update | PowerDns]] = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")], _Publisher]
)
_MEMBERS = {*Update.model_fields, *PowerDns.model_fields}


def load_publishers(path: Path | None) -> dict[str, Update | PowerDns]:
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
        place = ".".join(str(part) for part in found["loc"] if part in (*values, *_MEMBERS))
        said = found["msg"].removeprefix("Value error, ")
        raise PublishersUnusable(f"DNS_FILE: {path}: {place or 'a key'}: {said}") from None
