import asyncio
import base64
import hashlib
import hmac
import os
import subprocess
import threading
import time
import unicodedata
import warnings

import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2i, Argon2id
from hypothesis import example, given
from hypothesis import strategies as st

from app.credentials import passwords
from app.credentials.passwords import Cost, check_hash, check_password, hash_password
from app.errors import BadPassword, PasswordUnreadable

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import crypt

DOVEADM = "/usr/bin/doveadm"
CHEAP = Cost(memory_kib=8192, passes=1)
PHRASE = "Zwölf große Möwen 🐦 fressen 100%w"
ADDRESS = "ann.meier@cacert.org"
NAME = "Ann-Kathrin Möller"


def dovecot_accepts(hashed: str, password: str) -> bool:
    """Ask the program that will read the hash. A missing doveadm is a failure, and so is any other exit code."""
    command = [DOVEADM, "-O", "pw", "-t", hashed, "-p", password]
    process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert process.returncode in (0, 75), process.stderr
    return process.returncode == 0 and "(verified)" in process.stdout


# --- our own hashes


@pytest.mark.asyncio
async def test_the_default_hash_is_what_dovecot_reads() -> None:
    hashed = await hash_password(PHRASE)
    assert hashed.startswith("{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=1$")
    assert "\0" not in hashed
    assert hashed == check_hash(hashed)
    assert dovecot_accepts(hashed, PHRASE)
    assert not dovecot_accepts(hashed, PHRASE + "x")


@pytest.mark.asyncio
async def test_every_hash_has_its_own_salt() -> None:
    one, two = await asyncio.gather(hash_password(PHRASE, CHEAP), hash_password(PHRASE, CHEAP))
    assert one != two
    assert one.startswith("{ARGON2ID}$argon2id$v=19$m=8192,t=1,p=1$")


@pytest.mark.asyncio
async def test_a_decomposed_password_is_hashed_as_mail_programs_send_it() -> None:
    hashed = await hash_password(unicodedata.normalize("NFD", PHRASE), CHEAP)
    assert dovecot_accepts(hashed, unicodedata.normalize("NFC", PHRASE))


@pytest.mark.asyncio
async def test_the_longest_password_works_in_dovecot() -> None:
    longest = ("🐦🦆🦉🦅" * passwords.LONGEST)[: passwords.LONGEST]
    assert dovecot_accepts(await hash_password(longest, CHEAP), longest)


@pytest.mark.asyncio
@pytest.mark.parametrize("password", ["fifteen\0characters", "lone \ud800 surrogate here", "x" * 257, "x" * 100_000])
async def test_what_cannot_be_a_password_is_not_hashed(password: str) -> None:
    with pytest.raises(BadPassword) as caught:
        await hash_password(password, CHEAP)
    assert password not in str(caught.value)


@pytest.mark.asyncio
async def test_never_more_hashes_at_once_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    lock, running = threading.Lock(), 0
    full, surplus, go = threading.Event(), threading.Event(), threading.Event()

    def counting(secret: bytes, cost: Cost) -> str:
        nonlocal running
        with lock:
            running += 1
            if running == cores:
                full.set()
            if running > cores:
                surplus.set()
        assert go.wait(5)
        with lock:
            running -= 1
        return "hash"

    monkeypatch.setattr(passwords, "_hash", counting)
    tasks = [asyncio.create_task(hash_password(PHRASE)) for _ in range(8 * cores)]
    assert await asyncio.to_thread(full.wait, 5)
    for task in tasks[:cores]:
        task.cancel()  # The thread of a cancelled task goes on, and still counts.
    assert not await asyncio.to_thread(surplus.wait, 0.2)
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results.count("hash") == 7 * cores
    assert not surplus.is_set()


@pytest.mark.asyncio
async def test_hashing_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def waiting(secret: bytes, cost: Cost) -> str:
        assert go.wait(5)
        return threading.current_thread().name

    monkeypatch.setattr(passwords, "_hash", waiting)
    task = asyncio.create_task(hash_password(PHRASE))
    await asyncio.sleep(0)
    go.set()  # Reached only if the loop was not waiting for the hash.
    assert (await task).startswith("argon2id")


# --- which passwords are good enough

