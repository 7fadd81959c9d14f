import base64
import hashlib
import hmac
import json
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from jose import jws, jwt  # type: ignore[import-untyped]  # python-jose carries no types
from jose.exceptions import JOSEError  # type: ignore[import-untyped]  # python-jose carries no types

from app.credentials import tokens
from app.credentials.tokens import Claims, KeysUnusable, TokenKeys
from app.errors import Unauthenticated

ISSUER = "https://mail.example.org"
AUDIENCE = "https://mail.example.org/v1"
NOW = datetime(2026, 11, 23, 17, 0, tzinfo=UTC)
IAT = int(NOW.timestamp())


@dataclass(frozen=True)
class Ring:
    """A directory with two keys, and the keys, so that tests can sign what `issue` never would."""

    directory: Path
    old_kid: str
    kid: str
    keys: dict[str, rsa.RSAPrivateKey]

    @property
    def private(self) -> rsa.RSAPrivateKey:
        return self.keys[self.kid]

    def public(self, encoding: serialization.Encoding) -> bytes:
        return self.private.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_key(path: Path) -> rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Ring:
    directory = tmp_path_factory.mktemp("state") / "keys"
    old = tokens.create_signing_key(directory, now=NOW - timedelta(days=1))
    new = tokens.create_signing_key(directory, now=NOW)
    return Ring(directory, old, new, {kid: read_key(directory / f"{kid}.pem") for kid in (old, new)})


@pytest.fixture(scope="module")
def stranger() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
def keys(ring: Ring) -> TokenKeys:
    """What `load_keys` makes, without the 0.1 s that OpenSSL takes to check each key."""
    return TokenKeys(ring.keys)


def verify(keys: TokenKeys, token: str, now: datetime = NOW) -> Claims:
    return keys.verify(token, issuer=ISSUER, audience=AUDIENCE, now=now)


def issue(keys: TokenKeys, scope: frozenset[str] | None = None, now: datetime = NOW) -> str:
    return keys.issue("principal-1", key_id=3, scope=scope, issuer=ISSUER, audience=AUDIENCE, now=now)[0]


# --- what is issued


def test_an_issued_token_verifies(keys: TokenKeys) -> None:
    token, expires_in = keys.issue("principal-1", key_id=3, scope=None, issuer=ISSUER, audience=AUDIENCE, now=NOW)
    assert expires_in == 600
    claims = verify(keys, token)
    assert claims.subject == "principal-1"
    assert claims.scope is None
    assert claims.issued_at == NOW
    assert claims.expires_at == NOW + timedelta(seconds=600)
    assert len(claims.token_id) >= 22
    with pytest.raises(FrozenInstanceError):
        claims.subject = "principal-2"  # type: ignore[misc]  # the point of the test


def test_two_tokens_of_one_second_differ(keys: TokenKeys) -> None:
    assert verify(keys, issue(keys)).token_id != verify(keys, issue(keys)).token_id


def test_the_form_is_rfc_9068(keys: TokenKeys, ring: Ring) -> None:
    token = issue(keys, frozenset({"users:write", "jobs:read"}))
    assert jws.get_unverified_header(token) == {"alg": "RS256", "typ": "at+jwt", "kid": ring.kid}
    claims = jwt.get_unverified_claims(token)
    assert claims.keys() == {"iss", "aud", "sub", "client_id", "jti", "iat", "exp", "key", "generation", "scope"}
    assert claims["scope"] == "jobs:read users:write"
    assert claims["client_id"] == claims["sub"]


@pytest.mark.parametrize("scope", [None, frozenset(), frozenset({"a:b"}), frozenset({"users:read", "users:write"})])
def test_a_scope_comes_back_and_an_empty_one_is_not_none(keys: TokenKeys, scope: frozenset[str] | None) -> None:
    assert verify(keys, issue(keys, scope)).scope == scope


@pytest.mark.parametrize("scope", ["a b", "", 'a"b', "a\\b", "ä", "a\n"])
def test_a_scope_that_cannot_be_read_back_is_not_issued(keys: TokenKeys, scope: str) -> None:
    with pytest.raises(ValueError, match="scope"):
        issue(keys, frozenset({scope, "users:read"}))


