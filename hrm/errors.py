"""The one exception that means "the user can put this right", and how text of unknown origin is shown."""

import os
import re
import unicodedata

EXIT_USER_ERROR = 2
"""Exit status after a `UserError`."""

EXIT_INTERRUPTED = 130
"""Exit status of what Ctrl-C stopped, as shells have it."""


class UserError(Exception):
    """A mistake in what was asked for: an option, a path, a pack, a checkpoint.

    Its text is one clear sentence that names the culprit and the way out. The entry points print it without a traceback
    and exit with status 2. Anything else that escapes is a bug: `hrm.unforeseen` keeps its traceback in a file.
    """


def first_sentence(error: BaseException) -> str:
    """The start of a library's error text, fit to stand in a sentence of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"[.?!](?=\s|$)", lines[0])[0]


# Control characters, formatting ones (which can reverse the order of what is read), halves of surrogate pairs,
# characters for private use, and separators of lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str) -> str:
    """Text of unknown origin as a terminal may show it, on one line: what could steer the terminal is written out.

    Names of puzzles, sources and paths come from files of others, and an escape sequence in them would be obeyed.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii") if unicodedata.category(character) in _HIDDEN else character
        for character in text
    )


def printable_lines(text: str) -> str:
    """`printable` of each line of a text that has several."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(value: object, most: int = 120) -> str:
    """A value as a sentence can hold it: paths and text as they are, others as Python writes them, cut where long."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, os.PathLike) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def without_secrets(url: str) -> str:
    """A URL as it may be shown: `***` for passwords, and for all that stands before @ in what is no URL."""
    scheme, separator, rest = url.partition("://")
    before, at, after = rest.rpartition("@")
    if not separator:
        return f"***{url[url.rindex('@') :]}" if "@" in url else url
    if at and ":" in before:
        before = f"{before.partition(':')[0]}:***"
    return f"{scheme}://" + re.sub(r"((?:^|[?&])(?:ssl)?password=)[^&]*", r"\1***", f"{before}{at}{after}")
