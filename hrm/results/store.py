"""Writing records into a database, and reading them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Engine, Select, Table, create_engine, event, insert, inspect, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError

from hrm.errors import UserError, first_sentence
from hrm.results import tables
from hrm.results.records import (
    Answer,
    AnsweredRequest,
    Artifact,
    Evaluation,
    PublishedPack,
    RecordError,
    StoreError,
)
from hrm.results.url import DatabaseURL

_SECONDS_TO_WAIT = 5  # for a connection, or for another process that writes into the same file
_CREATION_LOCK = 0x68726D  # of PostgreSQL, any number that nothing else takes

_WAYS_OUT = {
    "sqlite": "see that its folder exists and may be written, or give another",
    "postgresql": "see that it runs and lets you in, or give another",
}
_POSTGRESQL_DEFAULTS: dict[str, Any] = {  # where the URL does not say
    "connect_timeout": _SECONDS_TO_WAIT,
    "application_name": "hrm",
    "tcp_user_timeout": 15_000,  # milliseconds until a host that is gone is noticed
    "prepare_threshold": None,  # prepared statements do not work through poolers, such as Supabase's
}


class Store:
    """A results store. Any thread may use it, and several processes may share a database.

    Raises:
        UserError: the URL cannot be read, or the database is of a newer version of HRM.
        StoreError: the database cannot be used, here and in every method.
    """

    def __init__(self, url: DatabaseURL) -> None:
        self._url = url
        self._engine = self._new_engine()
        self._insert = sqlite.insert if url.scheme == "sqlite" else postgresql.insert
        with self._explained():
            version = self._version() or self._make_tables()
        if version > tables.SCHEMA_VERSION:
            raise UserError(
                f"{self} was made by a newer version of HRM (its tables have version {version}, this one knows "
                f"{tables.SCHEMA_VERSION}): update HRM, or give another."
            )

    def __str__(self) -> str:
        return f"{self._url.option}={self._url.shown}"

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    # ---- what a service answered

    def add_requests(self, records: Sequence[AnsweredRequest]) -> None:
        """Record requests with their answers, all or none. What is recorded already, by its id or by its model and key,
        stays as it is.

        Raises:
            RecordError: one of them holds what the database cannot.
        """
        with self._writing() as connection:
            statement = self._insert(tables.requests).on_conflict_do_nothing().returning(tables.requests.c.id)
            # In order: processes that write the same keys wait for one another in turn, not in a circle.
            rows = [_row(tables.requests, record) for record in sorted(records, key=lambda record: record.key or "")]
            new = set(connection.scalars(statement, rows))
            answers = [
                {"request_id": record.id, "number": number, **vars(answer)}
                for record in {each.id: each for each in records}.values()
                if record.id in new
                for number, answer in enumerate(record.answers)
            ]
            if answers:
                connection.execute(insert(tables.answers), answers)

    def request(self, id: str) -> AnsweredRequest | None:
        """A recorded request."""
        return self._request(select(tables.requests).where(tables.requests.c.id == id))

    def request_of_key(self, model: str, key: str) -> AnsweredRequest | None:
        """The recorded request that a client knows by this key."""
        of_both = (tables.requests.c.model == model) & (tables.requests.c.key == key)
        return self._request(select(tables.requests).where(of_both))

    def _request(self, query: Select[Any]) -> AnsweredRequest | None:
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            columns = [column for column in tables.answers.c if column.name not in ("request_id", "number")]
            of_it = select(*columns).where(tables.answers.c.request_id == row.id).order_by(tables.answers.c.number)
            found = [Answer(**each._mapping) for each in connection.execute(of_it)]
            return AnsweredRequest(**row._mapping, answers=found)

    # ---- evaluations

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Record an evaluation and what it wrote. A value that is infinite or no number becomes null."""
        row = _row(tables.evaluations, evaluation)
        row |= {"metrics": _finite(evaluation.metrics), "options": _finite(evaluation.options)}
        with self._writing() as connection:
            connection.execute(insert(tables.evaluations), row)
            if evaluation.artifacts:
                artifacts = [{**asdict(each), "evaluation_id": evaluation.id} for each in evaluation.artifacts]
                connection.execute(insert(tables.artifacts), artifacts)

    def evaluations(self) -> list[Evaluation]:
        """All evaluations, the oldest first."""
        with self._reading() as connection:
            of_evaluation: dict[str, list[Artifact]] = {}
            for row in connection.execute(select(tables.artifacts).order_by(tables.artifacts.c.kind)):
                values = dict(row._mapping)
                of_evaluation.setdefault(values.pop("evaluation_id"), []).append(Artifact(**values))
            rows = connection.execute(select(tables.evaluations).order_by(tables.evaluations.c.time))
            return [Evaluation(**row._mapping, artifacts=of_evaluation.get(row.id, [])) for row in rows]

    # ---- packs

    def add_pack(self, pack: PublishedPack, *, overwrite: bool = False) -> None:
        """Record where a pack is. One of the same name, version and content is replaced.

        Args:
            overwrite: replace one with other content too.

        Raises:
            UserError: there is one of that name and version with other content.
        """
        replaced = (tables.packs.c.name == pack.name) & (tables.packs.c.version == pack.version)
        if not overwrite:
            replaced &= tables.packs.c.hash == pack.hash
        values = vars(pack)
        with self._writing() as connection:
            connection.execute(self._insert(tables.packs).on_conflict_do_nothing(), values)
            written = connection.execute(update(tables.packs).where(replaced), values)
            if written.rowcount == 0:
                raise UserError(
                    f"{self} has {pack.name} version {pack.version} with other content: give another version, or "
                    "overwrite it."
                )

    def pack(self, name: str, version: str) -> PublishedPack | None:
        """The pack of a name and a version."""
        with self._reading() as connection:
            of_both = (tables.packs.c.name == name) & (tables.packs.c.version == version)
            row = connection.execute(select(tables.packs).where(of_both)).one_or_none()
            return None if row is None else PublishedPack(**row._mapping)

    def packs(self) -> list[PublishedPack]:
        """All packs, by name and age."""
        with self._reading() as connection:
            rows = connection.execute(select(tables.packs).order_by(tables.packs.c.name, tables.packs.c.time))
            return [PublishedPack(**row._mapping) for row in rows]

    # ---- the database

    def check_writable(self) -> None:
        """StoreError unless it may be written."""
        with self._writing() as connection:
            connection.execute(update(tables.schema).values(version=tables.schema.c.version))

    def _new_engine(self) -> Engine:
        driver = "postgresql+psycopg" if self._url.scheme == "postgresql" else "sqlite"
        try:
            url = make_url(f"{driver}://{self._url.rest}")
        except (ArgumentError, ValueError) as error:
            raise UserError(f"{self} cannot be read as a URL: look at its port and at its signs.") from error
        if self._url.scheme == "postgresql":
            arguments = {name: value for name, value in _POSTGRESQL_DEFAULTS.items() if name not in url.query}
        else:
            arguments = {"timeout": _SECONDS_TO_WAIT}
        as_json = json.JSONEncoder(allow_nan=False).encode
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=True, json_serializer=as_json)
        if self._url.scheme == "sqlite":
            event.listen(engine, "connect", _set_up_sqlite)
        return engine

    def _version(self) -> int | None:
        """Of the tables that there are."""
        with self._engine.connect() as connection:
            return _version_of(connection)

    def _make_tables(self) -> int:
        """Make the tables, unless another process is quicker; their version."""
        if self._url.scheme == "sqlite":
            with self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
        with self._engine.begin() as connection:
            if self._url.scheme == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})")
            if (version := _version_of(connection)) is not None:
                return version
            tables.METADATA.create_all(connection, checkfirst=False)
            connection.execute(insert(tables.schema), {"version": tables.SCHEMA_VERSION})
        return tables.SCHEMA_VERSION

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._explained(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the database as sentences: without statements, for these hold what is private."""
        try:
            yield
        except (ValueError, OverflowError) as error:  # of a driver, and of what it calls
            raise RecordError(f"{self} cannot hold a record ({first_sentence(error)}).") from error
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, StatementError) and error.orig is not None else error
            reason = " ".join(first_sentence(cause).split())
            is_of_record = not isinstance(error, DBAPIError) and isinstance(error, StatementError)
            if is_of_record or isinstance(error, DataError | IntegrityError):
                raise RecordError(f"{self} cannot hold a record ({reason}).") from error
            raise StoreError(f"{self} cannot be used ({reason})", _WAYS_OUT[self._url.scheme]) from error


def _row(table: Table, record: AnsweredRequest | Evaluation) -> dict[str, Any]:
    """A record's values by the table's columns."""
    return {column.name: getattr(record, column.name) for column in table.c}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """With None for floats that JSON cannot hold."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _version_of(connection: Connection) -> int | None:
    if not inspect(connection).has_table(tables.schema.name):
        return None
    return connection.scalar(select(tables.schema.c.version))


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA synchronous=FULL")  # what is committed is on the disk
