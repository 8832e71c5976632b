"""The service's page: what it is made of, and in headless Chromium what a user meets."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Response
from starlette.testclient import TestClient

import hrm
from hrm.config import ServeConfig
from hrm.inference.model import TrainedModel
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.tasks.form import PuzzleForm
from tests.helpers.browser import needs_chromium, seen_by
from tests.helpers.inference import tiny
from tests.helpers.service import in_a_thread

SUDOKU = PuzzleForm("sudoku", 16, 6)
ARC = PuzzleForm("arc", 900, 12, 3, identifiers=("<blank>", "00576224", "00576224_t1_0123456789"))
MAZE = PuzzleForm("maze", 49, 6)
TOOLS = PuzzleForm("tokens", 6, 4, symbols=("search", "<b>", "read_file"))


def client_of(folder: Path, form: PuzzleForm) -> TestClient:
    return TestClient(make_app(Engine(tiny(folder, form)), ServeConfig(checkpoint="none"), "small"))


# ---- its parts


def test_it_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    with client_of(tmp_path, SUDOKU) as client:
        page = client.get("/")
        assert page.headers["Content-Type"].startswith("text/html")
        policy = dict(rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        for name in ("page.css", "page.js", "drawing.css", "drawing.js", "icon.svg"):
            assert f'"page/{name}"' in page.text
            part = client.get(f"/page/{name}")
            assert part.status_code == 200
            assert part.headers["X-Content-Type-Options"] == "nosniff"
            assert "https://" not in part.text
        assert "style=" not in page.text, "the policy forbids it"
        assert client.get("/page/http.py").status_code == 404
        assert client.get("/page/..%2fhttp.py").status_code == 404
        assert set(client.get("/openapi.json").json()["paths"]).isdisjoint({"/", "/page/{name}"})
        assert 'hrm_requests_total{path="/",status="200"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("form", [SUDOKU, MAZE, ARC, TOOLS, PuzzleForm("sudoku", 81, 11), PuzzleForm("arc", 900, 12)])
def test_the_example_can_be_answered(form: PuzzleForm, tmp_path: Path) -> None:
    with client_of(tmp_path, form) as client:
        (model,) = client.get("/models").json()["models"]
        response = client.post("/infer", json={"inputs": [model["example"]], "trajectory": True, "tokens": True})
        assert response.status_code == 200, response.text
        found = response.json()
    (trajectory,), (tokens,) = found["trajectory"], found["tokens"]
    assert len(model["view"]["symbols"]) == form.vocab_size
    assert len(tokens["input"]) == form.seq_len
    assert [len(answer) for answer in tokens["answers"]] == [form.seq_len] * len(trajectory)
    assert ("keeps_rules" in trajectory[0]) == (model["view"]["result"] is not None)


def test_tokens_are_those_of_predict(tmp_path: Path) -> None:
    model = tiny(tmp_path, SUDOKU)
    board = "1...3.2..1.22..."
    expected = model.predict([board], trajectory=True)
    assert expected.trajectory is not None
    with client_of(tmp_path, SUDOKU) as client:
        last = client.post("/infer", json={"inputs": [board], "tokens": True}).json()["tokens"]
        every = client.post("/infer", json={"inputs": [board], "tokens": True, "trajectory": True}).json()["tokens"]
    steps = int(expected.steps[0])
    assert every[0]["answers"] == expected.trajectory[0, :steps].tolist()
    assert last == [{"input": every[0]["input"], "answers": every[0]["answers"][-1:]}]
    assert [int(token) - 1 for token in last[0]["input"]] == [int(cell) for cell in board.replace(".", "0")]


def test_names_of_tasks_are_those_that_are_not_augmented(tmp_path: Path) -> None:
    with client_of(tmp_path, ARC) as client:
        (model,) = client.get("/models").json()["models"]
    assert model["puzzles"] == ["00576224"]
    assert model["example"]["puzzle"] == "00576224"


# ---- in the browser

# Runs a script of ours on the page in a frame as wide as a phone, then on a desk's screen. The picture arrives when all
# is done: Chromium waits for it before it prints the page.
PROBE = """
<!doctype html><meta charset="utf-8"><body><img src="/wait" alt="">
<script type="application/json" id="seen"></script>
<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function use(id, width) {
  const frame = document.createElement("iframe");
  [frame.width, frame.height, frame.src] = [width, 900, "/"];
  const loaded = new Promise((done) => (frame.onload = done));
  document.body.append(frame);
  await loaded;
  const page = frame.contentDocument;
  const $ = (id) => page.getElementById(id);
  const until = async (test) => {
    for (let n = 0; !test(); n++) {
      if (n > 1000) throw new Error(`never: ${test}`);
      await wait(10);
    }
  };
  const cells = () => [...$("cells").children];
  const event = (target, kind, options) =>
    target.dispatchEvent(new frame.contentWindow[kind](options.type, { bubbles: true, cancelable: true, ...options }));
  const use = {
    $, page, until, cells, event,
    outcome: () => $("outcome").textContent,
    at: () => cells().indexOf(page.activeElement),
    type: (text) => [...text].forEach((symbol) => page.execCommand("insertText", false, symbol)),
    key: (key, target = page.activeElement) => event(target, "KeyboardEvent", { type: "keydown", key }),
    paste(text) {
      const clipboardData = new frame.contentWindow.DataTransfer();
      clipboardData.setData("text", text);
      event(page.activeElement, "ClipboardEvent", { type: "paste", clipboardData });
    },
    write(text) {
      $("text").value = text;
      event($("text"), "Event", { type: "input" });
    },
    async solve() {
      $("solve").click();
      await until(() => !$("solve").disabled);
    },
    steps() {
      if ($("play").getAttribute("aria-label") === "Pause") $("play").click();
      const found = [];
      for (let step = 0; step <= +$("step").max; step++) {
        $("step").value = step;
        event($("step"), "Event", { type: "input" });
        found.push({ status: $("status").textContent, board: $("boards").innerHTML, isTyped: !$("cells").hidden,
          label: $("step").getAttribute("aria-valuetext"),
          texts: [...$("boards").querySelectorAll(".answer text, .answer li")].map((text) => text.textContent) });
      }
      return found;
    },
  };
  await until(() => $("outcome").textContent);
  const seen = await script(use);
  seen.widest = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  seen.unnamed = [...page.querySelectorAll("button, input, textarea, svg:not([aria-hidden])")].filter((element) =>
    element.checkVisibility() && !element.closest("[aria-hidden]") && !(element.labels && element.labels.length) &&
    !(element.getAttribute("aria-label") || element.textContent.trim())).map((element) => element.outerHTML);
  frame.remove();
  return seen;
}
(async () => {
  let seen;
  try {
    seen = { phone: await use("phone", 360), desk: await use("desk", 1280) };
  } catch (error) {
    seen = { error: `${error}` };
  }
  document.getElementById("seen").textContent = JSON.stringify(seen).replaceAll("<", "\\\\u003c");
  fetch("/done");
})();
const script = async (use) => {
  const { $, page, until, cells, event, outcome, at, type, key, paste, write, solve, steps } = use;
  SCRIPT
};
</script>
"""


@contextmanager
def served(model: TrainedModel, script: str) -> Iterator[str]:
    """The address of the service, with a probe beside the page."""
    config = ServeConfig(checkpoint="none")
    app = make_app(Engine(model, 4), config, "small")
    done = asyncio.Event()

    @app.get("/probe")
    async def probe() -> Response:
        return Response(PROBE.replace("SCRIPT", script), media_type="text/html")

    @app.get("/wait")
    async def wait() -> Response:
        await asyncio.wait_for(done.wait(), 100)
        return Response("<svg xmlns='http://www.w3.org/2000/svg'/>", media_type="image/svg+xml")

    @app.get("/done")
    async def is_done() -> None:
        done.set()

    with in_a_thread(app, config) as (_, address):
        yield f"http://127.0.0.1:{address[1]}"


def use(folder: Path, model: TrainedModel, script: str, *inputs: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the script saw, by the width of the screen; and what the service answers to inputs."""
    with served(model, script) as address:
        seen = seen_by(folder, f"{address}/probe")
        requests = [{"inputs": [value], "trajectory": True, "tokens": True} for value in inputs]
        answers = [httpx.post(f"{address}/infer", json=request).json() for request in requests]
    assert "error" not in seen, seen
    for width, found in seen.items():
        assert found["widest"] <= 0, f"scrolls sideways on a {width}"
        assert found["unnamed"] == []
    return seen, answers


