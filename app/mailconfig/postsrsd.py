"""The configuration of postsrsd 1.10, which rewrites the senders of mail that goes on to other servers.

SECURITY: loaded by the worker (root), which writes the files; a shell reads one of them as root when the service starts. See
`hosts.py` for what the values may contain. Source: postsrsd(8) and Debian's /usr/share/postsrsd/postsrsd.template
"""

from pathlib import Path

from app.addresses import DomainName
from app.mailconfig.hosts import HostFile, HostFileError, HostSettings
from app.mailconfig.rendering import ConfigFile, render


def render_postsrsd(settings: HostSettings, file: HostFile, primary_domain: DomainName) -> dict[Path, ConfigFile]:
    """Raises HostFileError when the host's file has no secret for it."""
    if file.srs_secret is None:
        raise HostFileError("srs_secret: must be set in the host's file when `srs` is on")
    defaults = render("postsrsd/defaults", settings=settings, file=file, primary_domain=primary_domain)
    return {
        file.postsrsd_defaults: ConfigFile(defaults),
        file.postsrsd_secret_file: ConfigFile(f"{file.srs_secret.get_secret_value()}\n", mode=0o600),
    }
