"""A private MariaDB, Postfix, Dovecot, rspamd, policy process and name servers, for tests, `make demo` and the bench. Nothing
is simulated.

What a stranger needs to know:

- Run as root, on Debian 12, with the packages that `missing_packages()` names. None of them need run, and nothing
  outside two new directories in /dev/shm is touched: own configuration, own data, own ports on 127.0.0.1.
- In tests ask for the fixtures `mariadb` (schema and grants in place) and `mail_stack`; see `fixtures.py`. Elsewhere:

      mariadb = MariaDB()
      mariadb.start()
      try:
          mariadb.create_database(create_schema)
          mariadb.apply_grants()
          ...
      finally:
          mariadb.close()

- The daemons are our children in the foreground. They are stopped by `close()`, and killed with their directories by a
  guarding shell when we end without it.
- Postfix and Dovecot read their views of the database. An account works once it has a row in `users`, one in `applied`
  with `stands = 1` and a result with `uid` and `home`, and that home below `MailStack.homes`, owned by that uid.
- Dovecot remembers an account for five minutes: after changing rows by hand call `mail_stack.doveadm("auth", "cache",
  "flush")`, or `mail_stack.empty()` between tests.
- After a restart of MariaDB call `mail_stack.reload()`: Postfix else keeps a map down for a minute.
- From 127.0.0.1 Dovecot takes a password without TLS. To be a stranger connect from another address, such as 127.0.0.5.
"""

import subprocess

PACKAGES = ["mariadb-server", "mariadb-client", "postfix", "postfix-mysql", "postfix-lmdb"]
PACKAGES += [
    "dovecot-core",
    "dovecot-imapd",
    "dovecot-pop3d",
    "dovecot-lmtpd",
    "dovecot-mysql",
    "rspamd",
    "postsrsd",
    "knot",
]


def missing_packages() -> list[str]:
    """The Debian packages that the stack needs and that are not installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return [package for package in PACKAGES if f"{package} installed" not in answer.splitlines()]