def status(trajectory: list[dict[str, Any]], changed: list[int], step: int, result: str | None) -> str:
    """The sentence beside a step of an answer that has no label."""
    now = trajectory[step - 1]
    parts = []
    if "keeps_rules" in now:
        count = len(now.get("broken", []))
        broken = f"{count} cell{'s' * (count != 1)} against the rules" if count else f"not {result}"
        parts.append(str(result) if now["keeps_rules"] else broken)
    if step > 1:
        parts.append(f"{changed[step - 1] or 'none'} changed")
    parts.append(f"q halt {now['q_halt']:.2f}")
    return f"Step {step} of {len(trajectory)}: {', '.join(parts)}"


def changes(answer: dict[str, Any]) -> list[int]:
    answers = answer["tokens"][0]["answers"]
    return [
        0,
        *(sum(a != b for a, b in zip(one, two, strict=True)) for one, two in itertools.pairwise(answers)),
    ]


BOARD = "...7..2....8.6....6....4.87....8.........357.1.5..2....24......81.3...9.3.....1.6"
TYPING = r"""
const seen = { prompt: outcome(), count: cells().length, first: cells()[10].getAttribute("aria-label") };
cells()[0].focus();
type("BOARD");
seen.typed = $("text").value;
seen.last = at();
seen.hint = $("hint").textContent;
seen.drawn = [...$("boards").querySelectorAll("text")].map((text) => text.textContent || ".").join("");
type("x");
seen.afterNonsense = $("text").value;
const moves = [];
cells()[40].focus();
for (const name of ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "Home", "ArrowLeft", "End", "ArrowRight"]) {
  key(name);
  moves.push(at());
}
seen.moves = moves;
seen.stops = cells().filter((cell) => cell.tabIndex === 0).length;
cells()[3].focus();
key("Backspace");
cells()[8].focus();
type("9");
cells()[8].focus();
key("Delete");
seen.erased = [$("text").value, at()];
cells()[2].focus();
paste("..1..");
seen.part = [$("text").value, at()];
paste("BOARD".replace(/.{9}/g, "$&\n"));
seen.pasted = $("text").value;
paste("no board");
seen.refused = $("text").value;
const digits = [..."BOARD"].map((symbol) => (symbol === "." ? 0 : +symbol));
write(JSON.stringify(Array.from({ length: 9 }, (_, row) => digits.slice(9 * row, 9 * row + 9))));
seen.json = cells().map((cell) => cell.value || ".").join("");

await solve();
seen.outcome = outcome();
seen.playing = $("play").getAttribute("aria-label");
await until(() => $("play").getAttribute("aria-label") === "Play");
seen.played = $("status").textContent;
seen.steps = steps();
seen.answer = $("answer-text").textContent;
seen.caption = $("boards").querySelector("svg").getAttribute("aria-label");
key("ArrowLeft", page.body);
seen.back = $("status").textContent;
steps();
$("step").value = 0;
event($("step"), "Event", { type: "input" });
cells()[80].focus();
type("1");
seen.edited = [$("player").hidden, $("text").value.slice(-1)];

write("55" + ".".repeat(79));
await solve();
seen.clash = outcome();
write("BOARD".slice(1));
await solve();
seen.short = [outcome(), $("text").getAttribute("aria-invalid"), $("player").hidden, $("outcome").getAttribute("role")];
$("example").click();
seen.example = $("text").value;
$("clear").click();
seen.cleared = [$("text").value, outcome(), $("text").getAttribute("aria-invalid")];
return seen;
"""


