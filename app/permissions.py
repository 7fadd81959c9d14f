"""Who may do what. Permissions and roles are strings that never change: rows and tokens hold them."""

from dataclasses import dataclass
from enum import StrEnum


class Permission(StrEnum):
    """What a route asks for. The value is what `403` names and what `--permission` takes."""

    USERS_READ = "users:read"
    USERS_WRITE = "users:write"
    USERS_PURGE = "users:purge"
    DOMAINS_READ = "domains:read"
    DOMAINS_WRITE = "domains:write"
    HOSTS_READ = "hosts:read"
    HOSTS_WRITE = "hosts:write"
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
