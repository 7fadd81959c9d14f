"""The mail programs with everything of ours in the path: a message from SMTP to IMAP, and single lookups."""

import imaplib
import smtplib
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.addresses import DomainName, Selector
from app.models.dkim_keys import Algorithm
from app.workers.host.dkim_files import make_key, write_table
from bench.system import System
from tests.stack.mail import PRIMARY_DOMAIN

PASSWORD = "seven green lanterns over the harbour"
NAME = f"user1@{PRIMARY_DOMAIN}"


def measure_message(system: System, count: int) -> float:
    """Milliseconds from DATA on an open submission connection, with rspamd and the policy process, until an open IMAP
    connection sees the message; the median."""
    with (
        _password(system),
        system.mail.submission(NAME, PASSWORD) as sender,
        system.mail.imap(NAME, PASSWORD) as reader,
    ):
        return statistics.median(_one(sender, reader) for _ in range(count)) * 1e3


def measure_signing(system: System, count: int) -> float:
    """Milliseconds that an RSA-2048 and an Ed25519 signature together add to a message, of which all octets are sent when it
    is taken with 250; between the medians of two runs on one connection."""
    domain, selectors = DomainName(PRIMARY_DOMAIN), [Selector("bench-rsa"), Selector("bench-ed")]
    for selector, algorithm in zip(selectors, (Algorithm.RSA_2048, Algorithm.ED25519), strict=True):
        make_key(system.mail.dkim, domain, selector, algorithm, durable=False)
    message = f"From: <{NAME}>\r\nTo: <{NAME}>\r\nSubject: bench\r\n\r\n{'text ' * 200}\r\n"
    medians = []
    try:
        with _password(system), system.mail.submission(NAME, PASSWORD) as sender:
            for keys in ({}, {domain: selectors}):
                write_table(system.mail.dkim, 1, keys, durable=False)
                took = []
                for _ in range(count + 10):
                    began = time.perf_counter()
                    sender.sendmail(NAME, [NAME], message)
                    took.append(time.perf_counter() - began)
                medians.append(statistics.median(took[10:]) * 1e3)
    finally:
        write_table(system.mail.dkim, 1, {}, durable=False)
    unsigned, signed = medians
    return signed - unsigned


@contextmanager
def _password(system: System) -> Iterator[None]:
    """One that Dovecot's own hash takes, for as long as it lasts."""
    hashed = system.mail.doveadm("pw", "-s", "SHA512-CRYPT", "-p", PASSWORD).strip()
    before = system.mariadb.sql("SELECT password_hash FROM users WHERE id = 1", "owner")[0][0]
    system.mariadb.sql(f"UPDATE users SET password_hash = '{hashed}' WHERE id = 1", "owner")
    system.mail.doveadm("auth", "cache", "flush")
    try:
        yield
    finally:
        system.mariadb.sql(f"UPDATE users SET password_hash = '{before}' WHERE id = 1", "owner")


def _one(sender: smtplib.SMTP, reader: imaplib.IMAP4_SSL) -> float:
    there = int(reader.select("INBOX")[1][0] or 0)
    message = f"From: <{NAME}>\r\nTo: <{NAME}>\r\nSubject: bench\r\n\r\n{'text ' * 200}\r\n"
    began = time.perf_counter()
    refused = sender.sendmail(NAME, [NAME], message)
    if refused:
        raise RuntimeError(f"refused: {refused}")
    while int(reader.select("INBOX")[1][0] or 0) <= there:  # STATUS of the open mailbox need not be new
        if time.perf_counter() - began > 10:
            raise RuntimeError("the message does not arrive")
    return time.perf_counter() - began


def measure_lookups(system: System, count: int) -> dict[str, float]:
    """Milliseconds for one address: Postfix's recipients, its senders, and Dovecot; medians."""
    config = str(system.mail.postfix_config)
    commands = {
        "postmap recipients": ["postmap", "-c", config, "-q", "{}", system.mail.recipients_map],
        "postmap senders": ["postmap", "-c", config, "-q", "{}", f"proxy:mysql:{config}/senders.cf"],
        "doveadm user": ["doveadm", "-c", str(system.mail.dovecot_config), "user", "{}"],
    }
    found = {}
    for name, argv in commands.items():
        took = []
        for number in range(count):
            address = system.address(1 + number * 7 % system.accounts)
            began = time.perf_counter()
            subprocess.run([part.format(address) for part in argv], stdout=subprocess.DEVNULL, check=True)
            took.append(time.perf_counter() - began)
        found[name] = statistics.median(took) * 1e3
    return found
