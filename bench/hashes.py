"""Hashes passwords for so many seconds, as the API does but without HTTP, and prints how many a second."""

import asyncio
import sys
import time

from app.credentials.passwords import hash_password


async def rate(seconds: float, callers: int = 16) -> float:
    await hash_password("warm up the threads")
    started = time.perf_counter()
    done = 0

    async def call() -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await hash_password("seven green lanterns over the harbour")
            done += 1

    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.stdout.write(str(asyncio.run(rate(float(sys.argv[1])))))
