"""The secret that Dovecot shows when it asks about logins: one line of a file, the same as in the hosts' own files."""

import os
import re
from pathlib import Path

from app.credentials.tokens import KeysUnusable

_KEY = re.compile(rb"[A-Za-z0-9_-]{32,128}\n?")


def load_policy_key(path: Path) -> bytes:
    """Return it. Raises KeysUnusable, which never tells what the file holds."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            line = file.read(200)
    except OSError as error:
        raise KeysUnusable(f"AUTH_POLICY_KEY_FILE: {path} cannot be read ({error.strerror}).") from None
    if mode & 0o027:
        raise KeysUnusable(f"AUTH_POLICY_KEY_FILE: {path} is for its owner, and one group to read, alone: chmod 0640.")
    if not _KEY.fullmatch(line):
        raise KeysUnusable(
            f"AUTH_POLICY_KEY_FILE: {path} holds something else than one line of 32 to 128 letters and digits. "
            "`openssl rand -hex 32` prints one."
        )
    return line.rstrip(b"\n")