@pytest.mark.slow
@needs_chromium
def test_a_board_is_typed_solved_and_watched(tmp_path: Path) -> None:
    model = hrm.from_pretrained("sudoku_small", device="cpu")
    script = TYPING.replace("BOARD", BOARD)
    seen, (answer, clash, short) = use(tmp_path, model, script, BOARD, "55" + "." * 79, BOARD[1:])
    (trajectory,), (text,), num_steps = answer["trajectory"], answer["texts"], answer["steps"][0]
    assert trajectory[-1]["keeps_rules"], "the model solves it"
    assert num_steps > 1
    for found in seen.values():
        assert (found["prompt"], found["count"]) == ("Type or paste a puzzle, or take the example.", 81)
        assert found["first"] == "Row 2, column 2"
        assert found["typed"] == found["drawn"] == found["afterNonsense"] == found["pasted"] == found["json"] == BOARD
        assert found["refused"] == "no board"
        assert found["last"] == 80
        assert found["hint"].startswith("81 of 81 cells")
        assert found["moves"] == [39, 30, 31, 40, 36, 36, 44, 44]
        assert found["stops"] == 1, "one stop of the tab key"
        assert found["erased"] == [f"{BOARD[:3]}.{BOARD[4:]}", 8]
        assert found["part"] == [f"{BOARD[:2]}..1..{BOARD[7:]}", 7]

        assert found["outcome"] == f"✓ Solved: a solution after {num_steps} ACT steps, q halt {answer['q_halt'][0]:.2f}"
        assert found["playing"] == "Pause"
        sentences = ["The puzzle, before the first step"]
        sentences += [status(trajectory, changes(answer), step, "a solution") for step in range(1, num_steps + 1)]
        assert [step["status"] for step in found["steps"]] == [step["label"] for step in found["steps"]] == sentences
        assert [step["isTyped"] for step in found["steps"]] == [True] + [False] * num_steps
        assert found["played"] == found["caption"] == sentences[-1]
        assert found["back"] == sentences[-2]
        for shown, step in zip(found["steps"][1:], trajectory, strict=True):
            assert shown["texts"] == [str(digit) for row in step["answer"] for digit in row]
            assert shown["board"].count("-digit") == 81
            assert shown["board"].count("wrong-digit") == len(step["broken"])
        assert found["answer"] == text == "".join(found["steps"][-1]["texts"])
        assert found["edited"] == [True, "1"], "answers to another board are gone"

        assert clash["error"] == f"input 0: {found['clash'][0].lower()}{found['clash'][1:]}"
        assert "stands more than once" in found["clash"]
        assert found["short"] == [short["error"].removeprefix("input 0: "), "true", True, "status"]
        assert found["example"] == model.task.example(model.form)
        assert found["cleared"] == ["", "Type or paste a puzzle, or take the example.", None]


