"""The key of the links, and what is made with it."""

import base64
import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest

from app.credentials.links import create_link_key, link_token, load_link_key, token_hash
from app.credentials.tokens import KeysUnusable


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_key_is_made_once_for_owner_and_group(scratch: Path, umask: int) -> None:
    path = scratch / "link.key"
    before = os.umask(umask)
    try:
        assert create_link_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    key = load_link_key(path)
    assert len(key) == 32
    assert not create_link_key(path)
    assert load_link_key(path) == key
    assert [each.name for each in scratch.iterdir()] == ["link.key"]


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602, 0o604])
def test_a_key_that_others_may_know_is_not_used(scratch: Path, mode: int) -> None:
    path = scratch / "link.key"
    create_link_key(path)
    path.chmod(mode)
    with pytest.raises(KeysUnusable, match="may be known"):
        load_link_key(path)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_another_length_is_not_used(scratch: Path, content: bytes) -> None:
    path = scratch / "link.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeysUnusable, match="32 bytes"):
        load_link_key(path)


def test_a_missing_key_says_what_makes_one(scratch: Path) -> None:
    with pytest.raises(KeysUnusable, match="cacert-mail keys create"):
        load_link_key(scratch / "link.key")


def test_the_token_is_an_hmac_of_the_id() -> None:
    key = bytes(range(32))
    token = link_token(key, 17)
    raw = base64.urlsafe_b64decode(token + "=")
    assert raw == hmac.new(key, b"password-reset:17", hashlib.sha256).digest()
    assert len(raw) * 8 == 256
    assert token_hash(token) == hashlib.sha256(token.encode()).hexdigest()
    assert link_token(key, 17) == token
    assert len({link_token(key, 18), link_token(bytes(32), 17), token}) == 3
