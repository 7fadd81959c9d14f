"""What the owner of a domain decides about its DNS: `domains.settings`, checked by the one model on both sides."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.addresses import DomainName, OutsideAddress


class DomainSettings(BaseModel):
    """Every field has a default, and `{}` is a domain whose records are entered by hand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    publisher: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")] | None = None
    """Which publisher of the service process's DNS_FILE. None: by hand."""
    rotate_every_days: Annotated[int, Field(ge=7, le=3650)] | None = None
    """DKIM keys are replaced when they have signed for so long. None: when somebody asks for it."""
    mx: Annotated[list[DomainName], Field(max_length=10)] | None = None
    """Where mail to the domain goes, the first preferred. None: nothing is said of it."""
    dmarc: Literal["none", "quarantine", "reject"] = "none"
    """What receivers are asked to do with mail that is not ours (RFC 7489)."""
    dmarc_reports: OutsideAddress | None = None
    tls_reports: OutsideAddress | None = None
    """Where reports about TLS go (RFC 8460). None: nowhere."""