MAZES = """
const seen = {};
$("example").click();
seen.example = $("text").value;
const drawn = $("boards").querySelector("svg");
seen.drawn = [drawn.dataset.rows, drawn.getAttribute("aria-label")];
await solve();
seen.outcome = outcome();
seen.steps = steps();
seen.answer = $("answer-text").textContent;
write(seen.example.replace("S", "G"));
await solve();
seen.problem = outcome();
return seen;
"""


@pytest.mark.slow
@needs_chromium
def test_a_maze_in_the_browser(tmp_path: Path) -> None:
    model = tiny(tmp_path / "run", MAZE)
    example = model.task.example(MAZE)
    seen, (answer, problem) = use(tmp_path, model, MAZES, example, example.replace("S", "G"))
    (trajectory,) = answer["trajectory"]
    for found in seen.values():
        assert found["example"] == example
        assert found["drawn"] == ["7", "The puzzle"]
        assert found["outcome"].startswith("✗ Not a shortest path after ")
        assert found["answer"].split("\n") == answer["answers"][0]
        assert len(found["steps"]) == len(trajectory) + 1
        for shown, step in zip(found["steps"][1:], trajectory, strict=True):
            assert not step["keeps_rules"]
            pairs = list(zip(example.replace("\n", ""), "".join(step["answer"]), strict=True))
            against = sum(given != answered and (given, answered) != (" ", "o") for given, answered in pairs)
            words = (
                f": {against} cell{'s' * (against != 1)} against the rules, " if against else ": not a shortest path, "
            )
            assert words in shown["status"]
        assert found["problem"] == problem["error"].removeprefix("input 0: ")