def test_a_naive_clock_is_a_mistake_of_the_caller(keys: TokenKeys) -> None:
    with pytest.raises(ValueError, match="aware"):
        issue(keys, now=NOW.replace(tzinfo=None))
    with pytest.raises(ValueError, match="aware"):
        verify(keys, issue(keys), NOW.replace(tzinfo=None))


def test_the_newest_key_signs_and_the_older_still_verifies(tmp_path: Path, ring: Ring, keys: TokenKeys) -> None:
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    name = f"{ring.old_kid}.pem"
    (directory / name).touch(0o600)
    (directory / name).write_bytes((ring.directory / name).read_bytes())
    before = issue(tokens.load_keys(directory))
    assert jws.get_unverified_header(before)["kid"] == ring.old_kid
    assert verify(keys, before).subject == "principal-1"
    with pytest.raises(Unauthenticated):
        verify(tokens.load_keys(directory), issue(keys))


def test_jwks_is_public_and_verifies(keys: TokenKeys, ring: Ring) -> None:
    jwks = keys.jwks()
    assert [key["kid"] for key in jwks["keys"]] == [ring.old_kid, ring.kid]
    for key in jwks["keys"]:
        assert key.keys() == {"kty", "n", "e", "alg", "use", "kid"}
        assert (key["kty"], key["e"], key["alg"], key["use"]) == ("RSA", "AQAB", "RS256", "sig")
    jws.verify(issue(keys), jwks["keys"][1], algorithms=["RS256"])
    jwks["keys"].clear()
    assert len(keys.jwks()["keys"]) == 2


# --- time, and what is remembered


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize(
    ("seconds", "good"), [(-31, False), (-30, True), (0, True), (599.999, True), (600, False), (10**9, False)]
)
def test_times_hold_for_new_and_remembered_tokens(
    keys: TokenKeys, remembered: bool, seconds: float, good: bool
) -> None:
    token = issue(keys)
    if remembered:
        verify(keys, token)
    if good:
        verify(keys, token, NOW + timedelta(seconds=seconds))
    else:
        with pytest.raises(Unauthenticated):
            verify(keys, token, NOW + timedelta(seconds=seconds))


