"""Passwords of mailboxes: which are good enough, how Dovecot wants them, which ready-made hashes may be imported."""

import asyncio
import base64
import ctypes
import hashlib
import hmac
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import nacl.pwhash
from nacl.exceptions import InvalidkeyError

from app.errors import BadPassword, PasswordUnreadable

LONGEST = 256
"""Code points of a password, at most. NIST SP 800-63B-4, section 3.1.1.2 asks for at least 64."""

SHORTEST = 12
"""No setting lets a password have fewer code points than this."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one Argon2id hash costs: memory in KiB, and passes over it. One lane, as libsodium always has."""

    memory_kib: int = 65536
    passes: int = 3


COST = Cost()
"""Dovecot's own default for ARGON2ID; memory and passes as in the second choice of RFC 9106, section 4."""


async def hash_password(password: str, cost: Cost = COST) -> str:
    """Return `{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=1$…`, as Dovecot 2.3 reads it; some 60 ms of one core.

    The password is hashed in Unicode form C (RFC 8265, section 4.2.2), in UTF-8. It is not judged here: see
    `check_password`. Raises BadPassword if it cannot be a password at all.
    """
    secret = _readable(password).encode()
    return await asyncio.get_running_loop().run_in_executor(_threads(), _hash, secret, cost)


@cache
def _threads() -> ThreadPoolExecutor:
    # A pool and not a semaphore: a cancelled request gives its permit back while its thread goes on, and then more
    # threads than cores would each hold 64 MiB.
    return ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)), thread_name_prefix="argon2id")


def _hash(secret: bytes, cost: Cost) -> str:
    encoded = nacl.pwhash.argon2id.str(secret, opslimit=cost.passes, memlimit=cost.memory_kib * 1024)
    return "{ARGON2ID}" + encoded.rstrip(b"\0").decode("ascii")


_NOBODYS = "{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=1$bm9ib2R5cyBzYWx0ISEhIQ$" + "A" * 43
"""Matches nothing, and takes as long as a hash of ours."""


async def password_matches(password: str, stored: str | None) -> bool:
    """Tell whether Dovecot would let this password in by this hash. None, for nobody's, takes as long as one of ours.

    Raises PasswordUnreadable if the hash is of none of the forms that `check_hash` lets in.
    """
    if len(password) > 4 * LONGEST or "\0" in password:
        return False
    # We hash the normalised form; a hash that was taken over is of whatever bytes its owner's program sent.
    forms = {form.encode("utf-8", "surrogatepass"): None for form in (unicodedata.normalize("NFC", password), password)}
    loop = asyncio.get_running_loop()
    for secret in forms:
        if await loop.run_in_executor(_threads(), _matches, secret, stored or _NOBODYS):
            return stored is not None
    return False


def _matches(secret: bytes, stored: str) -> bool:
    scheme, _, value = stored.removeprefix("{").partition("}")
    match scheme:
        case "ARGON2ID" | "ARGON2I":
            try:
                return nacl.pwhash.verify(value.encode("ascii"), secret)
            except InvalidkeyError:
                return False
        case "BLF-CRYPT" | "SHA512-CRYPT" | "SHA256-CRYPT":
            return hmac.compare_digest(_crypt(secret, value.encode("ascii")), value.encode("ascii"))
        case "PBKDF2":
            _, _, salt, rounds, digest = value.split("$")
            made = hashlib.pbkdf2_hmac("sha1", secret, salt.encode("ascii"), int(rounds))
            return hmac.compare_digest(made.hex(), digest.lower())
        case "SCRAM-SHA-256":
            iterations, salt, stored_key, _ = value.split(",")
            salted = hashlib.pbkdf2_hmac("sha256", secret, base64.b64decode(salt), int(iterations))
            key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()  # RFC 5802, section 3
            return hmac.compare_digest(key, base64.b64decode(stored_key))
    raise PasswordUnreadable("The stored password is of a form that only Dovecot can check.")


def _crypt(secret: bytes, setting: bytes) -> bytes:
    """crypt_rn(3), as Dovecot calls it; b"" if it fails. Python's own `crypt` goes with 3.13, and holds up other threads."""
    data = ctypes.create_string_buffer(_CRYPT_DATA)
    return _libcrypt().crypt_rn(secret, setting, data, len(data)) or b""


_CRYPT_DATA = 32768
"""Bytes of a `struct crypt_data`."""


@cache
def _libcrypt() -> ctypes.CDLL:
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt_rn.restype = ctypes.c_char_p
    library.crypt_rn.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    return library