GRIDS = """
const seen = {};
write('{"train": [');
await solve();
seen.broken = outcome();
write(JSON.stringify(TASK));
await solve();
seen.nameless = outcome();
$("name").value = "00576224";
event($("name"), "Event", { type: "input" });
seen.demonstrations = $("task").querySelectorAll("svg").length;
seen.captions = [...$("boards").querySelectorAll("figcaption")].map((caption) => caption.textContent);
await solve();
seen.outcome = outcome();
seen.place = $("place").textContent;
seen.first = steps();
$("next").click();
seen.next = $("place").textContent;
seen.second = steps();
$("digits").click();
seen.digits = $("boards").querySelectorAll(".arc-digit").length;
seen.names = [...$("names").children].map((option) => option.value);
return seen;
"""


@pytest.mark.slow
@needs_chromium
def test_a_task_of_arc_in_the_browser(tmp_path: Path) -> None:
    model = tiny(tmp_path / "run", ARC)
    task = {"train": [{"input": [[1, 2]], "output": [[3]]}], "test": [{"input": [[1, 1], [2, 3]]}, {"input": [[5]]}]}
    script = GRIDS.replace("TASK", json.dumps(task))
    seen, (answer, problem) = use(tmp_path, model, script, task | {"puzzle": "00576224"}, task)
    for found in seen.values():
        assert found["broken"] == ("The puzzle begins as JSON does, but is none: check brackets, commas and quotes.")
        assert found["nameless"].lower() == problem["error"].removeprefix("input 0: ").lower()
        assert found["demonstrations"] == 2
        assert found["captions"] == ["Input, 2 × 2"]
        assert found["outcome"].startswith("Answered after ")
        assert (found["place"], found["next"]) == ("1 of 2", "2 of 2")
        for shown, trajectory, size in zip(
            (found["first"], found["second"]), answer["trajectory"], ("2 × 2", "1 × 1"), strict=True
        ):
            assert len(shown) == len(trajectory) + 1
            for step, state in zip(shown[1:], trajectory, strict=True):
                grid = state["answer"]
                assert f">Input, {size}<" in step["board"]
                assert f"{len(grid)} × {len(grid[0]) if grid else 0}<" in step["board"]
        last = answer["answers"][1]
        assert found["digits"] == 1 + sum(map(len, last))
        assert found["names"] == ["00576224"]


LISTS = """
const seen = { hint: $("hint").textContent };
write('["search", "<b>", "search"]');
seen.drawn = [...$("boards").querySelectorAll(".input li")].map((chip) => chip.textContent);
await solve();
seen.outcome = outcome();
seen.steps = steps();
write("search nothing");
await solve();
seen.problem = outcome();
return seen;
"""


@pytest.mark.slow
@needs_chromium
def test_a_list_of_symbols_in_the_browser(tmp_path: Path) -> None:
    model = tiny(tmp_path / "run", TOOLS)
    seen, (answer, problem) = use(tmp_path, model, LISTS, ["search", "<b>", "search"], "search nothing")
    for found in seen.values():
        assert found["hint"] == "symbols: search <b> read_file"
        assert found["drawn"] == ["search", "<b>", "search", "·", "·", "·"]
        assert found["outcome"].startswith("Answered after ")
        for shown, step in zip(found["steps"][1:], answer["trajectory"][0], strict=True):
            assert shown["texts"] == ["·" if symbol is None else symbol for symbol in step["answer"]]
        assert found["problem"].lower() == problem["error"].removeprefix("input 0: ").lower()
