"""Working memory: where sessions live between requests, in this process or in a Redis that several share.

Nothing is locked. A session has a version, and is replaced only where it still has the version that was read: of two
calls that overlap, the second to end is told so. A call that dies leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlparse

from hrm.config.extras import need
from hrm.errors import UserError, first_sentence, printable, shortened

if TYPE_CHECKING:
    from redis.asyncio import Redis

SECONDS_UNTIL_UP = 2
"""After which to try again, where a memory does not answer."""

_SECONDS_FOR_REDIS = 2.0  # to connect, and to answer
# Keys. Braces: in a cluster, all lie on one machine.
_SESSION = "{hrm}:session:"  # fields version, model, content
_USED = "{hrm}:used:"  # names by when they were last used, of a model
_UNAVAILABLE = "the working memory does not answer; come again later."


class Unavailable(Exception):
    """The memory does not answer; its text is a sentence."""


class Kept(NamedTuple):
    """A session as the memory has it."""

    version: str  # another one after every change
    content: bytes


@dataclass(frozen=True)
class Bounds:
    """What a memory keeps."""

    model: str  # whose sessions they are, by its hash
    sessions: int  # beyond, those that were not used for longest are forgotten
    bytes_each: int
    seconds: float  # that a session is kept after its last use


class Memory(Protocol):
    """Sessions of one model, by name."""

    failures: int  # times that it did not answer

    @property
    def is_up(self) -> bool:
        """Whether it answered when it was last asked."""

    async def check(self) -> None:
        """Note whether it answers."""

    async def load(self, name: str) -> Kept | None:
        """The session of that name, if there is one.

        Raises:
            ValueError: what is there is no session of the model.
            Unavailable: nothing answers.
        """

    async def store(self, name: str, before: str | None, content: bytes) -> bool:
        """Let this be the session of that name from now on.

        Args:
            before: the version that it replaces; None: there is none.

        Returns:
            Whether it is; False where another call was faster.

        Raises:
            Unavailable: nothing answers, and whether it is kept is not known.
        """

    async def close(self) -> None:
        """Let go of connections."""


class LocalMemory:
    """Sessions in this process; they end with it."""

    is_up = True
    failures = 0

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds, self._clock = bounds, clock
        self._kept: OrderedDict[str, tuple[float, Kept]] = OrderedDict()  # and until when, the first to end first

    def __len__(self) -> int:
        self._forget()
        return len(self._kept)

    async def check(self) -> None:
        pass

    async def load(self, name: str) -> Kept | None:
        self._forget()
        found = self._kept.get(name)
        return found and found[1]

    async def store(self, name: str, before: str | None, content: bytes) -> bool:
        now = await self.load(name)
        if (now and now.version) != before:
            return False
        self._kept[name] = self._clock() + self._bounds.seconds, Kept(secrets.token_hex(8), content)
        self._kept.move_to_end(name)
        while len(self._kept) > self._bounds.sessions:
            self._kept.popitem(last=False)
        return True

    async def close(self) -> None:
        self._kept.clear()

    def _forget(self) -> None:
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._kept.popitem(last=False)


# Redis runs a script whole, without others in between.
_LOAD = """
local key, model, most = KEYS[1], ARGV[1], tonumber(ARGV[2])
local kind = redis.call('TYPE', key)['ok']
if kind == 'none' then return {} end
if kind ~= 'hash' then return {'it is a ' .. kind} end
if redis.call('HSTRLEN', key, 'model') ~= #model or redis.call('HGET', key, 'model') ~= model then
    return {'it is of another model, or of another dtype'}
end
for _, field in ipairs({'version', 'content'}) do
    if redis.call('HSTRLEN', key, field) > most then return {'its ' .. field .. ' is too long'} end
end
return redis.call('HMGET', key, 'version', 'content')
"""
_STORE = """
local key, used = KEYS[1], KEYS[2]
local before, version, model, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local name, prefix, milliseconds, most = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local now = redis.call('HGET', key, 'version') or ''
if now == version then return 1 end  -- this call, sent again because its answer was lost
if now ~= before then return 0 end
redis.call('HSET', key, 'version', version, 'model', model, 'content', content)
redis.call('PEXPIRE', key, milliseconds)
local time = redis.call('TIME')
local at = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', used, at, name)
redis.call('PEXPIRE', used, milliseconds)
redis.call('ZREMRANGEBYSCORE', used, '-inf', at - milliseconds)
local over = redis.call('ZCARD', used) - most
if over > 0 then
    local oldest = redis.call('ZPOPMIN', used, over)
    for i = 1, #oldest, 2 do redis.call('DEL', prefix .. oldest[i]) end
