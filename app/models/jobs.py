"""The queue's table, and what was made true.

A job says where to look, never what to do: a kind and an id, no path, no command, no secret. The API inserts `host, lane,
kind, subject_id, version, request_id, run_at, created_at` and never touches the rest; the worker of that host writes the
progress columns.

    ready ──claim──▶ running ──finish──▶ done
      ▲                │ ├───give up───▶ dead          an error that cannot pass, or too many attempts
      └────retry───────┘ └── (another) ─▶ superseded   a newer version of the same subject was made true
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlmodel import Field, SQLModel

from app.models.columns import TABLE, ascii_string, big_integer, key, one_of, text_string, timestamp


class JobState(StrEnum):
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    SUPERSEDED = "superseded"


class Job(SQLModel, table=True):
    __tablename__ = "jobs"
    __table_args__ = (
        one_of("state", "state", JobState),
        sa.CheckConstraint("(state = 'running') = (running_lane IS NOT NULL)", name="running_lane"),
        sa.UniqueConstraint("host", "running_lane"),
        sa.Index("ix_jobs_host_state_run_at", "host", "state", "run_at"),
        sa.Index("ix_jobs_host_kind_subject_id", "host", "kind", "subject_id"),
        sa.Index("ix_jobs_finished_at", "finished_at"),
        TABLE,
    )

    id: int | None = Field(default=None, sa_column=key())
    host: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    lane: str = Field(sa_column=sa.Column(ascii_string(254), nullable=False))
    """Jobs of one lane never run side by side. For a mailbox it is the address, so that a predecessor's archiving and a
    successor's creation cannot race."""
    kind: str = Field(sa_column=sa.Column(ascii_string(32), nullable=False))
    subject_id: int = Field(sa_column=sa.Column(big_integer(), nullable=False))
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    """The version that asked. The handler reads the rows as they are by then, and reports the version it saw."""
    request_id: str = Field(sa_column=sa.Column(ascii_string(64), nullable=False))
    state: str = Field(sa_column=sa.Column(ascii_string(16), nullable=False, server_default=sa.text("'ready'")))
    run_at: datetime = Field(sa_column=timestamp(nullable=False))
    attempts: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False, server_default=sa.text("0")))
    """Counted at the claim, so that a job that kills its worker ends in `dead` too."""
    fence: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False, server_default=sa.text("0")))
    """Raised by each claim. Whoever holds an older one has lost the job."""
    lease_until: datetime | None = Field(sa_column=timestamp())
    running_lane: str | None = Field(sa_column=sa.Column(ascii_string(254)))
    """The lane while running, else null: the unique key over (host, running_lane) is the lane's lock."""
    error: str | None = Field(sa_column=sa.Column(text_string(1000)))
    created_at: datetime = Field(sa_column=timestamp(nullable=False))
    finished_at: datetime | None = Field(sa_column=timestamp())


class Applied(SQLModel, table=True):
    """What was made true on a host, of which version, and how that was proved. Written by that host's worker alone."""

    __tablename__ = "applied"
    __table_args__ = ({**TABLE, "sqlite_autoincrement": False},)

    host: str = Field(sa_column=sa.Column(ascii_string(64), primary_key=True))
    kind: str = Field(sa_column=sa.Column(ascii_string(32), primary_key=True))
    """The kind of the jobs that make it true."""
    subject_id: int = Field(sa_column=sa.Column(big_integer(), primary_key=True, autoincrement=False))
    version: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    """Never lowered. Ready means: equal to the subject's own version."""
    stands: bool = Field(sa_column=sa.Column(sa.Boolean(), nullable=False))
    """The home is in place. The views show an account only while this is so."""
    revision: int = Field(sa_column=sa.Column(sa.Integer(), nullable=False))
    """How often this row was written; the second half of an ETag."""
    proofs: dict[str, Any] = Field(sa_column=sa.Column(sa.JSON(), nullable=False))
    result: dict[str, Any] = Field(sa_column=sa.Column(sa.JSON(), nullable=False))
    """What only the host knows: uid, home, the `access_ended_at` that was carried out, whether an archive is kept."""
    applied_at: datetime = Field(sa_column=timestamp(nullable=False))


class JobRow(NamedTuple):
    """What is shown of the latest job about a subject."""

    id: int
    state: str
    error: str | None


jobs: sa.Table = Job.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
applied: sa.Table = Applied.__table__  # type: ignore[attr-defined]  # SQLModel does not declare it
