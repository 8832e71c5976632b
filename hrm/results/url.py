"""URLs of databases: those that are known, and how they may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hrm.errors import UserError, shortened, without_secrets

_FORMS = "sqlite:///FILE (sqlite:////FILE for a path from the root) or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"


@dataclass(frozen=True)
class DatabaseURL:
    """Where a database is."""

    scheme: str  # sqlite or postgresql
    rest: str = field(repr=False)  # after `://`; may hold a password
    option: str  # which gave it

    @property
    def shown(self) -> str:
        """As it was given, without what may be secret."""
        return without_secrets(f"{self.scheme}://{self.rest}")


def parse_url(url: str, option: str = "results") -> DatabaseURL:
    """Read a URL.

    Raises:
        UserError: it is none of a database that is known.
    """
    scheme, separator, rest = url.partition("://")
    given = f"{option}={shortened(without_secrets(url))}"
    if not separator:
        raise UserError(f"{given} is not a URL: give {_FORMS}.")
    if scheme == "sqlite":
        if not rest.removeprefix("/") or not rest.startswith("/"):
            raise UserError(f"{given} names no file: give sqlite:///FILE, or sqlite:////FILE for a path from the root.")
    elif scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        scheme = "postgresql"
        if not re.fullmatch(r"[^/?#]*(/[^/?#]*)?(\?[^#]*)?", rest):
            raise UserError(f"{given} cannot be read: in a user's name or password write / as %2F, ? as %3F, # as %23.")
    else:
        raise UserError(f"{given}: this kind of database is not known; give {_FORMS}.")
    return DatabaseURL(scheme, rest, option)
