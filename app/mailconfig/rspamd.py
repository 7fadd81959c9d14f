"""The configuration of rspamd 3.4, which only asks the policy process who may write which From.

SECURITY: loaded by the worker (root), which writes the files; rspamd reads them as its own user. See `hosts.py` for what the
values may contain. Sources: https://rspamd.com/doc/configuration/, https://rspamd.com/doc/lua/
"""

from pathlib import Path

from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile, render


def milter_socket(file: HostFile) -> Path:
    """Where Postfix talks to rspamd."""
    return file.rspamd_run_dir / "milter.sock"


def render_rspamd(settings: HostSettings, file: HostFile) -> dict[str, ConfigFile]:
    """Every file of ours in the configuration directory by its name. Nothing else there is read."""
    main = render("rspamd/rspamd.conf", settings=settings, file=file, milter_socket=milter_socket(file))
    return {"rspamd.conf": ConfigFile(main), "from.lua": ConfigFile(render("rspamd/from.lua", settings=settings))}
