"""The configuration of rspamd 3.4, which asks the policy process who may write which From, signs what is ours, and verifies
what comes in.

SECURITY: loaded by the worker (root), which writes the files; rspamd reads them as its own user. See `hosts.py` for what the
values may contain. Sources: https://rspamd.com/doc/configuration/, https://rspamd.com/doc/lua/
"""

from pathlib import Path

from app.mailconfig.hosts import HostFile, HostSettings
from app.mailconfig.rendering import ConfigFile, render


def milter_socket(file: HostFile) -> Path:
    """Where Postfix talks to rspamd."""
    return file.rspamd_run_dir / "milter.sock"


def dkim_table(file: HostFile) -> Path:
    """Which keys sign; the worker writes it (`app/workers/host/dkim_files.py`)."""
    return file.dkim_dir / "keys.json"


def render_rspamd(settings: HostSettings, file: HostFile) -> dict[str, ConfigFile]:
    """Every file of ours in the configuration directory by its name. Nothing else there is read."""
    values = {"settings": settings, "file": file, "milter_socket": milter_socket(file), "dkim_table": dkim_table(file)}
    names = ("rspamd.conf", "from.lua", "dkim.lua", *(["incoming.lua"] if file.verifies else []))
    return {name: ConfigFile(render(f"rspamd/{name}", **values)) for name in names}
