"""What the owner of a domain decides about its DNS: `domains.settings`, checked by the one model on both sides."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.addresses import DomainName, OutsideAddress


class DomainSettings(BaseModel):
    """Every field has a default, and `{}` is a domain whose records are entered by hand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    publisher: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")] | None = None
    """Which publisher of the service process's DNS_FILE. None: by hand."""
    rotate_every_days: Annotated[int, Field(ge=7, le=3650)] | None = None
    """DKIM keys are replaced when they have signed for so long. None: when somebody asks for it."""
    mx: Annotated[list[DomainName], Field(max_length=10)] | None = None
    """Where mail to the domain goes, the first preferred. None: to the mail hosts, by the names that they call themselves.
    Empty: nothing is said of it."""
    dmarc: Literal["none", "quarantine", "reject"] = "none"
    """What receivers are asked to do with mail that is not ours (RFC 7489)."""
    dmarc_reports: OutsideAddress | None = None
    tls_reports: OutsideAddress | None = None
    """Where reports about TLS go (RFC 8460). None: nowhere."""
    mail_name: DomainName | None = None
    """By which name mail programs reach the server, as its certificate has it. None: they are told nothing (RFC 6186)."""
    web_name: DomainName | None = None
    """Where this API answers from outside, also as `mta-sts.DOMAIN` and `autoconfig.DOMAIN`, with certificates for both. None:
    it does not."""
    mta_sts: Literal["none", "testing", "enforce"] | None = None
    """Whether other servers may send to the MX over verified TLS alone (RFC 8461). `none` takes an earlier policy back. None:
    there never was one."""

    @model_validator(mode="after")
    def _policy_can_be_fetched(self) -> Self:
        if self.mta_sts is not None and self.web_name is None:
            raise ValueError("mta_sts wants web_name: other servers fetch the policy from there")
        if self.mta_sts in ("testing", "enforce") and not self.mx:
            raise ValueError("mta_sts wants mx: the policy lists those names")
        return self