def count_signatures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = jws.verify

    def counting(token: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(token)
        return original(token, *args, **kwargs)

    monkeypatch.setattr(jws, "verify", counting)
    return seen


def test_a_second_verify_costs_no_rsa(keys: TokenKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = count_signatures(monkeypatch)
    token = issue(keys)
    assert verify(keys, token) == verify(keys, token)
    assert checked == [token]


def test_a_remembered_token_is_not_good_for_others(keys: TokenKeys) -> None:
    token = issue(keys)
    verify(keys, token)
    with pytest.raises(Unauthenticated):
        keys.verify(token, issuer=ISSUER, audience="https://other.example.org", now=NOW)
    with pytest.raises(Unauthenticated):
        keys.verify(token, issuer="https://other.example.org", audience=AUDIENCE, now=NOW)


def test_what_was_refused_is_not_remembered(keys: TokenKeys) -> None:
    token = issue(keys)
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            verify(keys, token[:-8] + "AAAAAAAA")
    assert len(keys._verified) == 0


def test_the_memory_is_bounded_and_drops_the_longest_unused(keys: TokenKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 2)
    one, two, three = issue(keys), issue(keys), issue(keys)
    for token in (one, two, one, three):
        verify(keys, token)
    checked = count_signatures(monkeypatch)
    verify(keys, one)
    verify(keys, three)
    assert checked == []
    verify(keys, two)
    assert checked == [two]
    assert len(keys._verified) == 2


def test_an_expired_token_is_forgotten(keys: TokenKeys) -> None:
    token = issue(keys)
    verify(keys, token)
    with pytest.raises(Unauthenticated):
        verify(keys, token, NOW + timedelta(seconds=600))
    assert len(keys._verified) == 0


# --- hostile tokens


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def good_header(ring: Ring) -> dict[str, Any]:
    return {"alg": "RS256", "typ": "at+jwt", "kid": ring.kid}


def good_claims() -> dict[str, Any]:
    times = {"iat": IAT, "exp": IAT + 600}
    names = {"sub": "p-1", "client_id": "p-1", "jti": "t-1"}
    return {"iss": ISSUER, "aud": AUDIENCE, **names, **times, "key": 1, "generation": 1, "scope": "a b"}


def rs256(key: rsa.RSAPrivateKey) -> Callable[[bytes], bytes]:
    return lambda message: key.sign(message, padding.PKCS1v15(), hashes.SHA256())


def compact(header: bytes | str, claims: bytes | str, sign: Callable[[bytes], bytes]) -> str:
    parts = [part.encode() if isinstance(part, str) else part for part in (header, claims)]
    message = b64(parts[0]) + "." + b64(parts[1])
    return message + "." + b64(sign(message.encode()))


def with_header(ring: Ring, *, drop: str = "", sign: Callable[[bytes], bytes] | None = None, **members: Any) -> str:
    header = {name: value for name, value in (good_header(ring) | members).items() if name != drop}
    return compact(json.dumps(header), json.dumps(good_claims()), sign or rs256(ring.private))


def with_claims(ring: Ring, *, drop: str = "", **members: Any) -> str:
    claims = {name: value for name, value in (good_claims() | members).items() if name != drop}
    return compact(json.dumps(good_header(ring)), json.dumps(claims), rs256(ring.private))


def raw(ring: Ring, claims: bytes | str, header: bytes | str | None = None) -> str:
    return compact(json.dumps(good_header(ring)) if header is None else header, claims, rs256(ring.private))


def edited(ring: Ring, old: str, new: str) -> str:
    text = json.dumps(good_claims())
    assert text.count(old) == 1
    return raw(ring, text.replace(old, new))


def edited_header(ring: Ring, old: str, new: str) -> str:
    text = json.dumps(good_header(ring))
    assert text.count(old) == 1
    return raw(ring, json.dumps(good_claims()), text.replace(old, new))


def hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda message: hmac.digest(secret, message, "sha256")


def pss(ring: Ring) -> Callable[[bytes], bytes]:
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
    return lambda message: ring.private.sign(message, scheme, hashes.SHA256())


def ecdsa(message: bytes) -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).sign(message, ec.ECDSA(hashes.SHA256()))


def signed(ring: Ring) -> str:
    return with_claims(ring)


def replaced(token: str, number: int, text: str) -> str:
    parts = token.split(".")
    parts[number] = text
    return ".".join(parts)


def embedded(ring: Ring, key: rsa.RSAPrivateKey) -> str:
    jwk = {**tokens._public_jwk(key), "alg": "RS256"}
    return with_header(ring, jwk=jwk, sign=rs256(key))


ACCEPTS, CRASHES, REFUSES = "accepts", "crashes", "refuses"
"""What python-jose 3.5 does when it is used carelessly. CRASHES: it raises what is no JOSEError, so a 500."""

Make = Callable[[Ring, rsa.RSAPrivateKey], str]
CORPUS: dict[str, tuple[str, Make, str]] = {}
"""Name: which key a careless caller would take, the token, and what python-jose does with it."""


def hostile(name: str, make: Make, does: str, key: str = "pem") -> None:
    assert name not in CORPUS
    CORPUS[name] = (key, make, does)


def claims(**members: Any) -> Make:
    return lambda ring, _: with_claims(ring, **members)


def header(**members: Any) -> Make:
    return lambda ring, _: with_header(ring, **members)


def by(sign: Callable[[Ring], Callable[[bytes], bytes]], **members: Any) -> Make:
    return lambda ring, _: with_header(ring, sign=sign(ring), **members)


def claims_text(text: bytes | str) -> Make:
    return lambda ring, _: raw(ring, text)


def header_text(text: bytes | str) -> Make:
    return lambda ring, _: raw(ring, json.dumps(good_claims()), text)


def in_claims(old: str, new: str) -> Make:
    return lambda ring, _: edited(ring, old, new)


def in_header(old: str, new: str) -> Make:
    return lambda ring, _: edited_header(ring, old, new)


def altered(change: Callable[[str], str]) -> Make:
    return lambda ring, _: change(signed(ring))


def rs512(ring: Ring) -> Callable[[bytes], bytes]:
    return lambda message: ring.private.sign(message, padding.PKCS1v15(), hashes.SHA512())


def hmac_by(encoding: serialization.Encoding) -> Callable[[Ring], Callable[[bytes], bytes]]:
    return lambda ring: hs256(ring.public(encoding))


GOOD = json.dumps(good_claims())
EXP = f'"exp": {IAT + 600}'
EVIL = "https://evil.example"

WITHOUT = {"iat": CRASHES, "exp": CRASHES, "generation": ACCEPTS, "key": ACCEPTS, "client_id": ACCEPTS}
for claim in ("iss", "aud", "sub", "jti", "iat", "exp", "generation", "key", "client_id"):
    hostile(f"no {claim}", claims(drop=claim), REFUSES if claim == "iss" else ACCEPTS)
    hostile(f"{claim} null", claims(**{claim: None}), WITHOUT.get(claim, REFUSES))
for claim in ("iss", "aud", "sub", "jti"):
    hostile(f"{claim} a number", claims(**{claim: 7}), REFUSES)
    hostile(f"{claim} an object", claims(**{claim: {}}), REFUSES)
    hostile(f"{claim} empty", claims(**{claim: ""}), REFUSES if claim in ("iss", "aud") else ACCEPTS)
    hostile(f"{claim} long", claims(**{claim: "x" * 256}), REFUSES if claim in ("iss", "aud") else ACCEPTS)
hostile("another issuer", claims(iss=EVIL), REFUSES)
hostile("another audience", claims(aud=EVIL), REFUSES)
hostile("audience in a list", claims(aud=[AUDIENCE]), ACCEPTS)
hostile("audience among others", claims(aud=[AUDIENCE, EVIL]), ACCEPTS)
hostile("another client", claims(client_id="p-2"), ACCEPTS)
hostile("scope a list", claims(scope=["a"]), ACCEPTS)
hostile("scope null", claims(scope=None), ACCEPTS)
hostile("scope two blanks", claims(scope="a  b"), ACCEPTS)
hostile("scope with line end", claims(scope="a b\n"), ACCEPTS)
hostile("scope long", claims(scope="a" * 2049), ACCEPTS)
for generation in (-1, True, "1", 1.0, []):
    hostile(f"generation {generation!r}", claims(generation=generation), ACCEPTS)
    hostile(f"key {generation!r}", claims(key=generation), ACCEPTS)
for subject in ("owner-", "owner-0", "owner-01", "owner-1x", "owner-1\n", "owner-٣", "owner-1234567890123456789"):
    hostile(f"subject {subject!r}", claims(sub=subject), ACCEPTS)
for cnf in (None, "", [], {}, {"jkt": "x"}, {"x5t#S256": 1}, {"x5t#S256": "AAAA"}, {"x5t#S256": "A" * 43, "jkt": "x"}):
    hostile(f"cnf {cnf!r}", claims(cnf=cnf), ACCEPTS)
hostile("nbf", claims(nbf=IAT), ACCEPTS)

hostile("iat in the future", claims(iat=IAT + 31, exp=IAT + 600), ACCEPTS)
hostile("expired", claims(iat=IAT - 700, exp=IAT - 100), REFUSES)
hostile("expires now", claims(iat=IAT - 600, exp=IAT), ACCEPTS)
hostile("lifetime too long", claims(exp=IAT + 601), ACCEPTS)
hostile("lifetime of years", claims(exp=IAT + 10**9), ACCEPTS)
hostile("exp before iat", claims(iat=IAT + 20, exp=IAT + 10), ACCEPTS)
hostile("exp is iat", claims(iat=IAT + 20, exp=IAT + 20), ACCEPTS)
hostile("exp a string", claims(exp=str(IAT + 600)), ACCEPTS)
hostile("exp a float", claims(exp=IAT + 600.0), ACCEPTS)
hostile("exp a boolean", claims(exp=True), REFUSES)
hostile("exp a list", claims(exp=[IAT + 600]), CRASHES)
hostile("exp 1e400", in_claims(EXP, '"exp": 1e400'), CRASHES)
hostile("exp -1e400", in_claims(EXP, '"exp": -1e400'), CRASHES)
hostile("exp Infinity", in_claims(EXP, '"exp": Infinity'), CRASHES)
hostile("exp NaN", in_claims(EXP, '"exp": NaN'), REFUSES)
hostile("NaN elsewhere", in_claims('"a b"', '"a b", "x": NaN'), ACCEPTS)
hostile("exp huge", claims(exp=10**300), ACCEPTS)
hostile("iat and exp huge", claims(iat=10**300, exp=10**300 + 600), ACCEPTS)
hostile("iat and exp beyond the year 9999", claims(iat=10**15, exp=10**15 + 600), ACCEPTS)
hostile("exp of 5000 digits", in_claims(EXP, '"exp": 1' + "0" * 5000), REFUSES)
hostile("iat a string", claims(iat=str(IAT)), ACCEPTS)
hostile("iat a float", claims(iat=float(IAT)), ACCEPTS)
hostile("iat a boolean", claims(iat=True), ACCEPTS)
hostile("iat and exp small", claims(iat=True, exp=600), REFUSES)
hostile("iat 1e400", in_claims(f'"iat": {IAT}', '"iat": 1e400'), CRASHES)

hostile("alg none", by(lambda _: lambda m: b"", alg="none"), REFUSES)
hostile("alg None", by(lambda _: lambda m: b"x", alg="None"), REFUSES)
hostile("alg missing", header(drop="alg"), REFUSES)
hostile("alg a list", header(alg=["RS256"]), CRASHES)
hostile("alg lower case", header(alg="rs256"), REFUSES)
hostile("HS256 by the DER key", by(hmac_by(serialization.Encoding.DER), alg="HS256"), ACCEPTS, "der")
hostile("HS256 by the PEM key", by(hmac_by(serialization.Encoding.PEM), alg="HS256"), REFUSES)
hostile("HS256 by an empty key", by(lambda _: hs256(b""), alg="HS256"), ACCEPTS, "empty")
hostile("HS256 by one byte", by(lambda _: hs256(b"k"), alg="HS256"), ACCEPTS, "byte")
hostile("RS512", by(rs512, alg="RS512"), ACCEPTS)
hostile("RS512 said to be RS256", by(rs512), REFUSES)
hostile("PS256", by(pss, alg="PS256"), REFUSES)
hostile("PS256 said to be RS256", by(pss), REFUSES)
hostile("ES256", by(lambda _: ecdsa, alg="ES256"), REFUSES)
hostile("another key with our kid", lambda ring, stranger: with_header(ring, sign=rs256(stranger)), REFUSES)
hostile("our other key", lambda ring, _: with_header(ring, kid=ring.old_kid), ACCEPTS)

hostile("no kid", header(drop="kid"), ACCEPTS)
KIDS: tuple[object, ...] = ("", "unknown", "../../etc/passwd", "/dev/null", 7, True, None, [], {}, 1.5)
for kid in KIDS:
    hostile(f"kid {kid!r}", header(kid=kid), ACCEPTS)
hostile("kid in a list", lambda ring, _: with_header(ring, kid=[ring.kid]), ACCEPTS)
hostile("kid with .pem", lambda ring, _: with_header(ring, kid=f"{ring.kid}.pem"), ACCEPTS)
hostile("unknown crit", header(crit=["exp"]), ACCEPTS)
hostile("empty crit", header(crit=[]), ACCEPTS)
hostile("crit a string", header(crit="exp"), ACCEPTS)
hostile("b64", header(crit=["b64"], b64=False), ACCEPTS)
hostile("no typ", header(drop="typ"), ACCEPTS)
TYPES: tuple[object, ...] = ("JWT", "", "at+jwt ", "text/at+jwt", "application/application/at+jwt", None, 7, ["at+jwt"])
for typ in TYPES:
    hostile(f"typ {typ!r}", header(typ=typ), ACCEPTS)
hostile("jwk of another key", embedded, REFUSES)
hostile("jwk of our key", lambda ring, _: embedded(ring, ring.private), ACCEPTS)
for name in ("jku", "x5u", "x5t", "cty", "zip", "x"):
    hostile(name, header(**{name: f"{EVIL}/keys"}), ACCEPTS)
hostile("x5c", header(x5c=["AAAA"]), ACCEPTS)

hostile("sub twice", in_claims('"sub": "p-1"', '"sub": "admin", "sub": "p-1"'), ACCEPTS)
hostile("member twice below", in_claims('"a b"', '"a b", "x": [{"a": 1, "a": 1}]'), ACCEPTS)
hostile("alg twice", in_header('"alg": "RS256"', '"alg": "none", "alg": "RS256"'), ACCEPTS)
hostile("kid twice", in_header('"typ"', '"kid": "x", "typ"'), ACCEPTS)
hostile("deep claims", in_claims('"a b"', '"a b", "x": ' + "[" * 2000 + "]" * 2000), CRASHES)
hostile("deep header", header_text("[" * 5000), CRASHES)
for text in ("[]", "null", "7", '"x"', "", "{", "{} {}", "{'a': 1}"):
    hostile(f"claims {text!r}", claims_text(text), REFUSES)
    hostile(f"header {text!r}", header_text(text), REFUSES)
hostile("claims not UTF-8", claims_text(GOOD[:-1].encode() + b', "x": "\xff"}'), REFUSES)
hostile("claims in UTF-16", claims_text(GOOD.encode("utf-16")), REFUSES)
hostile("claims with a BOM", claims_text(b"\xef\xbb\xbf" + GOOD.encode()), REFUSES)
hostile("header not UTF-8", header_text(b'{"alg": "RS256\xff"}'), REFUSES)

hostile("truncated signature", altered(lambda t: t[:-4]), REFUSES)
hostile("no signature", altered(lambda t: replaced(t, 2, "")), REFUSES)
hostile("zero signature", altered(lambda t: replaced(t, 2, b64(bytes(384)))), REFUSES)
hostile("claims changed", altered(lambda t: replaced(t, 1, b64(GOOD.replace("p-1", "p-2").encode()))), REFUSES)
hostile("four parts", altered(lambda t: t + ".AAAA"), REFUSES)
hostile("two parts", altered(lambda t: t.rpartition(".")[0]), REFUSES)
hostile("one part", altered(lambda t: "abc"), REFUSES)
hostile("empty", altered(lambda t: ""), REFUSES)
hostile("dots", altered(lambda t: ".."), REFUSES)
hostile("a blank before", altered(lambda t: " " + t), REFUSES)
hostile("a blank after", altered(lambda t: t + " "), ACCEPTS)
hostile("a line end after", altered(lambda t: t + "\n"), ACCEPTS)
hostile("padding", altered(lambda t: t + "="), ACCEPTS)
hostile("other base64", altered(lambda t: t + "!!!!"), ACCEPTS)
hostile("non-ASCII after", altered(lambda t: t + "ä"), ACCEPTS)
hostile("non-ASCII", altered(lambda t: "ä.ö.ü"), REFUSES)
hostile("a surrogate", altered(lambda t: t + "\ud800"), CRASHES)
hostile("NUL", altered(lambda t: t + "\0"), ACCEPTS)
hostile("1 MiB", claims(x="x" * 786_432), ACCEPTS)
hostile("more than 8 KiB", lambda ring, _: of_length(ring, tokens.LONGEST + 1), ACCEPTS)


def of_length(ring: Ring, least: int) -> str:
    """Return a token with one claim more, of this length or one or two characters above."""
    short = with_claims(ring, x="")
    token = next(
        t for n in range(4) if len(t := with_claims(ring, x="x" * ((least - len(short)) * 3 // 4 + n))) >= least
    )
    assert len(token) <= least + 2
    return token


def test_a_long_token_is_good_while_it_is_not_too_long(keys: TokenKeys, ring: Ring) -> None:
    token = of_length(ring, tokens.LONGEST - 2)
    assert verify(keys, token).subject == "p-1"


class Stopped(datetime):
    """The clock that python-jose reads: it has none to inject."""

    @classmethod
    def now(cls, tz: Any = None) -> "Stopped":
        return cls.fromtimestamp(IAT, tz)


def careless(ring: Ring, key: str, token: str) -> str:
    """Do what a reader of python-jose's own examples might: no algorithm named, nothing required, one key."""
    material: dict[str, bytes] = {
        "pem": ring.public(serialization.Encoding.PEM),
        "der": ring.public(serialization.Encoding.DER),
        "empty": b"",
        "byte": b"k",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jwt, "datetime", Stopped)
            jwt.decode(token, material[key], algorithms=None, audience=AUDIENCE, issuer=ISSUER)
    except JOSEError:
        return REFUSES
    except Exception:
        return CRASHES
    return ACCEPTS


def test_the_corpus_differs_from_a_good_token_in_one_thing(keys: TokenKeys, ring: Ring) -> None:
    assert verify(keys, signed(ring)).subject == "p-1"
    assert verify(keys, with_header(ring)).scope == frozenset("ab")
    assert verify(keys, raw(ring, json.dumps(good_claims()))).token_id == good_claims()["jti"]
    assert careless(ring, "pem", signed(ring)) == ACCEPTS


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"])
def test_typ_in_all_its_writings(keys: TokenKeys, ring: Ring, typ: str) -> None:
    assert verify(keys, with_header(ring, typ=typ)).subject == "p-1"


def test_unknown_claims_are_ignored_and_scope_may_be_left_out(keys: TokenKeys, ring: Ring) -> None:
    assert verify(keys, with_claims(ring, x={"y": [1.5, None]}, drop="scope")).scope is None
    assert verify(keys, with_claims(ring, client_id="p-1")).subject == "p-1"


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_tokens_are_refused_in_the_same_words(
    keys: TokenKeys, ring: Ring, stranger: rsa.RSAPrivateKey, name: str
) -> None:
    token = CORPUS[name][1](ring, stranger)
    for _ in range(2):
        with pytest.raises(Unauthenticated) as caught:
            verify(keys, token)
        error = caught.value
        assert type(error) is Unauthenticated
        assert (error.detail, error.members) == (tokens._DETAIL, {})
        assert error.__cause__ is None
        assert error.__suppress_context__
    assert len(keys._verified) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CORPUS)
def test_what_python_jose_does_with_them(ring: Ring, stranger: rsa.RSAPrivateKey, name: str) -> None:
    """So that the corpus cannot go stale unseen: a change here says what a new release of python-jose does."""
    key, make, does = CORPUS[name]
    assert careless(ring, key, make(ring, stranger)) == does


def test_true_is_no_number(keys: TokenKeys, ring: Ring) -> None:
    early = datetime.fromtimestamp(2, UTC)
    assert verify(keys, with_claims(ring, iat=1, exp=600), early).issued_at == datetime.fromtimestamp(1, UTC)
    with pytest.raises(Unauthenticated):
        verify(keys, with_claims(ring, iat=True, exp=600), early)


@pytest.mark.parametrize("token", [None, b"a.b.c", 7, ["a.b.c"], object()])
def test_what_is_no_text_is_refused(keys: TokenKeys, token: Any) -> None:
    with pytest.raises(Unauthenticated):
        verify(keys, token)


# --- the key directory


def test_key_files_are_private_and_nothing_is_left_beside_them(ring: Ring) -> None:
    assert ring.directory.stat().st_mode & 0o7777 == 0o700
    files = sorted(ring.directory.iterdir())
    assert [file.name for file in files] == [f"{ring.old_kid}.pem", f"{ring.kid}.pem"]
    assert {file.stat().st_mode & 0o7777 for file in files} == {0o600}
    assert files[0].read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")  # PKCS#8
    assert ring.private.key_size >= 3072


def test_a_kid_holds_the_time_and_the_thumbprint(ring: Ring, keys: TokenKeys) -> None:
    jwk = keys.jwks()["keys"][1]
    canonical = f'{{"e":"{jwk["e"]}","kty":"RSA","n":"{jwk["n"]}"}}'
    thumbprint = b64(hashlib.sha256(canonical.encode()).digest())
    assert ring.kid == f"{NOW:%Y%m%dT%H%M%S}000000Z-{thumbprint[:16]}"


def test_rfc_7638_example() -> None:
    """Section 3.1: the number that the RFC gives, by the same JSON as in create_signing_key."""
    n = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs"
        "tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5haj"
        "rn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    assert tokens._base64url_number(int.from_bytes(base64.urlsafe_b64decode(n + "=="), "big")) == n
    canonical = json.dumps({"kty": "RSA", "n": n, "e": "AQAB"}, sort_keys=True, separators=(",", ":")).encode()
    assert b64(hashlib.sha256(canonical).digest()) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


@pytest.fixture
def own(tmp_path: Path, ring: Ring) -> Path:
    """A copy of the directory that a test may spoil."""
    directory = tmp_path / "keys"
    directory.mkdir(mode=0o700)
    for kid in (ring.old_kid, ring.kid):
        (directory / f"{kid}.pem").touch(0o600)
        (directory / f"{kid}.pem").write_bytes((ring.directory / f"{kid}.pem").read_bytes())
    return directory


def put(directory: Path, content: bytes, name: str = "20260101T000000000000Z-aaaaaaaaaaaaaaaa.pem") -> None:
    (directory / name).touch(0o600)
    (directory / name).write_bytes(content)


def pkcs8(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, passphrase: bytes | None = None
) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666])
def test_a_key_that_others_may_read_or_write_is_refused(own: Path, ring: Ring, mode: int) -> None:
    (own / f"{ring.old_kid}.pem").chmod(mode)
    with pytest.raises(KeysUnusable, match="others than its owner") as caught:
        tokens.load_keys(own)
    assert "cacert-mail keys create" in str(caught.value)
    assert ring.old_kid in str(caught.value)


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o770, 0o777])
def test_a_directory_that_others_may_enter_is_refused(own: Path, mode: int) -> None:
    own.chmod(mode)
    for use in (tokens.load_keys, tokens.load_request_key, tokens.create_signing_key, tokens.create_request_key):
        with pytest.raises(KeysUnusable, match="owner alone"):
            use(own)


