"""Who may do what. Permissions and roles are strings that never change: rows and tokens hold them."""

from dataclasses import dataclass
from enum import StrEnum


class Permission(StrEnum):
    """What a route asks for. The value is what `403` names and what `--permission` takes.

    `users:write` includes reading the account that it writes: each answer to a change is the whole account. Other accounts
    it does not show: who has a taken address or external_id is told to callers with `users:read` only.
    """

    USERS_READ = "users:read"
    USERS_WRITE = "users:write"
    USERS_PURGE = "users:purge"
    DOMAINS_READ = "domains:read"
    DOMAINS_WRITE = "domains:write"
    HOSTS_READ = "hosts:read"
    HOSTS_WRITE = "hosts:write"
    ALIASES_READ = "aliases:read"
    ALIASES_WRITE = "aliases:write"
    ADDRESSES_READ = "addresses:read"
    JOBS_READ = "jobs:read"
    JOBS_RETRY = "jobs:retry"


class Role(StrEnum):
    """What a principal is. Its permissions are the role's, or fewer."""

    PRIMARY = "primary"


ROLE_PERMISSIONS: dict[Role, frozenset[Permission]] = {
    Role.PRIMARY: frozenset(Permission),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller, once its credentials were verified."""

    id: str
    name: str
    role: Role
    permissions: frozenset[Permission]
