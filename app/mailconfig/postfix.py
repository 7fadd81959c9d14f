"""The configuration of Postfix 3.7.

SECURITY: loaded by the worker (root), which writes the files; Postfix reads some of them as root. See `hosts.py` for
what the values may contain. Sources: postconf(5), master(5), mysql_table(5), proxymap(8), local(8).

The primary domain is delivered by local(8), since only that reads the alias file; all others as virtual mailbox
domains. Both hand over to Dovecot by LMTP (RFC 2033).
"""

from app.addresses import DomainName
from app.mailconfig.hosts import DATABASE, RECIPIENT_DELIMITER, HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile, render

_MAPS = {
    # Postfix asks for user+ext@domain, user@domain, user+ext, user and @domain. With both %u and %d in it, the query is
    # only sent for those that have both parts. Without CONVERT a key that is not ASCII would be an SQL error, and that
    # takes the map down for a minute.
    "recipients.cf": "SELECT address FROM postfix_recipients WHERE address = CONVERT('%u@%d' USING ascii)",
    "virtual-domains.cf": "SELECT name FROM postfix_virtual_domains WHERE name = CONVERT('%s' USING ascii)",
}


def recipients_map(file: HostFile) -> str:
    """The map of all mailboxes, as `postmap -q` takes it."""
    return f"proxy:mysql:{file.postfix_config_dir}/recipients.cf"


def render_postfix(settings: HostSettings, file: HostFile, primary_domain: DomainName) -> dict[str, ConfigFile]:
    """Every file of the configuration directory by its name, but `aliases`: that changes with rows, and `postalias`
    must have built `aliases.lmdb` before Postfix starts."""
    values = {"settings": settings, "file": file, "primary_domain": primary_domain}
    main = render(
        "postfix/main.cf",
        **values,
        recipient_delimiter=RECIPIENT_DELIMITER,
        recipients_map=recipients_map(file),
        listen=[f"[{address}]" if address.version == 6 else address for address in file.listen],
        trusted_networks=[
            f"[{network.network_address}]/{network.prefixlen}" if network.version == 6 else network
            for network in file.trusted_networks
        ],
        ipv4_only=bool(file.listen) and all(address.version == 4 for address in file.listen),
    )
    files = {"main.cf": ConfigFile(main), "master.cf": ConfigFile(render("postfix/master.cf", **values))}
    for name, query in _MAPS.items():
        text = render("postfix/map.cf", file=file, database=DATABASE, query=query)
        files[name] = ConfigFile(text, group="postfix", mode=0o640)
    return files