GOOD = [
    "purple llama eats seven",
    "die Katze schläft nie allein",
    PHRASE,
    "849302175663920",
    "kX9!vv2#Lq0@ZZr",
    "ред лиса и снег",
    "ann likes meringue pie",
    "a b c of good cooking",
    "aaaaaaaaa purple llama",
    "🐦🦆🦉🦅🐧🐤🦩🦚🦜🐓🦃🕊🦢🐥🐔",
    "werden wir sehen, sagte sie",
]
COMMON = [
    "correcthorsebatterystaple",
    "Correct horse battery staple!",
    "thisismypassword",
    "ThisIsMyPassword2026!",
    "letmeinletmein!!!",
    "password1234567",
    "2026!!iloveyousomuch!!",
    "ILOVEYOUFOREVER",
    "p@ssw0rdp@ssw0rd",
    "\uff50\uff41\uff53\uff53\uff57\uff4f\uff52\uff44\uff11\uff12\uff13\uff14\uff15\uff16\uff17",
    "trustno1trustno1",
    "dragonDRAGONdragon",
    "snoopy-snoopy-snoopy",
    "liverpool19921992",
    "31415926535897932384",
]
NAMED = [
    "ann.meier@cacert.org",
    "annmeierannmeier",
    "Ann.Meier.Ann.Meier",
    "meier-meier-meier",
    "1234ANNMEIER5678",
    "reiemnnareiemnna",
    "gro.trecac@reiem.nna",
    "cacert-mail-2026!",
    "CAcert CAcert CAcert",
    "cacertpassword99",
    "möllermöller123",
    "MOLLER-MOLLER-99",
    "Kathrin!Kathrin?",
    "annkathrinmöller",
    "cacert.org.cacert.org",
]
PLAIN = [
    "\ufdfa" * 16,  # one character that folds to eighteen
    "aaaaaaaaaaaaaaaa",
    "               ",
    "!!!!!!!!!!!!!!!!",
    "ababababababababa",
    "xkcd xkcd xkcd xkcd",
    "abcdefghijklmnop",
    "zyxwvutsrqponmlk",
    "Abcdef-Ghijkl-Mnopqr",
    "stuvwxyzabcdefgh",
    "123456789012345",
    "987654321098765",
    "11112222333344445555",
    "1234-5678-9012-3456",
    "qwertyuiopasdfgh",
    "QWERTZUIOPASDFG",
    "poiuytrewqlkjhgf",
    "azertyuiopqsdfgh",
    "1qaz2wsx3edc4rfv",
    "1q2w3e4r5t6y7u8i",
    "!@#$%^&*()_+!@#$",
]


@pytest.mark.parametrize("password", GOOD)
def test_good_passwords_pass(password: str) -> None:
    check_password(password, address=ADDRESS, display_name=NAME)


@pytest.mark.parametrize(
    ("password", "words"),
    [(p, "attackers try first") for p in COMMON]
    + [(p, "made of the address") for p in NAMED]
    + [(p, "repeated, or a row") for p in PLAIN]
    + [("purple llama 7", "at least 15"), ("", "at least 15"), ("purple llama " * 20, "at most 256")]
    + [("purple\nllama eats seven", "control"), ("purple llama eats \x7f seven", "control")]
    + [("purple\0llama eats seven", "control"), ("purple \udc80 llama eats seven", "surrogate")],
)
def test_bad_passwords_are_refused_for_the_right_reason_without_being_named(password: str, words: str) -> None:
    with pytest.raises(BadPassword, match=words) as caught:
        check_password(password, address=ADDRESS, display_name=NAME)
    error = caught.value
    assert error.field == "password"
    shown = repr((error.args, error.members, error.__cause__, error.__context__))
    assert not password or password not in error.detail + shown


def test_the_same_words_pass_for_somebody_else() -> None:
    check_password("Ann.Meier.Ann.Meier", address="bo@example.org", display_name="Bo")


def test_length_counts_code_points_in_form_c() -> None:
    decomposed = unicodedata.normalize("NFD", "höflich müde Bär")  # 16 code points in form C, 19 here
    check_password(decomposed, address=ADDRESS, minimum=16)
    with pytest.raises(BadPassword, match="at least 17"):
        check_password(decomposed, address=ADDRESS, minimum=17)
    check_password(unicodedata.normalize("NFD", "öäü" + "purple llama " * 19), address=ADDRESS)


