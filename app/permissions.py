"""Who may do what. Permissions and roles are strings that never change: rows and tokens hold them.

This is the one table of rights: the routes ask for a permission, the roles have them, and the docs page is made from both.
"""

from dataclasses import dataclass
from enum import StrEnum


class Permission(StrEnum):
    """What a route asks for. The value is what `403` names and what `--permission` takes.

    `users:write` includes reading the account that it writes: each answer to a change is the whole account. Other accounts
    it does not show: who has a taken address or external_id is told to callers with `users:read` only.
    """

    USERS_READ = "users:read"
    USERS_SUMMARY = "users:summary"
    """Just enough of one account to know whose it is and where a reset would go."""
    USERS_WRITE = "users:write"
    USERS_LOCK = "users:lock"
    USERS_PURGE = "users:purge"
    PASSWORDS_CHANGE = "passwords:change"
    """With the current password."""
    PASSWORDS_SET = "passwords:set"
    """Without it."""
    RESETS_REQUEST = "password-resets:request"
    """Always the same answer, whether or not there is such an account."""
    RESETS_WRITE = "password-resets:write"
    """Sees whether there is one, and may take the link to hand it over."""
    APP_PASSWORDS_READ = "app-passwords:read"
    APP_PASSWORDS_WRITE = "app-passwords:write"
    OWNER_TOKENS_WRITE = "owner-tokens:write"
    DOMAINS_READ = "domains:read"
    DOMAINS_WRITE = "domains:write"
    DKIM_KEYS_READ = "dkim-keys:read"
    DKIM_KEYS_WRITE = "dkim-keys:write"
    HOSTS_READ = "hosts:read"
    HOSTS_WRITE = "hosts:write"
    ALIASES_READ = "aliases:read"
    ALIASES_WRITE = "aliases:write"
    ADDRESSES_READ = "addresses:read"
    JOBS_READ = "jobs:read"
    JOBS_RETRY = "jobs:retry"
    PRINCIPALS_READ = "principals:read"
    PRINCIPALS_WRITE = "principals:write"
    LOCKOUTS_READ = "lockouts:read"
    LOCKOUTS_WRITE = "lockouts:write"
    AUDIT_READ = "audit:read"
    IDENTITIES_READ = "identities:read"
    """What a webmail needs of any account whose owner signs in there."""


class Role(StrEnum):
    """What a principal is. Its permissions are the role's, or fewer."""

    PRIMARY = "primary"
    SECONDARY = "secondary"
    LIMITED = "limited"
    AUDITOR = "auditor"
    WEBSITE = "website"
    WEBMAIL = "webmail"
    OWNER = "owner"
    """Of one account: never a row, only a token of ten minutes."""


_P = Permission

ROLE_PERMISSIONS: dict[Role, frozenset[Permission]] = {
    Role.PRIMARY: frozenset(Permission),
    Role.SECONDARY: frozenset(Permission),
    Role.LIMITED: frozenset({_P.USERS_SUMMARY, _P.RESETS_REQUEST, _P.RESETS_WRITE}),
    Role.AUDITOR: frozenset(permission for permission in Permission if permission.value.endswith(":read")),
    Role.WEBSITE: frozenset(
        {
            _P.USERS_READ,
            _P.USERS_WRITE,
            _P.PASSWORDS_CHANGE,
            _P.RESETS_REQUEST,
            _P.OWNER_TOKENS_WRITE,
            _P.DOMAINS_READ,
            _P.ALIASES_READ,
            _P.ADDRESSES_READ,
            _P.JOBS_READ,
        }
    ),
    Role.WEBMAIL: frozenset({_P.PASSWORDS_CHANGE, _P.OWNER_TOKENS_WRITE, _P.IDENTITIES_READ}),
    Role.OWNER: frozenset(
        {
            _P.USERS_READ,
            _P.ALIASES_READ,
            _P.PASSWORDS_CHANGE,
            _P.APP_PASSWORDS_READ,
            _P.APP_PASSWORDS_WRITE,
            _P.AUDIT_READ,
        }
    ),
}
"""An owner has them for its own account alone, on the routes that say so."""

RANKS: dict[Role, int] = {
    Role.PRIMARY: 3,
    Role.SECONDARY: 2,
    Role.AUDITOR: 1,
    Role.LIMITED: 1,
    Role.WEBSITE: 0,
    Role.WEBMAIL: 0,
    Role.OWNER: 0,
}
"""Nobody acts on a principal, or on the account of a principal, whose role stands higher."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller, once its credentials were verified."""

    id: str
    name: str
    role: Role
    permissions: frozenset[Permission]
    key_id: int | None = None
    """Of the secret or certificate behind the request, also when it brought a token."""
    user_id: int | None = None
    """The account that an owner is the owner of; of other principals, a person's own."""
    certificate: str | None = None
    """SHA-256 of the client certificate by which the request showed who it is, in hex."""

    @property
    def rank(self) -> int:
        return RANKS[self.role]
