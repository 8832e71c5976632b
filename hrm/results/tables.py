"""The tables of a results store. Their names begin with `hrm_`, for a database may hold other tables too."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect

SCHEMA_VERSION = 1
"""Of the tables below; a store says which it has."""


class _Time(TypeDecorator[datetime]):
    """A time with its zone; SQLite keeps none, so it gets UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


def _json(name: str) -> Column[Any]:
    return Column(name, JSON, nullable=False)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _time() -> Column[datetime]:
    return Column("time", _Time, nullable=False, index=True)


METADATA = MetaData()

schema = Table("hrm_schema", METADATA, Column("version", Integer, primary_key=True, autoincrement=False))

requests = Table(
    "hrm_requests",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("key", String(255)),
    _text("model"),
    Column("weights_hash", String(64), nullable=False),
    Column("request_hash", String(64), nullable=False),
    _json("options"),
    Column("ms", Double, nullable=False),
    _text("version"),
    _time(),
    UniqueConstraint("model", "key"),
)

answers = Table(
    "hrm_answers",
    METADATA,
    Column("request_id", ForeignKey("hrm_requests.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),  # in the order of the answers
    Column("input", Integer, nullable=False),
    Column("input_hash", String(64), nullable=False),
    _json("answer"),
    _text("text"),
    Column("q_halt", Double, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("trajectory", JSON(none_as_null=True)),
    Index("ix_hrm_answers_input_hash", "input_hash"),
)

evaluations = Table(
    "hrm_evaluations",
    METADATA,
    Column("id", String(32), primary_key=True),
    _text("checkpoint"),
    Column("weights_hash", String(64), nullable=False),
    _text("pack"),
    Column("pack_hash", String(64), nullable=False),
    _json("options"),
    _json("metrics"),
    _json("versions"),
    _time(),
)

artifacts = Table(
    "hrm_artifacts",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("evaluation_id", ForeignKey("hrm_evaluations.id", ondelete="CASCADE"), nullable=False, index=True),
    _text("kind"),
    _text("place"),
    Column("hash", String(64), nullable=False),
)

packs = Table(
    "hrm_packs",
    METADATA,
    Column("name", String(255), primary_key=True),
    Column("version", String(255), primary_key=True),
    _text("licence"),
    _text("augmentation"),
    _text("hash"),
    _text("place"),
    _json("provenance"),
    _time(),
)
