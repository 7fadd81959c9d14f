"""App passwords: made here, never chosen. Letters and digits that nobody mistakes for one another, in groups to type by."""

import secrets

ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
"""Without i, l, o, 0 and 1."""
GROUPS, GROUP = 7, 4
"""138 random bits: a plain SHA-256 of it serves, since nobody guesses that."""


def new_app_password() -> str:
    """The hyphens belong to it. Dovecot knows one by this shape: `dovecot-sql.conf.ext` has it too."""
    return "-".join("".join(secrets.choice(ALPHABET) for _ in range(GROUP)) for _ in range(GROUPS))
