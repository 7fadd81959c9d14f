"""Which alias leads to which: changed by one writer at a time, never in a circle, and not too deep."""

from collections.abc import Collection, Mapping

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import AliasLoops, AliasTooDeep
from app.models.aliases import alias_destinations, aliases
from app.models.domains import domains

MAX_DEPTH = 10
"""Aliases that mail may pass through before it comes to a mailbox."""

_REACH = 1000
"""Aliases that one may lead to, or be reached through, directly or not; more is refused rather than followed."""


async def one_at_a_time(connection: AsyncConnection) -> None:
    """Waits for whoever else is changing what leads to what, or whether anything may lead elsewhere: of two changes that only
    together are wrong, one sees the other.

    A change of a row, and not merely a lock on it: on a Galera cluster locks are local to a node, and two changes of one row
    are a conflict that the later one is told of; it is tried again as a whole. With a lock on each alias of the way instead,
    eight writers were one another's deadlocks.
    """
    first = (await connection.execute(select(func.min(domains.c.id)))).scalar()
    await connection.execute(
        update(domains).where(domains.c.id == first).values(alias_changes=domains.c.alias_changes + 1)
    )


async def check_graph(connection: AsyncConnection, alias_id: int) -> None:
    """No way leads back, and none is longer than MAX_DEPTH. Raises AliasLoops and AliasTooDeep, with the chain.

    The caller has written where the alias leads, after `one_at_a_time`.
    """
    below = await _reached(connection, alias_id, down=True)
    above = await _reached(connection, alias_id, down=False)
    named = await _named(connection, {*below, *above})
    down = _longest(below, alias_id)
    if down is None:
        raise loops([named[each] for each in _way_back(below, alias_id)])
    up = _longest(above, alias_id) or [alias_id]
    chain = [named[each] for each in (*reversed(up[1:]), *down)]
    if len(chain) > MAX_DEPTH:
        raise AliasTooDeep(
            f"Mail would pass through {len(chain)} aliases, and {MAX_DEPTH} are allowed: {' → '.join(chain)}.",
            field="destinations",
            chain=chain,
        )


def loops(chain: list[str], field: str = "destinations") -> AliasLoops:
    return AliasLoops(f"Mail would go in a circle: {' → '.join(chain)}.", field=field, chain=chain)


async def _reached(connection: AsyncConnection, start: int, *, down: bool) -> dict[int, set[int]]:
    """Of every alias that is led to (or, up, that leads) from here, the next ones."""
    here, there = alias_destinations.c.alias_id, alias_destinations.c.target_alias_id
    if not down:
        here, there = there, here
    edges: dict[int, set[int]] = {}
    level = {start}
    while level:
        if len(edges) > _REACH:
            way = "It would lead to" if down else "It would be reached through"
            raise AliasTooDeep(f"{way} more than {_REACH} other aliases.", field="destinations")
        edges |= {each: set() for each in level}
        query = select(here.label("here"), there.label("there")).where(here.in_(level), there.is_not(None))
        for row in await connection.execute(query):
            edges[row.here].add(row.there)
        level = {each for found in edges.values() for each in found} - edges.keys()
    return edges


def _longest(edges: Mapping[int, Collection[int]], start: int) -> list[int] | None:
    """The longest way from here; None if one leads back to where it was."""
    done: dict[int, list[int]] = {}
    on_the_way: set[int] = set()
    stack = [(start, False)]
    while stack:
        node, seen = stack.pop()
        if seen:
            on_the_way.discard(node)
            done[node] = [node, *max((done[each] for each in edges[node]), key=len, default=[])]
            continue
        if node in done:
            continue
        if node in on_the_way:
            return None
        on_the_way.add(node)
        stack.append((node, True))
        for each in edges[node]:
            if each in on_the_way:
                return None
            stack.append((each, False))
    return done[start]


def _way_back(edges: Mapping[int, Collection[int]], start: int) -> list[int]:
    """A shortest way from here to here."""
    ways = [[start]]
    seen: set[int] = set()
    for way in ways:  # grows while it is walked
        for each in sorted(edges[way[-1]]):
            if each == start:
                return [*way, start]
            if each not in seen:
                seen.add(each)
                ways.append([*way, each])
    return [start]


async def _named(connection: AsyncConnection, ids: Collection[int]) -> dict[int, str]:
    rows = await connection.execute(select(aliases.c.id, aliases.c.address).where(aliases.c.id.in_(ids)))
    return {row.id: row.address for row in rows}
