"""The programs, asked for real: a private Dovecot with a passwd-file, and Postfix maps of texthash: files."""

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from app.addresses import MailAddress
from app.errors import BadAddress
from app.workers.host.commands import (
    Batched,
    CommandFailed,
    Commands,
    DovecotUser,
    NotConfigured,
    run,
)

ALICE, BOB, CAROL, NOBODY = (MailAddress(f"{name}@example.org") for name in ("alice", "bob", "carol", "nobody"))

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {base}/queue
data_directory = {base}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
meta_directory = /etc/postfix
default_database_type = lmdb
myhostname = test.invalid
maillog_file = {base}/mail.log
maillog_file_prefixes = {base}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
"""
MASTER_CF = """\
postlog unix-dgram n - n - 1 postlogd
proxymap unix - - n - - proxymap
"""
DOVECOT_CONF = """\
base_dir = {base}/run
state_dir = {base}/state
instance_name = {name}
log_path = {base}/dovecot.log
ssl = no
protocols = imap
auth_cache_size = 1M
auth_mechanisms = plain
first_valid_uid = 20000
last_valid_uid = 60000
mail_location = maildir:~/Maildir
passdb {{
  driver = passwd-file
  args = {base}/users
}}
userdb {{
  driver = passwd-file
  args = {base}/users
}}
service imap-login {{
  inet_listener imap {{
    address = 127.0.0.1
    port = {port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("These tests must run as root: they start Dovecot and Postfix.")
    base = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="cmd-"))
    base.chmod(0o755)
    yield base
    subprocess.run(["/usr/bin/rm", "-rf", base], check=True)


def wait_for(condition: str, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(OSError):
            if ready():
                return
    pytest.fail(f"{condition} took more than ten seconds")


def answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port)):
        return True


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def commands(base: Path, port: int) -> Iterator[Commands]:
    """Dovecot runs; Postfix need not run for postmap."""
    for folder in ("postfix", "queue", "data", "alice"):
        (base / folder).mkdir()
    os.chown(base / "alice", 20001, 20001)
    (base / "users").write_text(
        f"{ALICE}:{{PLAIN}}pw:20001:20001::{base}/alice::\n"
        f"{BOB}:{{PLAIN}}pw:20002:20003::/home/bob of x::\n"
        f"{CAROL}:{{PLAIN}}pw:900:900::/home/carol::\n"  # below first_valid_uid
        "nouid@example.org:{PLAIN}pw:::::\n"
    )
    (base / "dovecot.conf").write_text(DOVECOT_CONF.format(base=base, port=port, name=base.name))
    (base / "postfix/main.cf").write_text(MAIN_CF.format(base=base))
    (base / "postfix/master.cf").write_text(MASTER_CF)
    (base / "recipients").write_text(f"{ALICE} ok\n{BOB} a b\n")
    for file in (*(base / "postfix").iterdir(), base / "recipients"):
        os.utime(file, (0, 0))  # Postfix waits for a second before it reads a file that was changed just now.
    command = ["/usr/sbin/dovecot", "-F", "-c", str(base / "dovecot.conf")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as dovecot:
        wait_for("starting Dovecot", lambda: answers(port))
        yield Commands(base / "postfix", f"texthash:{base}/recipients", base / "dovecot.conf")
        dovecot.terminate()


@asynccontextmanager
async def session(port: int, user: str) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()
    writer.write(f"a login {user} pw\r\n".encode())
    assert b"Logged in" in await reader.readline()
    yield reader
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


# Running programs


@pytest.mark.asyncio
async def test_runs_in_a_clean_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("SECRET", "x")
    os.set_inheritable(inherited := os.dup(0), True)
    script = "env; pwd; echo $(ls /proc/self/fd); echo $(ps -o sid= -p $$); echo $$; cat; echo e >&2; exit 3"
    output = await run(["/bin/sh", "-c", script], stdin=b"in", mail_config=Path("/x"))
    os.close(inherited)
    *environment, place, fds, sid, pid, stdin = output.stdout.decode().splitlines()
    assert {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "MAIL_CONFIG=/x"} <= set(environment)
    assert {line.partition("=")[0] for line in environment} - {"PWD", "OLDPWD", "SHLVL", "_"} == {
        "PATH",
        "LC_ALL",
        "MAIL_CONFIG",
    }
    assert (place, stdin) == ("/", "in")
    assert set(fds.split()) <= {"0", "1", "2", "3"}  # 3 is the directory that ls reads.
    assert sid == pid
    assert (output.returncode, output.stderr) == (3, b"e\n")


@pytest.mark.asyncio
async def test_runs_absolute_paths_only() -> None:
    with pytest.raises(ValueError, match="absolute"):
        await run(["true"])
    with pytest.raises(FileNotFoundError):
        await run(["/nonexistent"])


@pytest.mark.asyncio
async def test_large_input_and_output() -> None:
    data = os.urandom(3_000_000)
    assert (await run(["/bin/cat"], stdin=data)).stdout == data
    assert (await run(["/bin/true"], stdin=data)).returncode == 0


def is_child(pid: int) -> bool:
    """Whether somebody has yet to reap it."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def gone(pid: int) -> bool:
    """Dead, if perhaps not yet reaped by the system's init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["time", "cancel"])
async def test_kills_the_whole_family(base: Path, end: str) -> None:
    os.mkfifo(pids := base / f"pids-{end}")
    script = f"sleep 100 & echo $! $$ > {pids}; wait"
    started = time.monotonic()
    task = asyncio.create_task(run(["/bin/sh", "-c", script], seconds=0.5 if end == "time" else 30))
    child, parent = map(int, (await asyncio.to_thread(pids.read_text)).split())
    if end == "time":
        with pytest.raises(CommandFailed, match=r"killed after 0\.5 seconds"):
            await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    wait_for("dying", lambda: gone(child))
    assert not is_child(parent)
    assert time.monotonic() - started < 5


@pytest.mark.asyncio
async def test_kills_the_whole_family_at_any_moment(base: Path) -> None:
    """Cancelled after each number of turns of the event loop, even while asyncio is still starting the program."""
    for turns in range(12):
        marks = base / f"mark-{turns}"
        task = asyncio.create_task(run(["/bin/sh", "-c", f"sleep 12345 & echo $! > {marks}; wait"]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if pid := read(marks):
            wait_for("dying", lambda pid=pid: gone(int(pid)))  # type: ignore[misc]


def read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


@pytest.mark.asyncio
async def test_a_program_that_leaves_the_group_holds_nobody_up(base: Path) -> None:
    pids = base / "escaped"
    task = run(["/bin/sh", "-c", f"setsid sh -c 'echo $$ > {pids}; exec sleep 100' & exit 0"], seconds=0.3)
    with pytest.raises(CommandFailed, match="killed after"):
        await task
    os.kill(int(pids.read_text()), signal.SIGKILL)


@pytest.mark.asyncio
@pytest.mark.parametrize("where", ["1", "2"])
async def test_kills_what_prints_for_ever(where: str) -> None:
    with pytest.raises(CommandFailed, match="printed more than 100000 bytes"):
        await run(["/bin/sh", "-c", f"exec yes >&{where}"], limit=100_000)


# Postfix


@pytest.mark.asyncio
async def test_recipients(commands: Commands) -> None:
    assert await commands.lookup_recipients([ALICE, NOBODY, BOB]) == {ALICE: "ok", BOB: "a b"}
    assert await commands.lookup_recipients([NOBODY]) == {}
    assert await commands.lookup_recipients([]) == {}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("texthash:/nonexistent", "open database"),
        ("mysql:{base}/mysql.cf", "query error"),
        ("pipemap:{{texthash:{base}/recipients,fail:x}}", "query error"),
    ],
)
async def test_a_map_that_fails_is_not_an_empty_map(commands: Commands, base: Path, broken: str, says: str) -> None:
    (base / "mysql.cf").write_text("hosts = unix:/nonexistent\nuser = x\npassword = y\ndbname = z\nquery = SELECT 1\n")
    os.utime(base / "mysql.cf", (0, 0))
    failing = replace(commands, recipient_map=broken.format(base=base))
    with pytest.raises(CommandFailed, match=says):
        await failing.lookup_recipients([NOBODY, ALICE])


@pytest.mark.asyncio
async def test_a_configuration_that_is_missing(commands: Commands, base: Path) -> None:
    with pytest.raises(CommandFailed, match=r"main\.cf"):
        await replace(commands, postfix_config=base / "missing").lookup_recipients([ALICE])


@pytest.mark.asyncio
async def test_reload(commands: Commands) -> None:
    """That Postfix does not run is an error; the running one is for the tests of the whole stack."""
    with pytest.raises(CommandFailed, match="reload"):
        await commands.reload_postfix()


# Dovecot


@pytest.mark.asyncio
async def test_users(commands: Commands, base: Path) -> None:
    nouid = MailAddress("nouid@example.org")
    found = await commands.lookup_users([NOBODY, ALICE, CAROL, BOB, nouid, ALICE, NOBODY])
    assert isinstance(found.pop(CAROL), CommandFailed)
    assert found == {
        ALICE: DovecotUser(20001, 20001, f"{base}/alice"),
        BOB: DovecotUser(20002, 20003, "/home/bob of x"),
        nouid: DovecotUser(0, 0, ""),
    }
    assert await commands.lookup_users([NOBODY]) == {}
    assert await commands.lookup_users([]) == {}


@pytest.mark.asyncio
async def test_the_last_failure_does_not_hide_the_first(commands: Commands) -> None:
    """`doveadm user` exits with the status of the last failure only."""
    for asked in ([CAROL, NOBODY], [NOBODY, CAROL], [CAROL]):
        found = await commands.lookup_users(asked)
        assert list(found) == [CAROL]
        assert isinstance(found[CAROL], CommandFailed)


@pytest.mark.asyncio
async def test_many_users_in_several_calls(commands: Commands, base: Path) -> None:
    many = [MailAddress(f"user{number}@example.org") for number in range(1500)]
    assert await commands.lookup_users([*many, ALICE]) == {ALICE: DovecotUser(20001, 20001, f"{base}/alice")}


@pytest.fixture
def down(commands: Commands, base: Path) -> Commands:
    """The same host, with Dovecot not running."""
    text = (base / "dovecot.conf").read_text().replace(f"{base}/run", f"{base}/down")
    (base / "down.conf").write_text(text)
    return replace(commands, dovecot_config=base / "down.conf")


@pytest.mark.asyncio
async def test_a_dovecot_that_is_down_says_so(down: Commands) -> None:
    found = await down.lookup_users([ALICE, NOBODY])
    assert set(found) == {ALICE, NOBODY}
    for failure in found.values():
        assert isinstance(failure, CommandFailed)
        assert "No such file" in str(failure)
    for function in (down.flush_auth_cache, down.kick_sessions, down.list_sessions):
        with pytest.raises(CommandFailed, match="No such file"):
            await function(ALICE)


@pytest.mark.asyncio
async def test_sessions_are_counted_and_ended(commands: Commands, port: int) -> None:
    assert await commands.list_sessions(ALICE) == 0
    await commands.kick_sessions(ALICE)
    async with session(port, ALICE) as first, session(port, ALICE):
        assert await commands.list_sessions(ALICE) == 2
        assert await commands.list_sessions(BOB) == 0
        await commands.flush_auth_cache(ALICE)
        await commands.kick_sessions(BOB)
        assert await commands.list_sessions(ALICE) == 2
        await commands.kick_sessions(ALICE)
        with suppress(ConnectionError):
            async with asyncio.timeout(10):
                await first.read()
        assert await commands.list_sessions(ALICE) == 0


HOSTILE = [
    "*",
    "*@example.org",
    "-x",
    "-q@example.org",
    "a\nb@example.org",
    "?lice@example.org",
    "",
    "127.0.0.1",
    "a@b.c\n",
]


@pytest.mark.asyncio
@pytest.mark.parametrize("address", HOSTILE)
async def test_no_operand_but_an_address(commands: Commands, address: str) -> None:
    with pytest.raises(BadAddress):
        await commands.lookup_recipients([address])  # type: ignore[list-item]  # a row that got past the types
    with pytest.raises(BadAddress):
        await commands.lookup_users([address])  # type: ignore[list-item]
    for function in (commands.flush_auth_cache, commands.kick_sessions, commands.list_sessions):
        with pytest.raises(BadAddress):
            await function(address)


@pytest.mark.asyncio
async def test_a_host_without_mail_programs() -> None:
    none = Commands()
    for lookup in (none.lookup_recipients, none.lookup_users):
        with pytest.raises(NotConfigured):
            await lookup([ALICE])
    assert await none.list_sessions(ALICE) == 0
    await none.flush_auth_cache(ALICE)
    await none.kick_sessions(ALICE)
    await none.reload_postfix()


@pytest.mark.asyncio
async def test_an_answer_that_speaks_for_another(
    commands: Commands, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forged(argv: object) -> object:
        home = f"/home/alice\n{BOB}\t0\t0\t/root"
        return Forged(f"{ALICE}\t1\t1\t{home}\n{BOB}\t2\t2\t/home/bob\n".encode())

    monkeypatch.setattr("app.workers.host.commands.run", forged)
    found = await commands.lookup_users([ALICE, BOB])
    assert found[ALICE] == DovecotUser(1, 1, "/home/alice")
    assert isinstance(found[BOB], CommandFailed)


class Forged:
    def __init__(self, stdout: bytes) -> None:
        self.returncode, self.stdout, self.stderr = 0, stdout, b""


# Batches


class Lookup:
    """Answers the length of an address when it is let go; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go = asyncio.Event()
        self.fails: Exception | None = None

    async def __call__(self, addresses: Iterable[MailAddress]) -> dict[str, int | CommandFailed]:
        self.asked.append(list(addresses))
        await self.go.wait()
        if self.fails:
            raise self.fails
        answers: dict[str, int | CommandFailed] = {address: len(address) for address in self.asked[-1]}
        answers.pop(NOBODY, None)
        if CAROL in answers:
            answers[CAROL] = CommandFailed(["/x"], "carol")
        return answers


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_questions_gather_while_one_call_runs() -> None:
    lookup = Lookup()
    batched = Batched(lookup)
    first = asyncio.create_task(batched(ALICE))
    await settle()
    assert lookup.asked == [[ALICE]]
    rest = [asyncio.create_task(batched(address)) for address in (ALICE, BOB, NOBODY, BOB)]
    await settle()
    assert lookup.asked == [[ALICE]]
    lookup.go.set()
    assert await first == len(ALICE)
    assert await asyncio.gather(*rest) == [len(ALICE), len(BOB), None, len(BOB)]
    assert lookup.asked == [[ALICE], [ALICE, BOB, NOBODY]]
    assert await batched(BOB) == len(BOB)
    assert lookup.asked[2:] == [[BOB]]


@pytest.mark.asyncio
async def test_a_failed_call_fails_for_all_and_the_next_works() -> None:
    lookup = Lookup()
    batched = Batched(lookup)
    lookup.fails = CommandFailed(["/x"], "down")
    lookup.go.set()
    results = await asyncio.gather(batched(ALICE), batched(BOB), return_exceptions=True)
    assert list(results) == [lookup.fails] * 2
    lookup.fails = None
    good, bad, ugly = await asyncio.gather(batched(ALICE), batched(CAROL), batched("*"), return_exceptions=True)
    assert good == len(ALICE)
    assert isinstance(bad, CommandFailed)
    assert isinstance(ugly, BadAddress)


@pytest.mark.asyncio
async def test_one_who_leaves_harms_nobody() -> None:
    lookup = Lookup()
    batched = Batched(lookup)
    tasks = [asyncio.create_task(batched(address)) for address in (ALICE, ALICE, BOB)]
    await settle()
    for task in (tasks[0], tasks[2]):
        task.cancel()
    await settle()
    lookup.go.set()
    assert await tasks[1] == len(ALICE)
    assert await batched(BOB) == len(BOB)
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
