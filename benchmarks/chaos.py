"""Kill the service, Redis and PostgreSQL at random moments under load, and see that nothing recorded is lost or wrong.

python -m benchmarks.chaos data/easy --checkpoint sudoku_small --rounds 40

Clients ask without a pause, every other time with an Idempotency-Key, and update sessions; what is refused or broken
they ask again. In each round one to three of the three programs die by SIGKILL, and start again a little later; in the
last one all of them. Then what stands in the database is held against what the clients were told, and against the
answers of `predict`. Redis and PostgreSQL are those of this machine's packages, as the tests start them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from benchmarks.clients import Clients, request_of
from benchmarks.common import machine, make_parser, run_command, write_results
from benchmarks.serve import first_puzzles
from hrm.inference.model import from_pretrained
from tests.helpers.servers import Server, free_port, postgresql, redis

_CLIENTS = 6  # that ask for answers
_SESSIONS = 2  # that update sessions
_MOST_UPDATES = 24  # of a session; then another is begun
_PUZZLES = 3  # in a request, at most
_MOST_REPEATED = 200  # requests that are sent once more in the end
_UNAVAILABLE = {0, 409, 429, 503, 504}  # statuses after which a client asks again; 0: the connection broke
_SECONDS_TO_ANSWER = 90.0  # to a request, at most


@dataclass
class _Answered:
    """An answer that a client got."""

    puzzles: list[int]
    key: str | None
    content: dict[str, Any]
    is_recorded: bool  # as far as the client was told


@dataclass
class Outcome:
    """What came of it."""

    answered: list[_Answered] = field(default_factory=list)
    updates: int = 0  # of sessions
    rounds: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    asked_again: Counter[str] = field(default_factory=Counter)  # why
    seconds_until_up: list[float] = field(default_factory=list)  # of the service
    rows: int = 0  # requests in the database
    not_recorded: int = 0  # requests without a key that were answered, and are not there
    repeated: int = 0  # requests with a key that were sent once more in the end
    problems: Counter[str] = field(default_factory=Counter)  # what was lost or wrong

    def row(self) -> dict[str, Any]:
        """A row of a table."""
        return {
            "rounds": self.rounds,
            **{f"{name} killed": count for name, count in sorted(self.killed.items())},
            "requests answered": len(self.answered),
            "told to be recorded": sum(answer.is_recorded for answer in self.answered),
            "requests in the database": self.rows,
            "lost or wrong": sum(self.problems.values()),
            "answered without a key, not recorded": self.not_recorded,
            "repeated with a key": self.repeated,
            "updates of sessions": self.updates,
            "refused with 503": sum(count for why, count in self.asked_again.items() if why.endswith("503")),
            "service up after, median s": float(np.median(self.seconds_until_up or [np.nan])),
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data_path", help="a pack whose test split holds the puzzles")
    parser.add_argument("--checkpoint", default="sudoku_small", help="as for hrm serve")
    parser.add_argument("--boards", type=int, default=64, help="puzzles that are asked for")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load before each, on average")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    arguments = parser.parse_args(argv)
    tokens = first_puzzles(arguments.data_path, arguments.boards)
    about = machine(from_pretrained(arguments.checkpoint, device=arguments.device).device)
    about["model"] = arguments.checkpoint
    outcome = run_chaos(arguments, tokens)
    print(write_results("serve-chaos", about, [outcome.row()], arguments.output_dir))
    for problem, count in outcome.problems.items():
        print(f"{problem}: {count}")
    sys.exit(bool(outcome.problems))


def run_chaos(arguments: argparse.Namespace, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> Outcome:
    """Do all of it, with the options of the command line."""
    model = from_pretrained(arguments.checkpoint, device=arguments.device)
    expected = model.predict(tokens, tokens=True).texts
    del model
    with ExitStack() as stack:
        database, results = stack.enter_context(postgresql())
        cache, memory = stack.enter_context(redis())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hrm-chaos-")))
        port = free_port()
        options = [f"checkpoint={arguments.checkpoint}", f"device={arguments.device}", f"port={port}"]
        options += [f"memory={memory}", f"results={results}", "kernels=naive"]
        command = [sys.executable, "-m", "hrm", "serve", *options]
        service = Server(command, port, folder / "log", _is_ready)
        service.start()
        stack.callback(service.kill)
        victims = {"postgresql": database, "redis": cache, "service": service}
        outcome = asyncio.run(_Chaos(arguments, tokens, expected, victims, results).run())
    return outcome


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class _Chaos:
    def __init__(
        self,
        arguments: argparse.Namespace,
        tokens: np.ndarray[Any, np.dtype[np.int64]],
        expected: Sequence[str],
        victims: dict[str, Server],
        results: str,
    ) -> None:
        self._arguments, self._tokens, self._expected = arguments, tokens, expected
        self._victims, self._results = victims, results
        self._clients = Clients(("127.0.0.1", victims["service"].port))
        self._outcome = Outcome()
        self._after_updates: dict[tuple[int, int], str] = {}  # texts, by puzzle and number of updates
        self._is_over = False

    async def run(self) -> Outcome:
        outcome = self._outcome
        for puzzle in range(_SESSIONS):  # undisturbed, to compare with
            await self._session(puzzle, f"before-{puzzle}", self._note_update)
        outcome.updates = 0
        work = [asyncio.create_task(self._ask(number)) for number in range(_CLIENTS)]
        work += [asyncio.create_task(self._update(number)) for number in range(_SESSIONS)]
        generator = np.random.default_rng(self._arguments.seed)
        names = list(self._victims)
        for round_ in range(self._arguments.rounds):
            if round_ == self._arguments.rounds - 1:
                chosen = names
            elif round_ < len(names):
                chosen = [names[round_]]
            else:
                count = int(generator.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
                chosen = generator.choice(names, count, replace=False).tolist()
            await asyncio.sleep(float(generator.uniform(0.0, 2 * self._arguments.seconds)))
            await self._kill(chosen, float(generator.uniform(0.0, 0.5)))
            outcome.rounds += 1
        self._is_over = True
        await asyncio.gather(*work)
        self._look_into_the_database()
        await self._repeat()
        self._clients.close()
        return outcome

    async def _kill(self, names: Sequence[str], seconds: float) -> None:
        """Let them die under load, and come back after so long."""
        for name in names:
            self._victims[name].kill()
            self._outcome.killed[name] += 1
        await asyncio.sleep(seconds)
        for name in sorted(names, key=list(self._victims).index):  # the service last: it needs the others
            began = time.perf_counter()
            await asyncio.to_thread(self._victims[name].start)
            if name == "service":
                self._outcome.seconds_until_up.append(time.perf_counter() - began)

    # ---- clients

    async def _once(self, request: bytes, kind: str) -> tuple[int, bytes]:
        """Status and body of an answer; status 0 where there is none, and the client may ask again."""
        try:
            status, body = await asyncio.wait_for(self._clients.ask(request), _SECONDS_TO_ANSWER)
        except (OSError, asyncio.IncompleteReadError):  # a timeout is the former
            status, body = 0, b""
        if status in _UNAVAILABLE:
            self._outcome.asked_again[f"{kind}: {status or 'broken'}"] += 1
            await asyncio.sleep(0.1)
            return 0, body
        return status, body

    async def _until_answered(self, request: bytes, kind: str) -> tuple[int, bytes]:
        while True:
            status, body = await self._once(request, kind)
            if status:
                return status, body

    def _is_answer(self, status: int, body: bytes, what: str) -> bool:
        if status == 200:
            return True
        self._outcome.problems[f"{what} ended in {status} {body.decode(errors='replace')[:100]}"] += 1
        return False

    async def _ask(self, client: int) -> None:
        """Answers, every other one with a key."""
        generator = np.random.default_rng([self._arguments.seed, client])
        turn = 0
        while not self._is_over:
            turn += 1
            puzzles = generator.integers(0, len(self._tokens), generator.integers(1, _PUZZLES + 1)).tolist()
            key = f"{client}-{turn}" if turn % 2 else None
            request = self._request(puzzles, key)
            ask = self._once if key is None else self._until_answered
            status, body = await ask(request, "without a key" if key is None else "with a key")
            if not status or not self._is_answer(status, body, "/infer"):
                continue
            content = json.loads(body)
            self._compare(content["texts"], puzzles, "an answer")
            answer = _Answered(puzzles, key, content, key is not None)
            self._outcome.answered.append(answer)
            if key is None and turn % 4 == 0:  # ask whether it is recorded
                get = request_of(b"", f"/results/{content['id']}", method="GET")
                status, body = await self._until_answered(get, "recorded?")
                if status == 200:  # 404: the service was killed before it could record it
                    answer.is_recorded = True
                    if json.loads(body) != content:
                        self._outcome.problems["a recorded answer is another one"] += 1

    def _request(self, puzzles: Sequence[int], key: str | None) -> bytes:
        body = json.dumps({"inputs": [{"tokens": row} for row in self._tokens[puzzles].tolist()]}).encode()
        return request_of(body, headers={} if key is None else {"Idempotency-Key": key})

    def _compare(self, texts: Sequence[str], puzzles: Sequence[int], what: str) -> None:
        if list(texts) != [self._expected[puzzle] for puzzle in puzzles]:
            self._outcome.problems[f"{what} is not that of predict"] += 1

    async def _update(self, client: int) -> None:
        """Sessions, one after the other."""
        turn = 0
        while not self._is_over:
            turn += 1
            await self._session(client, f"{client}-{turn}", self._check_update)

    async def _session(self, puzzle: int, name: str, look: Callable[[int, int, str], None]) -> None:
        """Begin a session and update it, one update at a time; each is kept once it is answered."""
        content: dict[str, Any] = {"session": name, "inputs": [{"tokens": self._tokens[puzzle].tolist()}]}
        updates = 0
        while updates < _MOST_UPDATES and not self._is_over:
            status, body = await self._once(request_of(json.dumps(content).encode(), "/infer/H"), "a session")
            if not status:
                if b"is there already" in body:  # what seemed to fail has begun it
                    content = {"session": name}
                continue
            if not self._is_answer(status, body, "/infer/H"):  # one that is lost is 404
                return
            content = {"session": name}
            answer = json.loads(body)
            if (now := answer["updates"]["H"]) <= updates:
                self._outcome.problems["an update is lost"] += 1
            updates = now
            self._outcome.updates += 1
            look(puzzle, updates, answer["texts"][0])

    def _note_update(self, puzzle: int, updates: int, text: str) -> None:
        self._after_updates[puzzle, updates] = text

    def _check_update(self, puzzle: int, updates: int, text: str) -> None:
        if updates <= _MOST_UPDATES and self._after_updates[puzzle, updates] != text:
            self._outcome.problems["a session went another way"] += 1

    # ---- what is left in the end

    def _look_into_the_database(self) -> None:
        import psycopg

        both = "hrm_requests LEFT JOIN hrm_answers ON request_id = id"  # read at once: what is on its way may come yet
        query = f"SELECT id, key, input_hash, text FROM {both} ORDER BY number"
        found: dict[str, tuple[str | None, list[tuple[str, str]]]] = {}
        with psycopg.connect(self._results) as connection:
            for id_, key, input_hash, text in connection.execute(query):
                _, answers = found.setdefault(id_, (key, []))
                answers += [] if text is None else [(input_hash, text)]
        hashes = [hashlib.sha256(np.append(tokens, 0).astype("<i8").tobytes()).hexdigest() for tokens in self._tokens]
        puzzle_of = {name: number for number, name in enumerate(hashes)}
        outcome = self._outcome
        outcome.rows = len(found)
        for _, answers in found.values():
            if not answers:
                outcome.problems["a recorded request has no answers"] += 1
            self._compare([text for _, text in answers], [puzzle_of[name] for name, _ in answers], "a recorded answer")
        for answer in outcome.answered:
            key, answers = found.get(answer.content["id"], (None, []))
            if answers:
                right = key == answer.key and [name for name, _ in answers] == [hashes[each] for each in answer.puzzles]
                outcome.problems.update([] if right else ["a recorded request is another one"])
            elif answer.is_recorded:
                outcome.problems["a recorded answer is lost"] += 1
            else:
                outcome.not_recorded += 1

    async def _repeat(self) -> None:
        """Requests with a key get the answer that they had."""
        with_key = [answer for answer in self._outcome.answered if answer.key is not None]
        for answer in with_key[:: 1 + len(with_key) // _MOST_REPEATED]:
            self._outcome.repeated += 1
            status, body = await self._until_answered(self._request(answer.puzzles, answer.key), "repeated")
            if self._is_answer(status, body, "a repeated request") and json.loads(body) != answer.content:
                self._outcome.problems["a repeated request got another answer"] += 1


if __name__ == "__main__":
    run_command(main)
