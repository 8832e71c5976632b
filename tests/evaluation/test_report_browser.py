"""Reports in a real browser: they load without complaint, show what was recorded, obey, and fit a phone.

Chromium prints the page after a script of ours has used it, so no driver is needed. Skipped where there is no Chromium
(Debian and Ubuntu: `apt-get install chromium`).
"""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hrm.batch import IGNORE_LABEL_ID
from hrm.evaluation.breakdown import Rating
from hrm.evaluation.report.page import write_report
from hrm.evaluation.report.recorder import Recording, kinds
from hrm.tasks.sudoku import BoxShape
from tests.helpers.browser import needs_chromium, seen_by
from tests.helpers.recordings import (
    ARC_NAMES,
    ARC_PAIRS,
    ARC_VIEW,
    TOOLS,
    arc,
    maze,
    maze_view,
    sudoku,
    sudoku_view,
    tokens_view,
    tool_names,
)

pytestmark = [pytest.mark.slow, needs_chromium]

FLAGS = [
    "--allow-file-access-from-files",  # the probe looks into frames
    "--virtual-time-budget=30000",  # waits pass at once; what is still undone then fails the test
]

# Uses the report in a frame as wide as a phone, and one as wide as a desk's screen, and notes what it sees.
PROBE = """
<!doctype html><meta charset="utf-8"><body>
<iframe id="phone" src="report.html" width="360" height="700"></iframe>
<iframe id="desk" src="report.html" width="1280" height="900"></iframe>
<script type="application/json" id="seen"></script>
<script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
addEventListener("load", async () => {
  await wait(1000);
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    const $ = (id) => page.getElementById(id);
    const status = () => $("status").textContent;
    const wrong = () => $("boards").querySelectorAll(".is-wrong").length;
    const tooWide = () => page.documentElement.scrollWidth - page.documentElement.clientWidth;
    const key = (name) => page.body.dispatchEvent(
      new frame.contentWindow.KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
    const slide = (step) => {
      $("step").value = step;
      $("step").dispatchEvent(new Event("input"));
    };
    const tiles = [...page.querySelectorAll("[data-puzzle]")];
    const puzzles = [];
    let widest = tooWide();
    for (const tile of tiles) {
      tile.click();
      const steps = [];
      for (let step = 0; step <= +$("step").max; step++) {
        slide(step);
        steps.push({ status: status(), board: $("boards").innerHTML, wrong: wrong() });
        widest = Math.max(widest, tooWide());
      }
      puzzles.push({ name: $("puzzle-name").textContent, outcome: $("outcome").textContent,
        halting: $("halting").textContent, label: tile.getAttribute("aria-label"), steps });
    }
    slide(2);
    const before = status();
    key("ArrowRight");
    const right = status();
    key("ArrowLeft");
    const left = status();
    slide(1);
    $("play").click();
    await wait(800);
    const playing = status();
    await wait(9000);
    const played = status();
    const filters = {};
    for (const button of page.querySelectorAll("[data-filter]")) {
      button.click();
      filters[button.dataset.filter] = tiles.filter((tile) => !tile.hidden).map((tile) => +tile.dataset.puzzle);
    }
    const unnamed = [...page.querySelectorAll("button, input, svg:not([aria-hidden])")].filter((element) =>
      !element.closest("[aria-hidden]") && !element.closest("label") &&
      !(element.getAttribute("aria-label") || element.textContent.trim())).map((element) => element.outerHTML);
    const charts = [...page.querySelectorAll(".chart > svg")];
    const cut = charts.flatMap((chart) => [...chart.querySelectorAll("text")].filter((text) => {
      const [box, view] = [text.getBBox(), chart.viewBox.baseVal];
      return box.x < 0 || box.x + box.width > view.width;
    })).map((text) => text.textContent);
    const panel = page.querySelector(".panel"), style = frame.contentWindow.getComputedStyle(panel);
    const room = panel.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const unused = room - panel.querySelector(".chart > svg").clientWidth;
    seen[frame.id] = { cut, unused, puzzles, widest, keys: [before, right, left], playing, played, filters, unnamed,
      inside: $("inside").hidden ? null : $("inside").textContent,
      pictures: [...page.querySelectorAll("#pictures img")].map((picture) => [picture.alt, picture.naturalWidth]),
      title: page.title, heading: $("title").textContent, totals: $("totals").textContent };
  }
  document.getElementById("seen").textContent = JSON.stringify(seen).replaceAll("<", "\\\\u003c");
});
</script>
"""


def use(folder: Path) -> dict[str, Any]:
    """What the probe saw of `<folder>/report.html`."""
    (folder / "probe.html").write_text(PROBE, encoding="utf-8")
    return seen_by(folder, (folder / "probe.html").as_uri(), *FLAGS)


def arc_report(folder: Path) -> Recording:
    result = arc(ARC_PAIRS)
    grids = [[["".join(map(str, row)) for row in grid.tolist()] for grid in pair] for pair in ARC_PAIRS]
    (_, truth), turned = grids[0], ["".join(row) for row in zip(*grids[0][1], strict=True)]
    votes = [{"grid": truth, "votes": 9, "q": 0.9}, {"grid": turned, "votes": 1, "q": 0.1}]
    details: list[dict[str, Any]] = [{"name": name} for name in ARC_NAMES]
    details[0] |= {"demonstrations": grids, "votes": votes, "allVotes": 10}
    details[1] |= {"demonstrations": [], "votes": [{"grid": [], "votes": 1, "q": 0.1}], "allVotes": 1}
    write_report(folder, result, ARC_VIEW, title="ARC", details=details, per_kind=4)
    return result