end
return 1
"""


class RedisMemory:
    """Sessions in a Redis, which several services may share."""

    def __init__(self, url: str, bounds: Bounds) -> None:
        """
        Raises:
            UserError: the package is missing, or the URL is none.
        """
        self._client = redis_client(url)
        options = self._client.connection_pool.connection_kwargs  # of these, only what is no secret is shown
        place = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        self._where = f"Redis at {place}"
        self._bounds = bounds
        self.is_up, self.failures = True, 0
        self._refuses_until = 0.0
        self._takes_nothing = False  # though it may answer: it is full, or may only be read
        self._watch: asyncio.Task[None] | None = None

    async def check(self) -> None:
        with suppress(Unavailable):
            await self._answer(self._client.ping)

    async def load(self, name: str) -> Kept | None:
        keys, bounds = [f"{_SESSION}{name}"], (self._bounds.model, self._bounds.bytes_each)
        found = await self._answer(self._client.eval, _LOAD, len(keys), *keys, *bounds)
        if not found:
            return None
        if len(found) == 1:
            raise ValueError(found[0].decode())
        if None in found:
            raise ValueError("it is not whole")
        version, content = found
        return Kept(version.decode(errors="replace"), content)

    async def store(self, name: str, before: str | None, content: bytes) -> bool:
        model, sessions, milliseconds = self._bounds.model, self._bounds.sessions, round(1000 * self._bounds.seconds)
        keys = [f"{_SESSION}{name}", f"{_USED}{model}"]
        values = before or "", secrets.token_hex(8), model, content, name, _SESSION, milliseconds, sessions
        stored = await self._answer(self._client.eval, _STORE, len(keys), *keys, *values)
        self._takes_nothing = False
        self._note_answer()
        return bool(stored)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self._client.aclose()

    async def _answer(self, asked: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """What Redis answers; a sentence on stderr when it ceases to work, and when it works again."""
        from redis.exceptions import RedisError, ResponseError, TimeoutError

        if time.monotonic() < self._refuses_until:
            raise Unavailable(_UNAVAILABLE)
        try:
            answer = await asked(*arguments)
        except (RedisError, OSError) as error:
            self.failures += 1
            if isinstance(error, TimeoutError):  # others shall not wait for that too
                self._refuses_until = time.monotonic() + SECONDS_UNTIL_UP
            self._takes_nothing |= isinstance(error, ResponseError)
            if self.is_up:
                reason = shortened(first_sentence(error))
                _tell(f"{self._where} does not work ({reason}): /infer goes on, sessions are refused until it does.")
                self.is_up = False
                self._watch = asyncio.create_task(self._watched())
            raise Unavailable(_UNAVAILABLE) from error
        self._note_answer()
        return answer

    async def _watched(self) -> None:
        """Ask Redis until it answers, though no request may come."""
        from redis.exceptions import RedisError

        while not self.is_up:
            await asyncio.sleep(SECONDS_UNTIL_UP)
            with suppress(RedisError, OSError):
                await self._client.ping()
                self._note_answer()

    def _note_answer(self) -> None:
        if not self.is_up and not self._takes_nothing:
            _tell(f"{self._where} works again.")
            self.is_up = True


def open_memory(place: str, bounds: Bounds) -> Memory:
    """The working memory that `memory=` names.

    Raises:
        UserError: it cannot be used; one that does not answer yet is no error.
    """
    return LocalMemory(bounds) if place == "local" else RedisMemory(place, bounds)


def check_memory(place: str) -> None:
    """UserError for what `open_memory` cannot use."""
    if place != "local":
        redis_client(place)


def redis_client(url: str) -> Redis:
    """What speaks to a Redis, without a connection yet.

    Raises:
        UserError: the package is missing, or the URL is none.
    """
    need("memory=redis://...", "serve", ["redis"])
    from redis.asyncio import ConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        parts = urlparse(url)
        if parts.fragment or (parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path)):
            raise ValueError("a part of the password may stand there")
        pool = ConnectionPool.from_url(
            url,
            socket_connect_timeout=_SECONDS_FOR_REDIS,
            socket_timeout=_SECONDS_FOR_REDIS,
            retry=Retry(NoBackoff(), 1),  # for connections that a restart of Redis has ended
        )
        # Not connected: it looks at the options.
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:  # whose text may hold a part of the password
        raise UserError(
            "memory=redis://... is no URL of a Redis: give redis://USER:PASSWORD@HOST:PORT/NUMBER, with what is "
            "special in the password written as %2F and the like."
        ) from error
    return Redis(connection_pool=pool)


def _tell(sentence: str) -> None:
    with suppress(OSError, ValueError):
        print(printable(sentence), file=sys.stderr, flush=True)
