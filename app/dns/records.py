"""Which records a mail domain should have. Pure: facts in, records out.

Sources: RFC 1035 (zone files), RFC 7208 (SPF), RFC 6376 and 8463 (DKIM), RFC 7489 (DMARC), RFC 8461 (MTA-STS), RFC 8460
(TLS-RPT), RFC 6186 and 8314 (SRV).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from app.dns.settings import DomainSettings
from app.models.dkim_keys import Algorithm

TTL = 3600
"""Seconds. As long as anybody may go on with an old record."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record, or with the same name and type several: a set."""

    name: str
    """Absolute, lower case, without the final dot."""
    type: str
    """`MX`, `TXT`, `SRV`, `CNAME`."""
    value: str
    """As people write it: of TXT the whole string without quotes."""
    ttl: int = TTL

    @property
    def rdata(self) -> str:
        """As a zone file has it: of TXT quoted strings of at most 255 octets (RFC 1035, section 3.3.14)."""
        if self.type != "TXT":
            return self.value
        parts = [self.value[at : at + 255] for at in range(0, len(self.value), 255)] or [""]
        return " ".join(f'"{_escaped(part)}"' for part in parts)

    @property
    def zone_line(self) -> str:
        return f"{self.name}. {self.ttl} IN {self.type} {self.rdata}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def dkim_name(selector: str, domain: str) -> str:
    return f"{selector}._domainkey.{domain}"


def dkim_value(algorithm: Algorithm, public_key: str) -> str:
    """`public_key` empty: revoked (RFC 6376, section 3.6.1)."""
    return f"v=DKIM1; k={algorithm.family}; p={public_key}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a domain should have under one name and type."""

    purpose: str
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where mail programs find what; None: not offered."""

    submissions: int
    submission: int
    imaps: int
    imap: int
    pop3s: int | None


def wanted_records(
    domain: str,
    settings: DomainSettings,
    senders: Sequence[str],
    keys: Sequence[Record],
    ports: Ports | None,
    hosts: Sequence[str] = (),
) -> list[Wanted]:
    """Of a domain whose mailboxes are here. `senders` are mechanisms of SPF, as RFC 7208 has them; `ports` None: there is no
    host yet. `hosts` are the names by which the mail hosts call themselves: where mail goes if nobody says otherwise."""
    found = []
    if mx := hosts if settings.mx is None else settings.mx:
        servers = tuple(Record(domain, "MX", f"{10 * place} {name}.") for place, name in enumerate(mx, 1))
        found.append(Wanted("mx", servers))
    found.append(Wanted("spf", (Record(domain, "TXT", " ".join(["v=spf1", "mx", *senders, "-all"])),)))
    found += [Wanted("dkim", (key,)) for key in keys]
    reports = f"; rua=mailto:{settings.dmarc_reports}" if settings.dmarc_reports else ""
    found.append(Wanted("dmarc", (Record(f"_dmarc.{domain}", "TXT", f"v=DMARC1; p={settings.dmarc}{reports}"),)))
    if settings.tls_reports:
        value = f"v=TLSRPTv1; rua=mailto:{settings.tls_reports}"
        found.append(Wanted("tls-rpt", (Record(f"_smtp._tls.{domain}", "TXT", value),)))
    if settings.mta_sts is not None:
        value = f"v=STSv1; id={policy_id(settings)};"
        found.append(Wanted("mta-sts", (Record(f"_mta-sts.{domain}", "TXT", value),)))
        found.append(Wanted("mta-sts", (Record(f"mta-sts.{domain}", "CNAME", f"{settings.web_name}."),)))
    if settings.mail_name is not None and ports is not None:
        found += [Wanted("srv", (record,)) for record in _services(domain, settings.mail_name, ports)]
        if settings.web_name is not None:
            found.append(Wanted("autoconfig", (Record(f"autoconfig.{domain}", "CNAME", f"{settings.web_name}."),)))
    return found


_MAX_AGE = {"none": 86_400, "testing": 86_400, "enforce": 604_800}
"""Seconds for which other servers keep a policy. A wrong one in `testing` is soon forgotten."""


def mta_sts_policy(settings: DomainSettings) -> str:
    """The policy file (RFC 8461, section 3.2)."""
    mode = settings.mta_sts or "none"
    mx = settings.mx or [] if mode != "none" else []
    lines = ["version: STSv1", f"mode: {mode}", *(f"mx: {name}" for name in mx), f"max_age: {_MAX_AGE[mode]}"]
    return "".join(f"{line}\r\n" for line in lines)


def policy_id(settings: DomainSettings) -> str:
    """Another one for each other policy, by which servers see that there is one to fetch."""
    return sha256(mta_sts_policy(settings).encode()).hexdigest()[:20]


def _services(domain: str, name: str, ports: Ports) -> list[Record]:
    """TLS from the first octet on is preferred (RFC 8314, section 5.1). What is not offered has a dot (RFC 6186, 3.4)."""
    offered = [
        ("submissions", 0, ports.submissions),
        ("submission", 10, ports.submission),
        ("imaps", 0, ports.imaps),
        ("imap", 10, ports.imap),
        ("pop3s", 20, ports.pop3s),
        ("pop3", 20, None),
    ]
    return [
        Record(f"_{label}._tcp.{domain}", "SRV", f"{priority} 1 {port} {name}." if port else "0 0 0 .")
        for label, priority, port in offered
    ]


def canonical(purpose: str, value: str) -> str:
    """The same for values that mean the same: of tags (RFC 7489, 8460, 8461) the spaces, a last semicolon and the order of all
    but the first do not matter; of SPF neither case nor the number of spaces (RFC 7208, section 4.6.1)."""
    if purpose == "spf":
        return " ".join(value.lower().split())
    if purpose not in ("dmarc", "tls-rpt", "mta-sts") or "=" not in value:
        return value
    tags = ["=".join(part.strip() for part in tag.split("=", 1)) for tag in value.split(";") if tag.strip()]
    first, *others = tags
    return "; ".join([first, *sorted(others)])


def of_purpose(purpose: str, values: Sequence[str]) -> tuple[str, ...]:
    """Those of a name's values that matter to it: beside the SPF record a domain may have any other text."""
    if purpose != "spf":
        return tuple(values)
    return tuple(value for value in values if value == "v=spf1" or value.lower().startswith("v=spf1 "))


def dkim_record(selector: str, domain: str, algorithm: Algorithm, public_key: str) -> Record:
    return Record(dkim_name(selector, domain), "TXT", dkim_value(algorithm, public_key))
