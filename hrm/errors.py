"""The one exception that means "the user can mend this"."""

import re


class UserError(Exception):
    """A mistake in what was asked for: an option, a path, a pack, a checkpoint.

    Its text is one clear sentence that names the culprit and the mend. The entry points print it without a traceback
    and exit with status 2; anything else that escapes is a bug and keeps its traceback.
    """


def first_sentence(error: BaseException) -> str:
    """The start of a library's error text, fit to stand in a sentence of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"[.?!](?=\s|$)", lines[0])[0]
