"""Files and folders behind URLs (`s3://`, `hf://`, `file://` ...), as fsspec reaches them; errors are sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hrm.config.extras import need
from hrm.errors import UserError, first_sentence

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive
_CHUNK = 1 << 23

# Storage without folders. There, fsspec's way to make one makes a bucket, which a misspelt URL must not.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf"}

# What may tell a file from another one of its name and size, by the names that file systems have for it.
_MARKS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified", "created")

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "hf": "HF_TOKEN, or `hf auth login`",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


class MissingError(UserError):
    """Nothing lies behind a URL."""


class UnreachableError(UserError):
    """What lies behind a URL cannot be known now: no network, no answer, a transfer that broke off."""


def is_url(text: object) -> bool:
    """Whether this is a URL, and not a path or a name."""
    return isinstance(text, str) and _URL.match(text) is not None


def last_part(url: str) -> str:
    """The name of the file or folder that a URL stands for, fit to be a name here."""
    return re.sub(r"[^\w.@+=-]", "_", (parts_of_url(url) or ["_"])[-1])[:100]


def parts_of_url(url: str) -> list[str]:
    """The names in a URL or in a path, one below the other, without those that lead up."""
    parts = url.partition("://")[2] if is_url(url) else url
    return [part for part in parts.split("/") if part.strip(". ")]


class Remote:
    """A folder or a file behind a URL. Names are those of files below it, with slashes; an empty one is itself."""

    def __init__(self, url: str) -> None:
        """Nothing is asked for yet.

        Raises:
            UserError: no such protocol is known, its package is not installed, or the URL holds a password.
        """
        self.url = url.rstrip("/")
        self.protocol = url.partition("://")[0].lower()
        # What stands in an option is printed, logged and saved in run folders.
        if "@" in (netloc := urlsplit(url).netloc) and ":" in netloc.rpartition("@")[0]:
            raise UserError(
                f"the URL of {netloc.rpartition('@')[2]} holds a password, which would be written to logs and run "
                "folders: leave it out, and give it by the environment or by fsspec's configuration."
            )
        self._files, self._path = _file_system(self.url, self.protocol)

    def __str__(self) -> str:
        return self.url

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def parent(self) -> Remote:
        """The folder in which it lies."""
        return Remote(self.url.rpartition("/")[0])

    # ---- reading

    def is_folder(self) -> bool:
        """Whether it is a folder, and not a file.

        Raises:
            MissingError: it is neither.
        """
        with self._told():
            return bool(self._files.info(self._path)["type"] == "directory")

    def list(self) -> dict[str, dict[str, Any]]:
        """What fsspec knows of each entry of the folder, by name."""
        with self._told():
            entries = self._files.ls(self._path, detail=True)
        named = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {name: entry for name, entry in named.items() if name not in ("", ".", "..")}

    def entry(self, name: str) -> dict[str, Any] | None:
        """What fsspec knows of a file; None where there is none."""
        try:
            with self._told(name):
                return dict(self._files.info(self._below(name)))
        except MissingError:
            return None

    def read(self, name: str, most: int) -> bytes:
        """The content of a file of at most `most` bytes."""
        content = b""
        for chunk in self.chunks(name):
            content += chunk
            if len(content) > most:
                raise UserError(f"{self.url_of(name)} has more than the {most:,} bytes that such a file may have.")
        return content

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, piece by piece."""
        with self._told(name):
            stream = self._files.open(self._below(name), "rb", block_size=_CHUNK)
        with stream:
            while True:
                with self._told(name):
                    chunk = stream.read(_CHUNK)
                if not chunk:
                    return
                yield chunk

    # ---- writing

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, at once."""
        with self._told(name, "written"):
            self._make_folder_of(name)
            if self.protocol in ("file", "local"):  # a reader sees the file before or the one after
                with self._files.transaction:
                    self._files.pipe_file(self._below(name), content)
            else:
                self._files.pipe_file(self._below(name), content)

    def upload(self, file: Path, name: str) -> None:
        """Write a file as another one."""
        with self._told(name, "written"):
            self._make_folder_of(name)
            self._files.put_file(str(file), self._below(name))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._told(name, "removed"):
            if self._files.exists(self._below(name)):
                self._files.rm_file(self._below(name))

    # ---- what they share

    def _below(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}" if name else self._path

    def _make_folder_of(self, name: str) -> None:
        if self.protocol not in _BUCKETS:
            self._files.makedirs(self._below(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _told(self, name: str = "", done: str = "read") -> Iterator[None]:
        """Errors of file systems, which share no base class, as sentences."""
        url = self.url_of(name)
        try:
            yield
        except FileNotFoundError as error:
            if _is_no_answer(error.__cause__):  # fsspec's http:// calls both so
                raise UnreachableError(f"{url} cannot be {done}: check the network, and try again.") from error
            raise MissingError(f"{url} does not exist{_reason(error)}: correct the URL.") from error
        except PermissionError as error:
            raise UserError(f"{url} may not be {done}{_reason(error)}: {self._about_credentials()}.") from error
        except Exception as error:
            if "Credentials" in type(error).__name__:  # NoCredentialsError and its like
                remedy = self._about_credentials()
            else:
                remedy = "check the network and the URL, and try again"
            raise UnreachableError(f"{url} cannot be {done}{_reason(error)}: {remedy}.") from error

    def _about_credentials(self) -> str:
        names = _CREDENTIALS.get(self.protocol)
        return f"check the credentials ({names})" if names else "check the credentials"


def mark_of(entry: dict[str, Any]) -> str | None:
    """What tells a file from an earlier or later one of the same name, of what fsspec knows of it; None: nothing."""
    found = [str(entry[name]) for name in _MARKS if entry.get(name) is not None]
    return f"{entry.get('size')} {' '.join(found)}" if found else None


def _file_system(url: str, protocol: str) -> tuple[Any, str]:
    import fsspec  # imported here: what reads from disk needs none of it
    from fsspec.registry import known_implementations

    if "::" in url:  # by which fsspec reads one thing through another, such as a file in an archive
        raise UserError(f"{url} cannot be used: a URL with :: in it is not taken.")
    try:
        files, path = fsspec.url_to_fs(url)
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        if protocol in ("s3", "s3a"):
            need(url, "s3", ["s3fs"])
        if package and package != "fsspec":
            raise UserError(f"{url} needs the package {package}: pip install {package}.") from error
        raise UserError(f"{url} needs a package that is not installed ({first_sentence(error)}).") from error
    except Exception as error:
        if protocol not in fsspec.available_protocols():
            raise UserError(
                f"{url} cannot be read: fsspec knows no protocol {protocol}://; give a path, or a URL such as s3://, "
                "hf:// or file://."
            ) from error
        raise UnreachableError(f"{url} cannot be read{_reason(error)}: check the URL.") from error
    files.invalidate_cache()  # listings of earlier looks
    return files, str(path)


def _is_no_answer(error: BaseException | None) -> bool:
    """Whether a server was not reached, rather than answered."""
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not hasattr(error, "response")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    text = first_sentence(ValueError(text)) if text else type(error).__name__
    # The path alone, as some have it, says nothing that the sentence does not.
    return "" if isinstance(error, FileNotFoundError) and " " not in text.strip("'\"") else f" ({text})"
