"""The configuration of Dovecot 2.3. All of its syntax stands here and in `templates/dovecot23`: 2.4 reads another.

SECURITY: loaded by the worker (root), which writes the files; Dovecot reads them as root. See `hosts.py` for what the
values may contain. Source: https://doc.dovecot.org/2.3/
"""

import hashlib

from app.addresses import DomainName
from app.mailconfig.hosts import DATABASE, RECIPIENT_DELIMITER, HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile, render


def render_dovecot(settings: HostSettings, file: HostFile, primary_domain: DomainName) -> dict[str, ConfigFile]:
    """Every file of the configuration directory by its name, but for `local.conf`, which is the administrator's."""
    main = render(
        "dovecot23/dovecot.conf",
        settings=settings,
        file=file,
        primary_domain=primary_domain,
        recipient_delimiter=RECIPIENT_DELIMITER,
    )
    sql = render("dovecot23/dovecot-sql.conf.ext", file=file, database=DATABASE)
    files = {"dovecot.conf": ConfigFile(main), "dovecot-sql.conf.ext": ConfigFile(sql, mode=0o600)}
    if file.auth_policy_key is not None:
        # All hosts with one key make the same hash of one password, so it is one guess on all of them.
        nonce = hashlib.sha256(f"nonce:{file.auth_policy_key.get_secret_value()}".encode()).hexdigest()
        policy = render("dovecot23/auth-policy.conf.ext", settings=settings, file=file, nonce=nonce)
        files["auth-policy.conf.ext"] = ConfigFile(policy, mode=0o600)
    return files
