"""A private MariaDB."""

import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from app.mailconfig.hosts import DATABASE
from tests.stack.certificates import make_certificates
from tests.stack.processes import Processes, free_ports, run

GRANTS = Path(__file__).parents[2] / "deploy/mariadb/grants.sql"
OWNER = "owner"
"""Owns the schema: migrations run as this user."""
USERS = ("api", "worker", "service", "policy", "postfix", "dovecot")

_SMALL = ("--innodb-log-file-size=4M", "--innodb-buffer-pool-size=16M", "--skip-name-resolve")
_FORGETFUL = (
    "--innodb-flush-log-at-trx-commit=0",
    "--skip-innodb-doublewrite",
    "--innodb-flush-method=nosync",
    "--innodb-fast-shutdown=2",
)
_DURABLE = ("--innodb-flush-log-at-trx-commit=1", "--innodb-buffer-pool-size=256M")


class MariaDB:
    """One server. The order is `start`, `create_database`, `apply_grants`, and `close` at the end."""

    starts = 0
    """How often it was started: Postfix wants a reload after each."""

    def start(self, durable: bool = False) -> None:
        """`durable`: on a disk, and every commit reaches it before it returns, as in production. Else in memory."""
        self._processes = Processes(on_disk=durable)
        self.directory = self._processes.directory
        for name in ("run", "tmp"):  # several servers must not share one directory for temporary tables
            (self.directory / name).mkdir()
            shutil.chown(self.directory / name, "mysql")
        self.socket = self.directory / "run/mariadb.sock"
        make_certificates(self.directory, names=["database.cacert.test"])
        shutil.chown(self.directory / "key.pem", "mysql")
        self.ca_file = self.directory / "ca.pem"
        """For TLS, which a client may use or not. The certificate is for 127.0.0.1, not for localhost."""
        (self.port,) = free_ports(1)
        # What Postfix and Dovecot have to read from a file has everything in it that a password may contain.
        hard = "!&()*+,./:;<=>?@[]^_{|}~-"
        self.passwords = {
            user: secrets.token_urlsafe(24) + (hard if user in ("postfix", "dovecot") else "")
            for user in (OWNER, *USERS)
        }
        self._options = ["--no-defaults", f"--datadir={self.directory}/data", "--user=mysql", *_SMALL]
        self._options.append(f"--tmpdir={self.directory}/tmp")
        self._options += _DURABLE if durable else _FORGETFUL
        install = ["--skip-test-db", "--auth-root-authentication-method=socket", "--auth-root-socket-user=root"]
        try:
            run(["mariadb-install-db", *self._options, *install])
            self._run()
        except BaseException:
            self._processes.close()
            raise

    def stop(self) -> None:
        """Ends the server; its data and port stay for `restart`."""
        self._processes.stop(self._server)

    def kill(self) -> None:
        """As a crash would, with SIGKILL."""
        self._processes.stop(self._server, signal.SIGKILL)

    def restart(self) -> None:
        """On the same port and socket, with the same data. Postfix wants a reload after that."""
        self.stop()
        self._run()

    def close(self) -> None:
        """Ends the server and deletes its data."""
        self._processes.close()

    def url(self, user: str, driver: str = "asyncmy") -> str:
        """For SQLAlchemy. Users whose password is all URL-safe: all but `postfix` and `dovecot`."""
        return f"mysql+{driver}://{user}:{self.passwords[user]}@127.0.0.1:{self.port}/{DATABASE}"

    def client(self, user: str | None = None) -> list[str]:
        """The command line of the `mariadb` client; without a user as the server's root."""
        who = [f"--socket={self.socket}", "--user=root"]
        if user:
            who = ["--host=127.0.0.1", f"--port={self.port}", f"--user={user}", f"--password={self.passwords[user]}"]
        return ["mariadb", "--no-defaults", "--batch", "--skip-column-names", "--default-character-set=utf8mb4", *who]

    def sql(self, text: str, user: str | None = None) -> list[list[str]]:
        """Runs statements; the rows of all answers. Raises `RuntimeError` with the server's words. Takes about 8 ms."""
        database = [] if user is None else [DATABASE]
        return [line.split("\t") for line in run([*self.client(user), *database], stdin=text).splitlines()]

    def create_database(self, create_schema: Callable[[str], None]) -> None:
        """`create_schema` gets the owner's URL and makes every table and view."""
        self.sql(
            f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin;"
            f"CREATE USER {OWNER}@'%' IDENTIFIED BY '{self.passwords[OWNER]}';"
            f"GRANT ALL ON {DATABASE}.* TO {OWNER}@'%'"
        )
        create_schema(self.url(OWNER))
        rows = self.sql(
            f"SELECT table_name FROM information_schema.tables WHERE table_schema = '{DATABASE}'"
            " AND table_type = 'BASE TABLE' AND table_name <> 'alembic_version'"
        )
        self._tables = [name for (name,) in rows]

    def apply_grants(self) -> None:
        """Runs deploy/mariadb/grants.sql as root, then what it leaves to an administrator: passwords, unlocking."""
        unlock = [f"ALTER USER '{user}'@'%' IDENTIFIED BY '{self.passwords[user]}' ACCOUNT UNLOCK;" for user in USERS]
        self.sql(f"USE {DATABASE};\n{GRANTS.read_text()}\n" + "\n".join(unlock))

    def empty(self) -> None:
        """Deletes every row and starts all ids at 1 again, except for alembic_version."""
        truncate = "".join(f"TRUNCATE {table};" for table in self._tables)
        self.sql(f"USE {DATABASE}; SET foreign_key_checks = 0; {truncate}")

    def _run(self) -> None:
        listen = ["--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.socket}"]
        tls = [f"--ssl-cert={self.directory}/cert.pem", f"--ssl-key={self.directory}/key.pem"]
        other = [f"--pid-file={self.directory}/run/pid", "--skip-log-bin", "--performance-schema=OFF"]
        self._server: subprocess.Popen[bytes] = self._processes.start(
            ["/usr/sbin/mariadbd", *self._options, *listen, *tls, *other]
        )
        self._processes.wait_for(self._server, self.socket, self.directory / "mariadbd.out")
        self.starts += 1
        self.sql("DO 1")  # it listens before it serves, and a SIGTERM in between is lost