def test_no_setting_allows_fewer_than_twelve_characters() -> None:
    check_password("purple llama", address=ADDRESS, minimum=1)
    with pytest.raises(BadPassword, match="at least 12"):
        check_password("purple lama", address=ADDRESS, minimum=1)


def test_short_names_refuse_nothing_by_chance() -> None:
    check_password("49-x8-2031-77-bo-5", address="bo@x8.de", display_name="B O")


def test_the_worst_input_is_judged_quickly() -> None:
    start = time.process_time()
    for password in ("\ufdfa" * 256, "a" + "\u0300\u0316" * 500, "ab" * 127 + "c", "ann" * 85):
        with pytest.raises(BadPassword):
            check_password(password, address="ann@" + "ann." * 60 + "org", display_name="ann " * 60 + NAME)
    assert time.process_time() - start < 1


def test_the_blocklist_can_be_matched() -> None:
    """An entry in another form than the one that is looked up would be there in vain."""
    entries = passwords._blocklist()
    assert len(entries) > 1000
    assert {e for e in entries if e != passwords._fold(e) or e.strip() != e} == set()
    assert {e for e in entries if len(e) >= 12} & {"correcthorsebatterystaple", "mysecretpassword"}


# --- ready-made hashes


def unpadded(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def argon2(kind: type[Argon2id] | type[Argon2i], memory: int = 8192, passes: int = 1, lanes: int = 1) -> str:
    salt = os.urandom(16)
    key = kind(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(b"imported password")
    name = kind.__name__.lower()
    return f"{{{name.upper()}}}${name}$v=19$m={memory},t={passes},p={lanes}${unpadded(salt)}${unpadded(key)}"


def scram(iterations: int) -> str:
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", b"imported password", salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    parts = (salt, stored, hmac.digest(salted, b"Server Key", "sha256"))
    return f"{{SCRAM-SHA-256}}{iterations}," + ",".join(base64.b64encode(part).decode() for part in parts)


def pbkdf2(rounds: int) -> str:
    key = hashlib.pbkdf2_hmac("sha1", b"imported password", b"abcDEF123./", rounds, 20)
    return f"$1$abcDEF123./${rounds}${key.hex()}"


def crypted(setting: str) -> str:
    hashed = crypt.crypt("imported password", setting)
    assert hashed is not None
    return hashed


ACCEPTED = [
    argon2(Argon2id),
    argon2(Argon2id, 65536, 3, 4),
    argon2(Argon2i),
    argon2(Argon2i, 8192, 3, 4),
    "{BLF-CRYPT}" + crypted("$2y$05$abcdefghijklmnopqrstuu"),
    "{BLF-CRYPT}" + crypted("$2a$04$abcdefghijklmnopqrstuu"),
    "{BLF-CRYPT}" + crypted("$2b$04$abcdefghijklmnopqrstuu"),
    "{SHA512-CRYPT}" + crypted("$6$abc"),
    "{SHA512-CRYPT}" + crypted("$6$rounds=999999$abcdefghijklmnop"),
    "{SHA256-CRYPT}" + crypted("$5$abc"),
    "{SHA256-CRYPT}" + crypted("$5$rounds=1000$abcdefghijklmnop"),
    "{PBKDF2}" + pbkdf2(5000),
    "{PBKDF2}" + pbkdf2(200_000),
    scram(4096),
    scram(200_000),
]
ARGON, BCRYPT, SHA512, SCRAM = ACCEPTED[0], ACCEPTED[4], ACCEPTED[7], ACCEPTED[13]


@pytest.mark.parametrize("hashed", ACCEPTED, ids=[f"{h[1:].partition('}')[0]}-{i}" for i, h in enumerate(ACCEPTED)])
def test_what_is_accepted_dovecot_verifies(hashed: str) -> None:
    assert check_hash(hashed) == hashed
    assert dovecot_accepts(hashed, "imported password")
    assert not dovecot_accepts(hashed, "another password")


@pytest.mark.parametrize("scheme", sorted(passwords._SCHEMES))
def test_dovecot_makes_what_is_accepted(scheme: str) -> None:
    command = [DOVEADM, "-O", "pw", "-s", scheme, "-p", "imported password"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    made = process.stdout.strip()
    assert check_hash(made) == made
    assert check_hash(made.replace(scheme, scheme.lower(), 1)) == made


REFUSED = {
    "plain": ("{PLAIN}imported", "PLAIN is refused"),
    "cleartext": ("{CLEARTEXT}imported", "CLEARTEXT is refused"),
    "lower case": ("{plain}imported", "PLAIN is refused"),
    "crypt": ("{CRYPT}" + SHA512.partition("}")[2], "CRYPT is refused"),
    "md5": ("{MD5}$1$abc$abc", "MD5 is refused"),
    "ssha512": ("{SSHA512}abc", "SSHA512 is refused"),
    "sha1": ("{SCRAM-SHA-1}4096,abc,abc,abc", "SCRAM-SHA-1 is refused"),
    "encoded": ("{ARGON2ID.HEX}00", "unknown"),
    "unknown": ("{hunter2hunter2}x", "unknown"),
    "no scheme": (ARGON.partition("}")[2], "must read"),
    "empty": ("", "must read"),
    "no value": ("{ARGON2ID}", "must read"),
    "another scheme's": ("{BLF-CRYPT}" + ARGON.partition("}")[2], "form that BLF-CRYPT"),
    "argon2d": (ARGON.replace("$argon2id", "$argon2d"), "form"),
    "argon2i as id": (ARGON.replace("$argon2id", "$argon2i"), "form"),
    "old version": (ARGON.replace("v=19", "v=16"), "form"),
    "memory": (ARGON.replace("m=8192", "m=262145"), "memory"),
    "much memory": (ARGON.replace("m=8192", "m=4294967295"), "form"),
    "passes": (ARGON.replace("t=1", "t=11"), "passes"),
    "no pass": (ARGON.replace("t=1", "t=0"), "passes"),
    "lanes": (ARGON.replace("p=1", "p=17"), "lanes"),
    "lanes without memory": (ARGON.replace("m=8192", "m=64").replace("p=1", "p=16"), "lane"),
    "short key": (ARGON.rpartition("$")[0] + "$AAAA", "form"),
    "base64": (ARGON.rpartition("$")[0] + "$" + "A" * 41, "form"),
    "loose bits": (ARGON.rpartition("$")[0] + "$" + "A" * 42 + "B", "form"),
    "third part": (ARGON + "$" + ARGON.rpartition("$")[2], "form"),
    "bcrypt cost": (BCRYPT.replace("$05$", "$15$"), "log rounds"),
    "bcrypt cost 31": (BCRYPT.replace("$05$", "$31$"), "log rounds"),
    "bcrypt cut": (BCRYPT[:-1], "form"),
    "bcrypt 2x": (BCRYPT.replace("$2y$", "$2x$"), "form"),
    "sha512 rounds": (ACCEPTED[8].replace("999999", "1000000"), "form"),
    "sha512 few rounds": (ACCEPTED[8].replace("999999", "999"), "form"),
    "sha512 cut": (SHA512[:-1], "form"),
    "pbkdf2 rounds": ("{PBKDF2}" + pbkdf2(5000).replace("5000", "5000000"), "form"),
    "scram few": (SCRAM.replace("4096", "4095"), "iterations"),
    "scram many": (SCRAM.replace("4096", "1000000"), "form"),
    "scram cut": (SCRAM.rpartition(",")[0], "form"),
    "too long": (SHA512 + "a" * (501 - len(SHA512)), "must read"),
    "percent": (ARGON + "%u", "must read"),
    "quote": (ARGON + "'", "must read"),
    "double quote": (ARGON + '"', "must read"),
    "backslash": (ARGON + "\\", "must read"),
    "line end": (ARGON + "\n", "must read"),
    "tab": (ARGON.replace("}", "}\t"), "must read"),
    "nul": (ARGON + "\0", "must read"),
    "non-ascii digits": (ARGON.replace("8192", "٨١٩٢"), "must read"),
    "surrogate": (ARGON + "\ud800", "must read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hashes_that_are_refused(name: str) -> None:
    hashed, words = REFUSED[name]
    with pytest.raises(BadPassword, match=words) as caught:
        check_hash(hashed)
    error = caught.value
    assert error.field == "password_hash"
    value = hashed.partition("}")[2]
    shown = error.detail + repr((error.args, error.members, error.__cause__, error.__context__))
    assert len(value) < 6 or value not in shown
    assert "hunter2" not in shown.casefold()
    if "scheme" in error.detail:
        assert all(scheme in error.detail for scheme in passwords._SCHEMES)


def test_256_mib_do_not_fit_into_dovecots_auth_process() -> None:
    """Why the bound on memory is 128 MiB: Dovecot's default_vsz_limit is 256 MiB for the whole process."""
    limited = ["/usr/bin/prlimit", "--as=268435456", DOVEADM, "-O", "pw", "-p", "imported password", "-t"]
    for memory, works in ((131072, True), (262144, False)):
        hashed = argon2(Argon2id, memory)
        process = subprocess.run([*limited, hashed], capture_output=True, timeout=20, check=False)
        assert (process.returncode == 0) is works
    assert check_hash(argon2(Argon2id, 131072))


@given(st.text(), st.sampled_from(ACCEPTED), st.integers(0, 200))
@example("\n", ARGON, 200)
@example("\u2028", SCRAM, 200)
def test_no_text_with_a_strange_character_is_accepted(inserted: str, hashed: str, place: int) -> None:
    text = hashed[:place] + inserted + hashed[place:]
    try:
        accepted = check_hash(text)
    except BadPassword:
        return
    assert accepted.isascii()
    assert accepted.isprintable()
    assert not set(accepted) & set(" \t'\"`%\\")
    assert accepted.casefold() == text.casefold()


@given(st.text(alphabet=st.characters(), max_size=300))
def test_check_password_raises_nothing_else(password: str) -> None:
    try:
        check_password(password, address=ADDRESS, display_name=NAME)
    except BadPassword:
        return
    assert 15 <= len(unicodedata.normalize("NFC", password)) <= 256
    password.encode()


# --- what is stored, known again

LANTERNS = "seven green lanterns över"


def made_by_dovecot(scheme: str, password: str) -> str:
    command = [DOVEADM, "-O", "pw", "-s", scheme, "-p", password]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()


@pytest.mark.asyncio
@pytest.mark.parametrize("scheme", passwords._SCHEMES)
async def test_what_dovecot_hashed_is_known_again(scheme: str) -> None:
    """Each scheme that can be imported can be checked."""
    stored = check_hash(made_by_dovecot(scheme, LANTERNS))
    assert await passwords.password_matches(LANTERNS, stored)
    assert await passwords.password_matches(unicodedata.normalize("NFD", LANTERNS), stored)
    for wrong in (LANTERNS + "x", LANTERNS[:-1], LANTERNS.upper(), "", LANTERNS + "\0", "x" * 5000, "\ud800"):
        assert not await passwords.password_matches(wrong, stored)


@pytest.mark.asyncio
async def test_our_own_hash_is_known_again() -> None:
    stored = await hash_password(unicodedata.normalize("NFD", LANTERNS), CHEAP)
    assert await passwords.password_matches(LANTERNS, stored)
    assert not await passwords.password_matches(PHRASE, stored)


@pytest.mark.asyncio
async def test_nobodys_password_matches_nothing_and_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    matches = passwords._matches
    monkeypatch.setattr(passwords, "_matches", lambda secret, stored: checked.append(stored) or matches(secret, stored))
    assert not await passwords.password_matches(LANTERNS, None)
    (stored,) = checked
    assert stored.startswith(f"{{ARGON2ID}}$argon2id$v=19$m={passwords.COST.memory_kib},t={passwords.COST.passes},p=1$")
    check_hash(stored)


@pytest.mark.asyncio
@pytest.mark.parametrize("stored", ["{MD5-CRYPT}$1$abc$def", "plain", "{PLAIN}seven"])
async def test_another_form_is_said_to_be_unreadable(stored: str) -> None:
    with pytest.raises(PasswordUnreadable):
        await passwords.password_matches("seven", stored)
