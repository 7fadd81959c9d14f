"""`cacert-mail api` that records no accepted change in the audit trail: what the trail costs is the difference."""

import sys
from typing import Any

import app.services.users
from app.cli.main import main


async def record_nothing(*args: Any, **options: Any) -> None: ...


if __name__ == "__main__":
    app.services.users.record_event = record_nothing
    sys.argv[1:] = ["api"]
    main()
