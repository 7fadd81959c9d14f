"""The column types that differ between SQLite and MariaDB, in one place.

SECURITY: loaded by the worker (root). Types only; nothing here reads or writes.
"""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlmodel.sql.sqltypes import UTCDateTime

METADATA_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
}
"""Every constraint has a name that both databases report alike. Primary keys have none on MariaDB."""


class Timestamp(UTCDateTime):
    """A point in time, aware, UTC, to the microsecond. SQLModel's own type drops the microseconds on MariaDB."""

    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        """MariaDB's driver gives datetimes, which only lack their zone: this is read more often than anything else."""
        if dialect.name not in ("mysql", "mariadb"):
            return super().result_processor(dialect, coltype)
        return lambda value: None if value is None else value.replace(tzinfo=UTC)

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(sa.DateTime())

    def __repr__(self) -> str:
        return "Timestamp()"


def ascii_string(length: int) -> sa.types.TypeEngine[str]:
    """Plain ASCII, compared byte by byte. `nopad` keeps trailing blanks apart, which `ascii_bin` does not."""
    column = mysql.VARCHAR(length, charset="ascii", collation="ascii_nopad_bin")
    return sa.String(length).with_variant(column, "mysql", "mariadb")


def text_string(length: int) -> sa.types.TypeEngine[str]:
    """Any Unicode, compared byte by byte."""
    column = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    return sa.String(length).with_variant(column, "mysql", "mariadb")


def big_integer() -> sa.types.TypeEngine[int]:
    """64 bits. SQLite numbers a key by itself only when it is called INTEGER."""
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def key() -> "sa.Column[int]":
    return sa.Column(big_integer(), primary_key=True, autoincrement=True)


def timestamp(**options: Any) -> "sa.Column[datetime]":
    return sa.Column(Timestamp(), **options)


def one_of(name: str, column: str, values: Any) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=name)


TABLE = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_nopad_bin",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_nopad_bin",
    "sqlite_autoincrement": True,  # an id is never used again, also on SQLite
}