def test_keys_that_are_none(own: Path, stranger: rsa.RSAPrivateKey) -> None:
    bits = 1024
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    public = stranger.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    others = (pkcs8(ec.generate_private_key(ec.SECP256R1())), pkcs8(ed25519.Ed25519PrivateKey.generate()))
    for content in (pkcs8(short), *others, pkcs8(stranger, b"secret"), public, b"", b"\xff" * 100):
        put(own, content)
        with pytest.raises(KeysUnusable, match="cacert-mail keys create"):
            tokens.load_keys(own)
    put(own, pkcs8(stranger))
    assert len(tokens.load_keys(own).jwks()["keys"]) == 3


def test_a_name_without_a_time_is_refused(own: Path, stranger: rsa.RSAPrivateKey) -> None:
    put(own, pkcs8(stranger), "zzz.pem")
    with pytest.raises(KeysUnusable, match=r"zzz\.pem"):
        tokens.load_keys(own)


def test_no_keys_at_all(tmp_path: Path, own: Path) -> None:
    for use in (tokens.load_keys, tokens.load_request_key):
        with pytest.raises(KeysUnusable, match="No such file"):
            use(tmp_path / "missing")
    for file in own.iterdir():
        file.unlink()
    with pytest.raises(KeysUnusable, match="no signing key"):
        tokens.load_keys(own)


