"""The configuration of Postfix 3.7.

SECURITY: loaded by the worker (root), which writes the files; Postfix reads some of them as root. See `hosts.py` for
what the values may contain. Sources: postconf(5), master(5), mysql_table(5), proxymap(8), local(8).

The primary domain is delivered by local(8), since only that reads the alias file; all others as virtual mailbox
domains. Both hand over to Dovecot by LMTP (RFC 2033).
"""

import re

from app.addresses import DomainName
from app.mailconfig.hosts import DATABASE, RECIPIENT_DELIMITER, HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile, render
from app.mailconfig.rspamd import milter_socket

# Each of these ends in local(8) or cleanup(8), where `|` begins a program, `/` a file, `:include:` a list, and `!` and `%` are
# routes. So only a plain address gets through (RFC 5322, dot-atom), whatever stands in a row. `\\z` and not `$`, which a
# newline may follow; SQL wants the backslash twice.
_PLAIN = r"'^[A-Za-z0-9#$&''*+=?^_`{}~][A-Za-z0-9#$&''*+/=?^_`{|}~.-]*@[a-z0-9-]+([.][a-z0-9-]+)+\\z'"

_MAPS = {
    # Postfix asks for user+ext@domain, user@domain, user+ext, user and @domain. With both %u and %d in it, the query is
    # only sent for those that have both parts. Without CONVERT a key that is not ASCII would be an SQL error, and that
    # takes the map down for a minute.
    "recipients.cf": "SELECT address FROM postfix_recipients WHERE address = CONVERT('%u@%d' USING ascii)",
    "virtual-domains.cf": "SELECT name FROM postfix_virtual_domains WHERE name = CONVERT('%s' USING ascii)",
    "virtual-aliases.cf": (
        "SELECT destination FROM postfix_virtual_aliases WHERE address = CONVERT('%u@%d' USING ascii)"
        " AND destination REGEXP {plain}"
    ),
    # local(8) asks by the part before the @ alone. smtpd(8) asks for whole addresses too, which no local part is.
    "local-aliases.cf": (
        "SELECT destination FROM postfix_local_aliases WHERE local_part = CONVERT('%s' USING ascii)"
        " AND destination REGEXP {plain}"
    ),
    # access(5) asks for the domain and for each above it, so a subdomain of ours is found too.
    "own-domains.cf": (
        "SELECT '550 5.7.1 Sign in on port {submission_port} to send from this domain' FROM postfix_own_domains"
        " WHERE name = CONVERT('%s' USING ascii)"
    ),
    # Several rows: any of these logins.
    "senders.cf": "SELECT login FROM postfix_senders WHERE address = CONVERT('%u@%d' USING ascii)",
    "logins.cf": "SELECT 'OK' FROM postfix_logins WHERE login = CONVERT('%u@%d' USING ascii) AND host = '{host}'",
}


def _map(file: HostFile, name: str) -> str:
    return f"proxy:mysql:{file.postfix_config_dir}/{name}"


def recipients_map(file: HostFile) -> str:
    """The map of all mailboxes, as `postmap -q` takes it."""
    return _map(file, "recipients.cf")


def local_aliases_map(file: HostFile) -> str:
    """The map of the primary domain's aliases that are not in the alias file, by local part."""
    return _map(file, "local-aliases.cf")


def virtual_aliases_map(file: HostFile) -> str:
    """The map of the other domains' aliases."""
    return _map(file, "virtual-aliases.cf")


def render_postfix(settings: HostSettings, file: HostFile, primary_domain: DomainName) -> dict[str, ConfigFile]:
    """Every file of the configuration directory by its name. The worker's alias file stands elsewhere and changes with rows;
    `postalias` must have built it before Postfix starts."""
    values = {"settings": settings, "file": file, "primary_domain": primary_domain}
    main = render(
        "postfix/main.cf",
        **values,
        recipient_delimiter=RECIPIENT_DELIMITER,
        maps={name: _map(file, name) for name in _MAPS},
        milter_socket=milter_socket(file),
        listen=[f"[{address}]" if address.version == 6 else address for address in file.listen],
        trusted_networks=[
            f"[{network.network_address}]/{network.prefixlen}" if network.version == 6 else network
            for network in file.trusted_networks
        ],
        ipv4_only=bool(file.listen) and all(address.version == 4 for address in file.listen),
    )
    files = {"main.cf": ConfigFile(main), "master.cf": ConfigFile(render("postfix/master.cf", **values))}
    known = {"{plain}": _PLAIN, "{submission_port}": str(settings.submission_port), "{host}": file.host}
    for name, query in _MAPS.items():
        complete = re.sub(r"\{\w+\}", lambda word: known[word[0]], query)
        text = render("postfix/map.cf", file=file, database=DATABASE, query=complete)
        files[name] = ConfigFile(text, group="postfix", mode=0o640)
    return files