def a_picture(width: int) -> str:
    content = io.BytesIO()
    Image.new("RGB", (width, 4)).save(content, "png")
    return base64.b64encode(content.getvalue()).decode()


INSIDE = {
    "pictures": [{"title": "Paths & <b>", "text": "Where.", "png": a_picture(2000), "width": 1012}],
    "fates": [
        {"name": "7", "right": False, "settled": True, "qHalt": 0.98, "starts": [3, 4], "symmetric": [4, 4]},
        {"name": "8", "right": False, "settled": False, "qHalt": 0.01, "starts": [0, 4], "symmetric": None},
    ],
}


def sudoku_report(folder: Path, box: BoxShape) -> Recording:
    result = sudoku(box)
    rating = Rating("rating <1>", np.arange(40))
    write_report(folder, result, sudoku_view(box), title="Sudoku & <b>", rating=rating, per_kind=4, inside=INSIDE)
    return result


def maze_report(folder: Path) -> Recording:
    result = maze(30, min_length=40)
    write_report(folder, result, maze_view(30), title="Mazes", per_kind=4)
    return result


def tools_report(folder: Path) -> Recording:
    result = tool_names()
    write_report(folder, result, tokens_view(TOOLS), title="Tools" * 40, per_kind=4)
    return result


def grid_report(folder: Path) -> Recording:
    result = tool_names()
    write_report(folder, result, tokens_view(len(TOOLS), columns=3), title="A grid", per_kind=4)
    return result


REPORTS = {
    "sudoku 2x3": lambda folder: sudoku_report(folder, BoxShape(2, 3)),
    "sudoku 3x3": lambda folder: sudoku_report(folder, BoxShape(3, 3)),
    "maze": maze_report,
    "arc": arc_report,
    "tokens": tools_report,
    "token grid": grid_report,
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_in_the_browser(tmp_path: Path, kind: str) -> None:
    recording = REPORTS[kind](tmp_path)
    shown, scores = recording.shown, recording.shown.scores
    num_steps = len(shown.answers)
    labelled = shown.labels != IGNORE_LABEL_ID
    if kind == "arc":
        labelled &= shown.labels > 1  # of a grid's cells, not of its border
    wrong = ((shown.answers != shown.labels) & labelled).sum(-1)
    changed = np.concatenate([wrong[:1] * 0, ((shown.answers[1:] != shown.answers[:-1]) & labelled).sum(-1)])
    word = "token" if kind == "tokens" else "cell"

    for width, seen in use(tmp_path).items():
        assert seen["widest"] <= 0, f"scrolls sideways on a {width}"
        assert seen["unnamed"] == []
        assert seen["cut"] == [], "labels of charts"
        assert abs(seen["unused"]) <= 1, "the chart of totals is as wide as its panel"
        assert seen["title"] == seen["heading"]
        assert len(seen["puzzles"]) == len(shown.inputs)
        for row, puzzle in enumerate(seen["puzzles"]):
            name = f"Task {ARC_NAMES[row]}" if kind == "arc" else f"Puzzle {scores.index[row]}"
            assert puzzle["name"] == name
            right = bool(scores.exact[-1, row])
            assert html.unescape(puzzle["label"]) == f"{name}, {'right' if right else 'wrong'}"
            assert ("Right" in puzzle["outcome"]) == right
            if right:
                since = num_steps - int(scores.exact[::-1, row].argmin()) + 1 if not scores.exact[:, row].all() else 1
                assert puzzle["outcome"].endswith(f"from step {since}")
            halting = int(scores.halting_step()[row])
            assert (f"halt after step {halting}." in puzzle["halting"]) == (halting <= num_steps)

            cells = int(labelled[row].sum())
            many = f"{cells} {word}{'s' * (cells != 1)}"
            assert puzzle["steps"][0]["status"] == "The puzzle, before the first step"
            for step in range(1, num_steps + 1):
                count = int(wrong[step - 1, row])
                expected = f"Step {step} of {num_steps}: " + (
                    f"{count} of {many} wrong" if count else f"all {many} right"
                )
                if step > 1:
                    expected += f", {changed[step - 1, row] or 'none'} changed"
                assert puzzle["steps"][step]["status"] == expected
                before, after = (puzzle["steps"][number]["board"] for number in (step - 1, step))
                if step > 1 and changed[step - 1, row]:
                    assert before != after
                if kind == "tokens":
                    assert puzzle["steps"][step]["wrong"] == count
        assert len({step["board"] for step in seen["puzzles"][0]["steps"]}) > num_steps / 2

        before, after, back = seen["keys"]
        assert before.startswith("Step 2 ")
        assert after.startswith("Step 3 ")
        assert back == before
        assert seen["playing"].startswith("Step 2 ")
        assert seen["played"].startswith(f"Step {num_steps} ")
        filters = {kind: sorted(columns.tolist()) for kind, columns in kinds(scores, 4).items() if len(columns)}
        assert seen["filters"] == {"all": list(range(len(shown.inputs))), **filters}
        assert ("rating <1>" in seen["totals"]) == ("sudoku" in kind)
        assert seen["pictures"] == ([["Paths & <b>. Where.", 2000]] if "sudoku" in kind else [])
        assert (seen["inside"] is None) == ("sudoku" not in kind)
        if seen["inside"]:
            for words in ("rests at a wrong answer0.983 of 44 of 4", "wrong, and keeps changing0.010 of 4–"):
                assert words in seen["inside"]