def test_what_a_crash_left_is_ignored(own: Path, ring: Ring) -> None:
    put(own, b"half a k", f".{ring.kid}.pem.0123456789abcdef")
    put(own, b"half a k", ".half.pem")
    assert len(tokens.load_keys(own).jwks()["keys"]) == 2


def test_a_key_is_never_overwritten(own: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ring.private
    monkeypatch.setattr(rsa, "generate_private_key", lambda **_: key)
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    with pytest.raises(FileExistsError):
        tokens.create_signing_key(own, now=NOW)
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before


def test_a_failed_write_leaves_nothing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name for file in own.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        tokens.create_request_key(own)
    assert {file.name for file in own.iterdir()} == before


def test_the_request_key(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    assert tokens.create_request_key(directory)
    key = tokens.load_request_key(directory)
    assert len(key) == 32
    assert not tokens.create_request_key(directory)
    assert tokens.load_request_key(directory) == key
    file = directory / "request.key"
    assert file.stat().st_mode & 0o7777 == 0o600
    assert list(directory.iterdir()) == [file]
    file.write_bytes(key[:31])
    with pytest.raises(KeysUnusable, match="32 bytes"):
        tokens.load_request_key(directory)
    file.write_bytes(key)
    file.chmod(0o640)
    with pytest.raises(KeysUnusable, match="others"):
        tokens.load_request_key(directory)


# --- client secrets


def test_client_secrets() -> None:
    secret = tokens.client_secret()
    assert secret != tokens.client_secret()
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    stored = tokens.hash_secret(secret)
    assert stored == hashlib.sha256(secret.encode()).hexdigest()
    assert tokens.secret_matches(secret, stored)
    assert not tokens.secret_matches(secret + "x", stored)
    assert not tokens.secret_matches(secret, stored[:-1])
    for nothing in (None, "", "0" * 64, "ä", "\ud800"):
        assert not tokens.secret_matches(secret, nothing)
        assert not tokens.secret_matches("\ud800 ä", nothing)


def test_an_unknown_client_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def recording(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return True

    monkeypatch.setattr("hmac.compare_digest", recording)
    assert not tokens.secret_matches("secret", None)
    assert tokens.secret_matches("secret", tokens.hash_secret("secret"))
    assert compared == [(64, 64), (64, 64)]
