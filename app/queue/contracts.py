"""All that the privileged worker, and behind the host `-` the service process, may be asked to do.

SECURITY: loaded by the worker (root). A job is a kind out of this list and an id; nothing else crosses the border.
"""

from enum import StrEnum

MAILBOX_SYNC = "mailbox.sync"
"""Make the mailbox of user `subject_id` what its row says: in place, archived, restored or purged; end sessions."""

ALIASES_SYNC = "aliases.sync"
"""Make what this host's Postfix answers for aliases what their rows say. `subject_id` is the alias that asked; one run does
for all that wait."""

MAILHOST_SYNC = "mailhost.sync"
"""Make the configuration of this host's programs what `hosts.settings` says. `subject_id` is always `THE_HOST`."""

DKIM_SYNC = "dkim.sync"
"""Make, keep or delete the private half of the DKIM key `subject_id`, and sign with those keys that are active."""

DNS_PUBLISH = "dns.publish"
"""Take the DKIM keys of domain `subject_id`, and its other records, a step further. For the service process."""

MAIL_SEND = "mail.send"
"""Send the notice `subject_id` to the account's contact address. For the service process, whose host is `-`."""


class JobKind(StrEnum):
    MAILBOX_SYNC = MAILBOX_SYNC
    ALIASES_SYNC = ALIASES_SYNC
    MAILHOST_SYNC = MAILHOST_SYNC
    DKIM_SYNC = DKIM_SYNC
    DNS_PUBLISH = DNS_PUBLISH
    MAIL_SEND = MAIL_SEND


ALIASES_LANE = "aliases"
MAILHOST_LANE = "mailhost"
DKIM_LANE = "dkim"
"""Addresses all have an @, so none of them is a mailbox's."""

THE_HOST = 1
"""What a job and its `applied` name when they are about the host itself: a number, like every subject."""


def mail_lane(notice_id: int) -> str:
    """Each notice has its own: one that cannot be delivered holds up no other."""
    return f"mail:{notice_id}"


def dns_lane(domain_id: int) -> str:
    """Each domain has its own: a name server that does not answer holds up no other."""
    return f"dns:{domain_id}"


def mailbox_lane(address: str) -> str:
    """The address, so that whoever had it before and whoever has it now are never worked on at the same time."""
    return address
