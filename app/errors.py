"""What can go wrong, in the words of the domain and without HTTP.

`web/problems.py` alone knows which status each one has.

    CacertMailError
    ├── Refused                 the request cannot be right, whatever the state
    │   ├── BadAddress          an address, local part, domain or selector
    │   ├── BadPassword         a password or a ready-made hash
    │   ├── BadField            any other field, named
    │   ├── NoDestination       an alias would lead to, or be sent from by, nobody; `chain` shows the way
    │   ├── OutsideRefused      an alias would lead to another's mail server, and SRS is off
    │   └── Unchangeable        a field that never changes; says what to do instead
    ├── NotFound                nothing by that name or id
    ├── LinkNotValid            the link that sets a password is used, expired, cancelled or none of ours: always the same
    ├── Conflict                right in itself, but not in the present state
    │   ├── AddressReserved     kept for the mail system (RFC 2142, system users)
    │   ├── AddressRetired      belongs to a deleted account
    │   ├── UserExists          the address, or the external_id, has an account
    │   ├── AliasExists         the address is an alias
    │   ├── AliasDeleted        a deleted alias cannot be changed
    │   ├── AliasLoops          mail would go in a circle; `chain` shows it
    │   ├── AliasTooDeep        mail would pass through too many aliases; `chain` shows them
    │   ├── UserNotDeleted      only a deleted account can be restored or purged
    │   ├── UserDeleted         a deleted account cannot be changed
    │   ├── UserNotActive       not while the account is suspended or locked
    │   ├── UserLocked          not while the account is locked: `unlock` comes first
    │   ├── UserPurged          nothing is left to restore
    │   ├── NoContactAddress    there is nowhere to send a link
    │   ├── PasswordUnreadable  the stored password is of a form that only Dovecot can check
    │   ├── TooManyAppPasswords the account has as many as it may have
    │   ├── DomainExists, DomainInUse, PrimaryDomainFixed, HostExists, HostInUse
    │   ├── DomainIsRelay       another host signs and answers for a relay domain
    │   ├── DkimKeyExists       the domain has, or had, this selector
    │   ├── DkimKeySigns        an active key cannot go before another is active
    │   ├── DkimStepNotNow      not in the key's present state
    │   ├── RotationUnderWay    another rotation comes first
    │   ├── SenderExists, TooManyLookups, NoPublisher
    │   ├── PlaceGone           the domain or the host was removed meanwhile
    │   ├── LastPrimary         nobody would be left who may do everything
    │   ├── TooManyKeys         a principal has as many secrets or certificates as it may have
    │   ├── CertificateKnown    a certificate is registered once
    │   ├── SrsNeeded           aliases lead to other mail servers, and SRS would be off; `aliases` names some
    │   ├── HostNotChosen       several hosts, or none: the request must name one
    │   ├── JobNotDead          only a dead job can be tried again
    │   ├── VersionConflict     somebody changed it first (If-Match)
    │   ├── KeyInUse            the same Idempotency-Key is at work right now
    │   └── KeyReused           the same Idempotency-Key, another request
    ├── Unauthenticated         no credentials, or wrong ones
    ├── Forbidden               the caller lacks a permission
    │   ├── Outranked           the principal, or the account's owner, has a higher role
    │   ├── OwnRights           nobody raises their own rights
    │   ├── ForgedCertificate   the header of a client certificate, from another than the proxies of the settings
    │   └── WrongPassword       there is no such account, or it has another password
    ├── TooManyTries            wrong guesses, or requests that are counted, one after another; `retry_after` seconds
    └── Unavailable             the database is away or too busy; try again
"""

from typing import Any


class CacertMailError(Exception):
    """The root. `detail` is a sentence for people; `members` go into the problem answer."""

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members


class Refused(CacertMailError):
    """`field` is the JSON member of the request that is at fault, if one is."""

    def __init__(self, detail: str, field: str | None = None, **members: Any) -> None:
        super().__init__(detail, **members)
        self.field = field


class BadAddress(Refused, ValueError):
    """A ValueError too, so that pydantic turns it into a field error."""


class BadPassword(Refused): ...


class BadField(Refused): ...


class NoDestination(Refused): ...


class OutsideRefused(Refused): ...


class Unchangeable(Refused): ...


class NotFound(CacertMailError): ...


class LinkNotValid(CacertMailError): ...


class Conflict(CacertMailError): ...


class AddressReserved(Conflict): ...


class AddressRetired(Conflict): ...


class UserExists(Conflict): ...


class AliasExists(Conflict): ...


class AliasDeleted(Conflict): ...


class AliasLoops(Conflict): ...


class AliasTooDeep(Conflict): ...


class UserNotDeleted(Conflict): ...


class UserDeleted(Conflict): ...


class UserNotActive(Conflict): ...


class UserLocked(Conflict): ...


class NoContactAddress(Conflict): ...


class PasswordUnreadable(Conflict): ...


class UserPurged(Conflict): ...


class TooManyAppPasswords(Conflict): ...


class DomainExists(Conflict): ...


class DomainInUse(Conflict): ...


class PrimaryDomainFixed(Conflict): ...


class DomainIsRelay(Conflict): ...


class DkimKeyExists(Conflict): ...


class DkimKeySigns(Conflict): ...


class DkimStepNotNow(Conflict): ...


class RotationUnderWay(Conflict): ...


class SenderExists(Conflict): ...


class TooManyLookups(Conflict): ...


class NoPublisher(Conflict): ...


class HostExists(Conflict): ...


class HostInUse(Conflict): ...


class LastPrimary(Conflict): ...


class TooManyKeys(Conflict): ...


class CertificateKnown(Conflict): ...


class SrsNeeded(Conflict): ...


class HostNotChosen(Conflict): ...


class PlaceGone(Conflict): ...


class JobNotDead(Conflict): ...


class VersionConflict(Conflict): ...


class KeyInUse(Conflict): ...


class KeyReused(Conflict): ...


class Unauthenticated(CacertMailError): ...


class Forbidden(CacertMailError): ...


class Outranked(Forbidden): ...


class WrongPassword(Forbidden): ...


class OwnRights(Forbidden): ...


class ForgedCertificate(Forbidden): ...


class TooManyTries(CacertMailError): ...


class Unavailable(CacertMailError): ...
