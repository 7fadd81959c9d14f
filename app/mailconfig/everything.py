"""All files of a mail host, for whoever installs them: the worker, the test stack, the demo.

SECURITY: loaded by the worker (root). It looks at the certificate and its key, and at no other file.
"""

import ssl
from pathlib import Path

from app.addresses import DomainName
from app.mailconfig.dovecot23 import render_dovecot
from app.mailconfig.hosts import HostFile, HostFileError, HostSettings
from app.mailconfig.postfix import render_postfix
from app.mailconfig.postsrsd import render_postsrsd
from app.mailconfig.rendering import ConfigFile
from app.mailconfig.rspamd import render_rspamd


def render_all(settings: HostSettings, file: HostFile, primary_domain: DomainName) -> dict[Path, ConfigFile]:
    """By absolute path. Raises HostFileError, with a sentence, when the certificate or what `srs` needs is not there."""
    check_certificate(file)
    directories = {
        file.postfix_config_dir: render_postfix(settings, file, primary_domain),
        file.dovecot_config_dir: render_dovecot(settings, file, primary_domain),
        file.rspamd_config_dir: render_rspamd(settings, file),
    }
    files = {directory / name: made for directory, named in directories.items() for name, made in named.items()}
    return files | (render_postsrsd(settings, file, primary_domain) if settings.srs else {})


def check_certificate(file: HostFile) -> None:
    """Postfix and Dovecot would start without one, and then serve nobody. Raises HostFileError."""
    for name, path in (("tls_certificate", file.tls_certificate), ("tls_key", file.tls_key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise HostFileError(f"{name}: {path}: {error.strerror}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file.tls_certificate, file.tls_key, _no_password)
    except (ssl.SSLError, ValueError):
        raise HostFileError(
            f"tls_certificate, tls_key: {file.tls_certificate} and {file.tls_key} are not a PEM certificate and its key"
        ) from None


def _no_password() -> str:
    """Else OpenSSL asks at the terminal."""
    raise ValueError("the key is encrypted")
