"""Alive and able: what supervisors ask."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from app.config import ApiSettings
from app.main import create_app
from tests.conftest import anonymous

pytestmark = pytest.mark.asyncio


async def test_alive_and_able(api) -> None:  # type: ignore[no-untyped-def]
    async with anonymous(api) as visitor:
        for path in ("/livez", "/readyz"):
            answer = await visitor.get(path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
            assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("url", ["sqlite+aiosqlite:///{scratch}/empty.db", "mysql+asyncmy://a:b@127.0.0.1:1/x"])
async def test_without_a_schema_or_a_server_it_lives_and_is_not_able(
    key_directory: Path, scratch: Path, url: str
) -> None:
    settings = ApiSettings(
        database_url=SecretStr(url.format(scratch=scratch)),
        key_directory=key_directory,
        link_key_file=key_directory / "link.key",
        wake_directory=scratch,
    )
    api = create_app(settings)
    async with api.router.lifespan_context(api), anonymous(api) as visitor:
        assert (await visitor.get("/livez")).status_code == 200
        answer = await visitor.get("/readyz")
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/unavailable")
        assert answer.headers["retry-after"] == "1"
        assert ("cacert-mail db upgrade" in answer.json()["detail"]) == url.startswith("sqlite")
        assert str(scratch) not in answer.text
