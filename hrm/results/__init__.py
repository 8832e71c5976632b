"""Where results are kept: a database with what the service answered, evaluations and their files, and published packs.

`records` is what is kept, `url` says where, `tables` how, `store` writes and reads. Only `tables` and `store` import
SQLAlchemy, which comes with the extra `results`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hrm.config.extras import need
from hrm.results.url import parse_url

if TYPE_CHECKING:
    from hrm.results.store import Store


def open_store(url: str, option: str = "results") -> Store:
    """The database at a URL, with its tables made where it is new.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`.
        option: which gave it, for errors.

    Raises:
        UserError: the URL is of another kind, a package is missing, or the database is of a newer version of HRM.
        StoreError: the database cannot be used as it is now.
    """
    parsed = parse_url(url, option)
    packages = {"sqlite": ["sqlalchemy"], "postgresql": ["sqlalchemy", "psycopg"]}
    need(f"{option}={parsed.scheme}:", "results", packages[parsed.scheme])
    from hrm.results.store import Store

    return Store(parsed)