def check_password(password: str, *, address: str, display_name: str = "", minimum: int = 15) -> None:
    """Raise BadPassword, which says what is wrong and never the value, unless the password is good enough.

    After NIST SP 800-63B-4, section 3.1.1.2: a length of `minimum` (never below 12) to 256 code points in Unicode
    form C, no list of character classes, but neither a common password, nor the names of the account and the
    service, nor a repetition or sequence. Digits, punctuation and case do not make such a password a better one.
    """
    text = _readable(password)
    minimum = max(minimum, SHORTEST)
    if len(text) < minimum:
        raise _bad(f"The password is too short: it needs at least {minimum} characters. A few words will do.")
    folded = _fold(text)
    if _is_plain(text) or _is_plain(folded):
        raise _bad("The password is one character or short piece repeated, or a row of the alphabet or the keyboard.")
    if not _blocklist().isdisjoint(_cores(folded)):
        raise _bad("The password is one of those that attackers try first, perhaps with digits or punctuation around.")
    if _is_made_of(_letters_and_digits(folded), _names(address, display_name)):
        raise _bad("The password is made of the address, the name of its owner or the name of the service.")


def _bad(detail: str) -> BadPassword:
    return BadPassword(detail, field="password")


def _readable(password: str) -> str:
    """Return the password in Unicode form C. Normalising takes quadratic time, so the length is bounded before."""
    if len(password) > 4 * LONGEST:
        raise _bad(f"The password is too long: it may have at most {LONGEST} characters.")
    text = unicodedata.normalize("NFC", password)
    if len(text) > LONGEST:
        raise _bad(f"The password is too long: it may have at most {LONGEST} characters.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise _bad("The password contains a control character or half of a surrogate pair.")
    return text


def _fold(text: str) -> str:
    """Return the text without case, accents and look-alikes such as full-width letters."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))


def _letters_and_digits(text: str) -> str:
    return "".join(c for c in text if c.isalnum())


_ROWS = (
    "abcdefghijklmnopqrstuvwxyz 01234567890"  # the alphabet, the digits
    " qwertyuiop asdfghjkl zxcvbnm qwertzuiopu yxcvbnm azertyuiop qsdfghjklm wxcvbn !@#$%^&*()_+"  # keyboards
    " 1qaz 2wsx 3edc 4rfv 5tgb 6yhn 7ujm 8ik 9ol 0p 1q2w3e4r5t6y7u8i9o0p qawsedrftgyhujikolp"  # down and zigzag
)
_NEIGHBOURS = frozenset(pair for a, b in pairwise(_ROWS) if " " not in (a, b) for pair in (a + b, b + a))


def _is_plain(text: str) -> bool:
    """Tell whether the text is a piece of at most four characters repeated, or a few long runs along rows of keys.

    Three of four pairs of neighbours lie side by side in such runs; in words about one of five does.
    """
    bare = _letters_and_digits(text)
    variants = [text, bare] if 4 * len(bare) >= 3 * len(text) else [text]
    for variant in variants:
        runs = 1 + sum(a != b and a + b not in _NEIGHBOURS for a, b in pairwise(variant))
        if len(_piece(variant)) <= 4 or 4 * runs <= len(variant):
            return True
    return False


def _piece(text: str) -> str:
    """Return the shortest piece whose repetition, the last perhaps cut short, gives the text."""
    return next((text[:n] for n in range(1, len(text) // 2 + 1) if text[n:] == text[:-n]), text)


_SERVICE = "cacert mail email webmail login account password passwort pass admin welcome"


def _names(address: str, display_name: str) -> frozenset[str]:
    """Return the folded words, forwards and backwards, that say nothing but whose account this is, and where.

    Shorter ones than three letters, or five digits, would refuse good passwords by chance.
    """
    local, _, domain = address.rpartition("@")
    texts = [_fold(text) for text in (local, domain, local + domain, display_name, _SERVICE)]
    words = {word for text in texts for word in (_letters_and_digits(text), *re.split(r"[\W_]+", text))}
    words |= {"".join(c for c in word if c.isalpha()) for word in words}
    words = {word for word in words if len(word) >= (5 if word.isdecimal() else 3)}
    return frozenset(words | {word[::-1] for word in words})


def _is_made_of(text: str, words: frozenset[str]) -> bool:
    """Tell whether the text is nothing but these words, once at least, and digits."""
    reached: list[set[bool]] = [set() for _ in range(len(text) + 1)]
    reached[0].add(False)
    for start, with_word in enumerate(reached[:-1]):
        if not with_word:
            continue
        if not text[start].isalpha():
            reached[start + 1] |= with_word
        for word in words:
            if text.startswith(word, start):
                reached[start + len(word)].add(True)
    return True in reached[-1]


def _cores(text: str) -> Iterator[str]:
    """Yield what remains of the text when digits and punctuation around it, and its repetitions, are taken off."""
    for whole in (text, _letters_and_digits(text)):
        for core in (whole, _piece(whole)):
            yield core
            yield re.sub(r"[\W\d_]+\Z", "", core)
            yield re.sub(r"\A[\W\d_]+|[\W\d_]+\Z", "", core)


@cache
def _blocklist() -> frozenset[str]:
    lines = Path(__file__).with_name("blocklist.txt").read_text(encoding="ascii").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


# Dovecot works a stored hash out at every login, so its cost is bounded here: none of these takes a second. 128 MiB,
# because 256 MiB do not fit into the address space that Dovecot gives its auth process (vsz_limit, 256 MiB).
_ARGON2 = r"\$v=19\$m=(?P<memory>\d{1,6}),t=(?P<passes>\d{1,2}),p=(?P<lanes>\d{1,2})\$(?P<b64>[A-Za-z0-9+/$]+)"
_SHA_CRYPT = r"\$(?:rounds=(?P<rounds>[1-9]\d{3,5})\$)?[./A-Za-z0-9]{1,16}\$[./A-Za-z0-9]"
_SCHEMES = {
    "ARGON2ID": re.compile(r"\$argon2id" + _ARGON2),
    "ARGON2I": re.compile(r"\$argon2i" + _ARGON2),
    "BLF-CRYPT": re.compile(r"\$2[aby]\$(?P<log_rounds>\d\d)\$[./A-Za-z0-9]{53}"),
    "SHA512-CRYPT": re.compile(r"\$6" + _SHA_CRYPT + "{86}"),
    "SHA256-CRYPT": re.compile(r"\$5" + _SHA_CRYPT + "{43}"),
    "PBKDF2": re.compile(r"\$1\$[./A-Za-z0-9]{8,64}\$(?P<rounds>[1-9]\d{3,5})\$[0-9a-fA-F]{40}"),
    "SCRAM-SHA-256": re.compile(
        r"(?P<iterations>[1-9]\d{3,5}),(?P<b64>[A-Za-z0-9+/=]+,[A-Za-z0-9+/]{43}=,[A-Za-z0-9+/]{43}=)"
    ),
}
_BOUNDS = {
    "memory": (8, 131072),
    "passes": (1, 10),
    "lanes": (1, 16),
    "log_rounds": (4, 14),
    "rounds": (1000, 999999),
    "iterations": (4096, 999999),
}
_KNOWN_BUT_REFUSED = (
    "CLEAR CLEARTEXT CRAM-MD5 CRYPT DES-CRYPT DIGEST-MD5 HMAC-MD5 LDAP-MD5 LM MD5 MD5-CRYPT NTLM OTP PLAIN PLAIN-MD4"
    " PLAIN-MD5 PLAIN-TRUNC RPA SCRAM-SHA-1 SHA SHA1 SHA256 SHA512 SKEY SMD5 SSHA SSHA256 SSHA512"
)


def check_hash(text: str) -> str:
    """Return a ready-made Dovecot hash, `{SCHEME}…`, with its scheme in upper case.

    Raises BadPassword, which never holds the value, unless the scheme is one that Dovecot 2.3.19 verifies and that
    withstands guessing, its form is exactly right, and a login by it costs the mail host less than a second.
    """
    match = re.fullmatch(r"\{([A-Za-z0-9.-]{1,20})\}([!-~]+)", text) if len(text) <= 500 else None
    if match is None or re.search(r"""["'`%\\]""", text):
        raise _bad_hash(
            "The hash must read {SCHEME}…: at most 500 printable ASCII characters, no blank, quote, % or \\."
        )
    scheme, value = match[1].upper(), match[2]
    allowed = ", ".join(_SCHEMES)
    if scheme not in _SCHEMES:
        which = f"The scheme {scheme} is refused" if scheme in _KNOWN_BUT_REFUSED.split() else "The scheme is unknown"
        raise _bad_hash(f"{which}. Allowed are {allowed}.")
    parts = _SCHEMES[scheme].fullmatch(value)
    if parts is None:
        raise _bad_hash(f"The hash is not of the form that {scheme} has.")
    numbers = {name: int(part) for name, part in parts.groupdict().items() if part and name in _BOUNDS}
    for name, number in numbers.items():
        low, high = _BOUNDS[name]
        if not low <= number <= high:
            raise _bad_hash(f"The {name.replace('_', ' ')} of the {scheme} hash must be from {low} to {high}.")
    if "memory" in numbers and numbers["memory"] < 8 * numbers["lanes"]:
        raise _bad_hash(f"The {scheme} hash has less than 8 KiB of memory for each lane.")
    if "b64" in parts.groupdict() and not _decodes(scheme, parts["b64"]):
        raise _bad_hash(f"The hash is not of the form that {scheme} has.")
    return f"{{{scheme}}}{value}"


def _decodes(scheme: str, text: str) -> bool:
    """Tell whether salt and keys are in the one base64 writing that Dovecot and libsodium accept, and long enough."""
    padded = scheme == "SCRAM-SHA-256"
    try:
        salt, *keys = [_base64(part, padded=padded) for part in text.split("," if padded else "$")]
    except ValueError:
        return False
    right: Callable[[int], bool] = (lambda n: n == 32) if padded else (lambda n: 16 <= n <= 64)
    return 8 <= len(salt) <= 64 and len(keys) == (2 if padded else 1) and all(right(len(key)) for key in keys)


def _base64(text: str, *, padded: bool) -> bytes:
    raw = base64.b64decode(text if padded else text + "=" * (-len(text) % 4), validate=True)
    again = base64.b64encode(raw).decode("ascii")
    if text != (again if padded else again.rstrip("=")):
        raise ValueError("not canonical")
    return raw


def _bad_hash(detail: str) -> BadPassword:
    return BadPassword(detail, field="password_hash")
