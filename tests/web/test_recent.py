"""Answers of a moment ago."""

from app.web import recent
from app.web.recent import Made, Recent


def test_after_a_second_it_is_forgotten() -> None:
    now = 10.0
    kept = Recent(lambda: now)
    began = kept.now()
    now += 0.4  # reading took so long, and what was read may have been changed since
    kept.put("a", Made('"1"', b"x"), began)
    now += 0.6
    assert kept.get("a") == Made('"1"', b"x")
    now += 0.01
    assert kept.get("a") is None
    assert kept.get("b") is None


def test_the_oldest_make_room() -> None:
    kept = Recent(lambda: 0.0)
    for number in range(recent.MOST + 5):
        kept.put(str(number), Made('"1"', b""), 0.0)
    assert kept.get("4") is None
    assert kept.get("5") is not None
    assert len(kept._made) == recent.MOST
