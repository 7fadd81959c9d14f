"""All that the privileged worker may be asked to do.

SECURITY: loaded by the worker (root). A job is a kind out of this list and an id; nothing else crosses the border.
"""

from enum import StrEnum

MAILBOX_SYNC = "mailbox.sync"
"""Make the mailbox of user `subject_id` what its row says: in place, archived, restored or purged; end sessions."""


class JobKind(StrEnum):
    MAILBOX_SYNC = MAILBOX_SYNC


def mailbox_lane(address: str) -> str:
    """The address, so that whoever had it before and whoever has it now are never worked on at the same time."""
    return address
