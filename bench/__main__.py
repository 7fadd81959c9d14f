"""`make bench`: how fast it is, measured in one run, on real programs. Run it as root, on Debian, when nothing else runs.

    python -m bench [--only NAME]… [--quick] [--messages N]

A private MariaDB on a real disk (`innodb_flush_log_at_trx_commit=1`: each commit is on it before it returns) with schema and
grants of production, a private Postfix and Dovecot whose homes lie in /dev/shm, so that syncing them costs nothing here; the
API, the worker and the load are processes of their own. The logs are at level `warning`, as in production: no line for each
request. 100,000 accounts are ready, homes and all; each has its job and audit event behind it. What is created
meanwhile is forgotten after each measurement.

Over HTTP: one API process, 16 keep-alive connections, each with one request at a time. Rates depend on the machine, so
goals are shares of `hello`, taken in the same round; three rounds, of which the median counts. No worker runs then.

    hello     requests a second to a route that does nothing, in the same application and middleware, without credentials.
              Beside it the load's own share of a core: below 80 %, it is not what limits.
    get       GET /v1/users/{address}, at random among all, Bearer token
    post      POST /v1/users with a ready-made hash; all statements and a durable commit
    list      GET /v1/users?limit=100, pages at random
    identities
              GET /v1/webmail/{address}/identities, at random among all
    not-modified
              the same of 200 accounts with the ETag that they have: 304
    argon2    creations by password a second, as a share of the hashes a second that the same code makes without HTTP
    worker    creations committed at once; until the last is ready, with all proofs of Postfix and Dovecot
    ready     one creation after another with `Prefer: wait=10`, on an idle machine: from the request to the answer, which
              comes when the mailbox is proved; and from the job's insert to its end, by timestamps
    sweep     the worker's comparison of all accounts, all in order: every home, Postfix's map and Dovecot's lookup
    growth    get, post, list, worker and ready with 1,000 accounts against 100,000: how many times slower (the shares of
              `hello` are compared, where there are any)

    audit     POST /v1/users with the audit trail's INSERT and without it, in turns: what of a write is its share

    policy    questions a second of Postfix to one core of the policy process, for logins that are busy; and rspamd's
              question who may write which From
    auth-policy
              Dovecot's questions about logins to one API process, with 100,000 wrong passwords on record
    resets    reset requests of a website for accounts and for addresses that nobody has: how far the medians differ; and from
              a new password by a link until the account's open IMAP session is closed
    aliases   one alias after another on an idle host with 100 of them: from the job's insert to its end, when Postfix
              answers for it; ten thousand at once: how often the file was made anew; how long that takes for so many lines
    mail      a message on an open submission connection, with rspamd and the policy process, until an open IMAP connection
              sees it; single lookups with 1,000 accounts against 100,000
    dkim      a DKIM key rotated on a host of its own, with a name server on loopback: from the request until rspamd signs
              with the new key, and until its probe has verified; and again under mail, of which each message is to verify
              (`--messages` of them at least)

Each figure is a row of `bench/results.json`: name, value, unit, goal, and whether it holds; `null` where there is no goal.
The exit status is 1 when a goal is missed. Everything is stopped and removed at the end, also on Ctrl-C.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from bench.aliases import measure_aliases
from bench.audit import measure_audit
from bench.auth_policy import measure_auth_policy
from bench.dkim import measure_rotations
from bench.mail import measure_lookups, measure_message, measure_signing
from bench.measures import QUICK, Http, Ready, Sizes, measure_argon2, measure_http, measure_ready, measure_worker
from bench.policy import measure_policy
from bench.resets import measure_confirm, measure_timing
from bench.system import System, running
from tests.stack import missing_packages

HTTP = {"get": 20, "post": 7, "list": 5}
"""And the share of `hello`, in percent, that each is to reach."""
WEBMAIL = {"identities": 20, "not-modified": 45}
NAMES = (
    *("hello", *HTTP, *WEBMAIL, "argon2", "worker", "ready", "sweep", "growth", "audit"),
    *("policy", "auth-policy", "resets", "aliases", "mail", "dkim"),
)
GROWTH = 1.5
RESULTS = Path(__file__).with_name("results.json")


class Results:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, unit: str, goal: str | None = None) -> None:
        """A goal is `>= number` or `<= number`."""
        holds = None
        if goal is not None:
            relation, limit = goal.split()
            holds = value >= float(limit) if relation == ">=" else value <= float(limit)
        self.rows.append({"name": name, "value": float(f"{value:.4g}"), "unit": unit, "goal": goal, "holds": holds})
        say(f"  {name}: {value:.4g} {unit}")  # a run that breaks off later has not been for nothing

    def table(self) -> str:
        head = ("figure", "value", "unit", "goal", "holds")
        marks = {True: "yes", False: "NO", None: ""}
        lines = [
            (row["name"], f"{row['value']:g}", row["unit"], row["goal"] or "", marks[row["holds"]]) for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        return "\n".join(
            f"{name:<{widths[0]}}  {value:>{widths[1]}}  {unit:<{widths[2]}}  {goal:<{widths[3]}}  {holds}".rstrip()
            for name, value, unit, goal, holds in [head, *lines]
        )


def measure(system: System, wanted: set[str], sizes: Sizes, results: Results) -> None:
    growth = "growth" in wanted
    lookups: dict[str, float] = {}
    if "mail" in wanted:
        system.grow(sizes.few)
        lookups = measure_lookups(system, sizes.lookups)
    few: tuple[dict[str, Http], float, Ready] | None = None
    if growth:
        say(f"{sizes.few} accounts")
        system.grow(sizes.few)
        http = measure_http(system, HTTP, sizes)
        with system.worker():
            few = http, measure_worker(system, sizes), measure_ready(system, sizes)
    say(f"{sizes.many} accounts")
    system.grow(sizes.many)
    names = [name for name in HTTP if name in wanted or growth] + [name for name in WEBMAIL if name in wanted]
    http = {}
    if names or "hello" in wanted:
        say("HTTP")
        http = measure_http(system, names, sizes)
        add_http(results, http)
    if "argon2" in wanted:
        say("argon2")
        created, hashed = measure_argon2(system, sizes)
        results.add("argon2: hashes without HTTP", hashed, "hash/s")
        results.add("argon2: creations by password", created, "request/s")
        results.add("argon2: share of the hashes", 100 * created / hashed, "%", ">= 80")
    if wanted & {"worker", "ready", "sweep", "growth"}:
        say("worker")
        with system.worker() as sweep:
            # The stack's empty alias file is not yet the worker's own.
            if (sweep["seen"], sweep["left"]) != (sizes.many, 0) or sweep["differ"] > 1:
                raise RuntimeError(f"the sweep found differences: {sweep}")
            if "sweep" in wanted:
                results.add(f"sweep: {sizes.many} accounts in order", sweep["seconds"], "s", "<= 60")
            rate = measure_worker(system, sizes) if growth or "worker" in wanted else 0
            ready = measure_ready(system, sizes) if growth or "ready" in wanted else Ready(0, 0)
            if rate:
                results.add(f"worker: {sizes.at_once} creations at once", rate, "mailbox/s", ">= 60")
            if ready.answer:
                results.add("ready: request to answer, p50", ready.answer, "ms", "<= 50")
                results.add("ready: job's insert to end, p50", ready.job, "ms")
        if few:
            ratios = {name: few[0][name].share / http[name].share for name in HTTP}
            ratios |= {"worker": few[1] / rate, "ready": ready.answer / few[2].answer}
            for name, ratio in ratios.items():
                results.add(
                    f"growth: {name}, {sizes.few} against {sizes.many}", ratio, "times slower", f"<= {GROWTH:g}"
                )

    if "audit" in wanted:
        say("audit")
        cost = measure_audit(system, sizes.seconds / 2)
        results.add("audit: share of a write", cost.share, "%", "<= 8")
        results.add("audit: CPU of the API", cost.cpu, "µs/request")
    if "policy" in wanted:
        say("policy")
        policy = measure_policy(system, sizes.seconds)
        results.add("policy: questions of Postfix, one core", policy.rate, "question/s", ">= 5000")
        results.add("policy: From question, p50", policy.from_p50, "ms", "<= 2")
    if "auth-policy" in wanted:
        say("auth-policy")
        logins = measure_auth_policy(system, sizes.seconds)
        results.add("auth-policy: answers, one process", logins.rate, "answer/s", ">= 1500")
        results.add("auth-policy: CPU of the API", logins.cpu, "µs/answer")
        results.add("auth-policy: answers to wrong passwords", logins.guesses, "answer/s")
    if "resets" in wanted:
        say("resets")
        timing = measure_timing(system, sizes.resets)
        results.add("resets: request for an account, p50", timing.known, "ms")
        results.add("resets: for none, differs by", timing.difference, "%", "<= 5")
        with system.worker():
            closed = measure_confirm(system, sizes.confirms)
        results.add("resets: confirm to the last session closed, p50", closed, "ms", "<= 150")
    if "aliases" in wanted:
        say("aliases")
        with system.worker():
            aliases = measure_aliases(system, sizes.aliases, sizes.burst)
        results.add("aliases: job's insert to end when idle, p50", aliases.idle, "ms", "<= 60")
        results.add(f"aliases: rebuilds for {sizes.burst} at once", aliases.rebuilds, "rebuilds", "<= 20")
        results.add(f"aliases: one rebuild of {sizes.burst} lines", aliases.rebuild, "ms", "<= 100")
    if "mail" in wanted:
        say("mail")
        results.add("mail: submission to IMAP, p50", measure_message(system, sizes.messages), "ms", "<= 20")
        results.add("mail: what two DKIM signatures add, p50", measure_signing(system, sizes.messages), "ms", "<= 8")
        for name, now in measure_lookups(system, sizes.lookups).items():
            ratio = now / lookups[name]
            results.add(f"mail: {name}, {sizes.few} against {sizes.many}", ratio, "times slower", f"<= {GROWTH:g}")


def measure_dkim(count: int, messages: int, results: Results) -> None:
    say("dkim")
    found = measure_rotations(count, messages)
    results.add("dkim: rotate to the new key signing, p50", found.signs, "s", "<= 3")
    results.add("dkim: rotate to its probe verified, p50", found.proved, "s")
    results.add(f"dkim: messages during {count} rotations or more", found.messages, "messages")
    results.add("dkim: messages that fail to verify", found.wrong, "messages", "<= 0")


def add_http(results: Results, http: dict[str, Http]) -> None:
    for name, figures in http.items():
        results.add(f"{name}: rate", figures.rate, "request/s")
        if goal := (HTTP | WEBMAIL).get(name):
            results.add(f"{name}: share of hello", 100 * figures.share, "%", f">= {goal}")
        else:
            results.add(f"{name}: load's own share of a core", 100 * figures.load, "%", "<= 80")
        results.add(f"{name}: CPU of the API", figures.cpu, "µs/request")
        results.add(f"{name}: CPU of MariaDB", figures.database_cpu, "µs/request")


def say(text: str) -> None:
    sys.stderr.write(f"{text} …\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="How fast it is, on the real programs.")
    parser.add_argument("--only", action="append", choices=NAMES, help="only this figure; may be given several times")
    parser.add_argument("--quick", action="store_true", help="small sizes: to try the bench itself")
    parser.add_argument("--messages", type=int, default=0, help="of dkim: so many at least go out meanwhile")
    options = parser.parse_args()
    wanted = set(options.only or NAMES)
    sizes = QUICK if options.quick else Sizes()
    os.chdir(Path(__file__).parents[1])
    if os.geteuid() != 0 or missing_packages():
        refuse(f"It runs as root, with these packages missing: {' '.join(missing_packages()) or 'none'}")
    results = Results()
    try:
        if wanted - {"dkim"}:
            with running() as system:
                measure(system, wanted, sizes, results)
        if "dkim" in wanted:
            measure_dkim(sizes.rotations, options.messages, results)
    except KeyboardInterrupt:
        refuse("Stopped; nothing is left.")
    RESULTS.write_text(json.dumps(results.rows, indent=1, ensure_ascii=False) + "\n")
    missed = [row["name"] for row in results.rows if row["holds"] is False]
    last = f"{len(missed)} goals are missed: {'; '.join(missed)}." if missed else "All goals hold."
    sys.stdout.write(f"{results.table()}\n{last}\n")
    return 1 if missed else 0


def refuse(why: str) -> NoReturn:
    sys.stderr.write(f"{why}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
