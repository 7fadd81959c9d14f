"""Made by the server, typed by people."""

import re

from app.credentials.app_passwords import ALPHABET, GROUP, GROUPS, new_app_password


def test_random_and_without_letters_that_look_alike() -> None:
    made = {new_app_password() for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(r"[a-hjkmnp-z2-9]{4}(-[a-hjkmnp-z2-9]{4}){6}", password) for password in made)
    assert {letter for password in made for letter in password} == {*ALPHABET, "-"}
    assert len(ALPHABET) == len(set(ALPHABET))
    assert len(ALPHABET) ** (GROUPS * GROUP) >= 2**128
