"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { view, puzzles, totals, steps, length } = data;
  const { boards, cellWord, colorGrid, colorsOf, demonstrations, layout, legend, look, read, seen, summary, thumbnail } =
    drawing(view, length);

  // --- the recorded tokens ---

  async function unpack() {
    const bytes = Uint8Array.from(atob(data.tokens), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const tokens = new Uint8Array(await new Response(stream).arrayBuffer());
    puzzles.forEach((puzzle, number) => {
      const row = (i) => tokens.subarray((number * (2 + steps) + i) * length, (number * (2 + steps) + i + 1) * length);
      puzzle.input = row(0);
      puzzle.label = row(1);
      puzzle.answers = range(steps).map((t) => row(2 + t));
      for (let t = 1; t < steps; t++) puzzle.answers[t].forEach((_, i, answer) => (answer[i] += puzzle.answers[t - 1][i]));
    });
  }

  // --- the page ---

  function bars(title, lead, first, rows) {
    const most = Math.max(...rows.map((row) => row.count));
    const body = rows
      .map(({ label, count, right }) => {
        const share = right / count;
        return `<tr><th scope="row">${escape(label)}</th><td class="bar-cell"><span class="bar" style="width:${(100 * count) / most}%;--share:${100 * share}%"></span></td><td>${percent(share, 0)}</td><td>${count.toLocaleString("en")}</td></tr>`;
      })
      .join("");
    return `<div class="panel"><h3>${title}</h3><p class="muted">${lead}</p><table><thead><tr><th scope="col">${first}</th><td></td><th scope="col">right</th><th scope="col">puzzles</th></tr></thead><tbody>${body}</tbody></table></div>`;
  }

  let chosen = 0;
  let filter = "all";

  function haltingStep(puzzle) {
    const first = puzzle.qHalt.findIndex((q, t) => q > puzzle.qContinue[t]);
    return first < 0 ? null : first + 1;
  }

  function showFigures() {
    const last = steps - 1;
    const figures = [
      [percent(totals.exact[last]), `puzzles exactly right after ${many(steps, "step")}`],
      [percent(totals.cells[last]), `${cellWord}s right`],
      [totals.halt.steps.toFixed(1), `steps of ${steps} on average if it halts by itself, ${percent(totals.halt.exact)} right`],
      [totals.count.toLocaleString("en"), "puzzles"],
    ];
    $("title").textContent = data.title;
    $("subtitle").textContent = data.subtitle;
    $("figures").innerHTML = figures.map(([value, name]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`).join("");
  }

  function showTotals() {
    const [exact, cells] = [totals.exact, totals.cells];
    const panels = [
      '<div class="panel"><h3>Accuracy by ACT step</h3><div class="chart" id="totals-chart"></div></div>',
      bars("Accuracy by steps used", "How long it thinks before q halt exceeds q continue, and how often its answer is right then.", "steps", totals.byUsed),
    ];
    for (const by of [totals.byRating, totals.bySource].filter(Boolean)) {
      const name = escape(by.name);
      panels.push(bars(`Accuracy by ${name}`, `After ${many(steps, "step")}.`, name, by.bars));
    }
    $("totals").innerHTML = panels.join("");
    const draw = () => {
      $("totals-chart").innerHTML = lineChart({
        series: [{ name: "puzzles exactly right", values: exact }, { name: `${cellWord}s right`, values: cells }],
        top: 1,
        format: (v) => percent(v, 0),
        label: `Puzzles exactly right by step: ${exact.map((v) => percent(v)).join(", ")}`,
        width: $("totals-chart").clientWidth || undefined, // as wide as its panel, text of one size
      });
    };
    draw();
    addEventListener("resize", draw);
  }

  function showInside() {
    const { inside } = data;
    if (!inside || !inside.pictures.length) return;
    $("inside").hidden = false;
    $("inside-lead").textContent =
      "What happens between the puzzle and the answer, on a handful of the puzzles above. The states are vectors, one " +
      "for each token, that every ACT step hands to the next; the answer is read from the last one that it updates.";
    const of = (pair) => (pair ? `${pair[0]} of ${pair[1]}` : "–");
    const ends = ({ right, settled }) =>
      right ? "rests at the right answer" : settled ? "rests at a wrong answer" : "wrong, and keeps changing";
    const rows = inside.fates.map((fate) => {
      const mark = fate.right ? '<b class="right-text">✓</b>' : '<b class="wrong-text">✗</b>';
      return `<tr><th scope="row">${escape(fate.name)}</th><td>${mark} ${ends(fate)}</td><td>${fate.qHalt.toFixed(2)}</td><td>${of(fate.starts)}</td><td>${of(fate.symmetric)}</td></tr>`;
    });
    const heads = ["puzzle", `after ${many(steps, "step")}`, "q halt", "right from other starts", "right as symmetric puzzles"];
    $("fates").innerHTML = rows.length
      ? `<div class="panel"><h3>What becomes of them, and what another start does</h3><table><thead><tr>${heads.map((head) => `<th scope="col">${head}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table></div>`
      : "";
    for (const { title, text, png, width } of inside.pictures) {
      const panel = document.createElement("figure");
      panel.className = "panel";
      panel.innerHTML = `<figcaption><h3>${escape(title)}</h3><p class="muted">${escape(text)}</p></figcaption>`;
      const picture = new Image();
      picture.width = width;
      picture.alt = `${title}. ${text}`;
      picture.src = `data:image/png;base64,${png}`;
      panel.append(picture);
      $("pictures").append(panel);
    }
  }

  const visible = () => range(puzzles.length).filter((n) => filter === "all" || puzzles[n].tags.includes(filter));
  const isRight = (puzzle) => look(puzzle, steps).wrong === 0;

  function showTiles() {
    const names = { all: "All", slow: "Solved last", right: "Right", wrong: "Wrong" };
    const count = (kind) => puzzles.filter((puzzle) => kind === "all" || puzzle.tags.includes(kind)).length;
    $("filters").innerHTML = Object.keys(names)
      .filter(count)
      .map((kind) => `<button data-filter="${kind}">${names[kind]} <span class="muted">${count(kind)}</span></button>`)
      .join("");
    $("tiles").innerHTML = puzzles
      .map((puzzle, n) => {
        const right = isRight(puzzle);
        const mark = right ? '<b class="right-text">✓</b>' : '<b class="wrong-text">✗</b>';
        const label = `${title(puzzle)}, ${right ? "right" : "wrong"}`;
        return `<button class="tile" data-puzzle="${n}" aria-label="${escape(label)}"><span class="thumb">${thumbnail(puzzle, steps)}</span><span>${mark} ${escape(puzzle.name || puzzle.index)}</span></button>`;
      })
      .join("");
  }

  const title = (puzzle) => (puzzle.name ? `Task ${puzzle.name}` : `Puzzle ${puzzle.index}`);

  function showPuzzle() {
    const puzzle = puzzles[chosen];
    const shown = visible();
    $("puzzle-name").textContent = title(puzzle);
    $("place").textContent = `${shown.indexOf(chosen) + 1} of ${shown.length}`;
    const wrong = range(steps).map((t) => look(puzzle, t + 1).wrong);
    const since = steps - [...wrong].reverse().findIndex((n) => n > 0); // steps before it are not all right
    const valid = puzzle.keepsRules && puzzle.keepsRules[0].toUpperCase() + puzzle.keepsRules.slice(1);
    $("outcome").innerHTML = valid && wrong[steps - 1]
      ? `<b class="right-text">✓ ${escape(valid)}</b>, another than the label’s`
      : wrong[steps - 1]
      ? `<b class="wrong-text">✗ Wrong</b> after ${many(steps, "step")}`
      : `<b class="right-text">✓ Right</b> from step ${wrong.some((n) => n > 0) ? since + 1 : 1}`;
    const halt = haltingStep(puzzle);
    $("halting").textContent = halt ? `It would halt after step ${halt}.` : `It would not halt by itself within ${many(steps, "step")}.`;
    document.querySelectorAll("[data-puzzle]").forEach((tile) => {
      tile.setAttribute("aria-pressed", +tile.dataset.puzzle === chosen);
      tile.hidden = !shown.includes(+tile.dataset.puzzle);
    });
    document.querySelectorAll("[data-filter]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.filter === filter));
    showTask(puzzle);
    play.goTo(play.step);
  }

  function showTask(puzzle) {
    const parts = [];
    if (puzzle.votes && puzzle.votes.length) {
      const truth = range(puzzle.labelShape[0]).map((r) => range(puzzle.labelShape[1]).map((c) => colorsOf(puzzle.label)(r, c)).join(""));
      const answers = puzzle.votes.map(({ grid, votes, q }, n) => {
        const right = grid.join() === truth.join();
        const mark = right ? '<b class="right-text">✓ right</b>' : '<b class="wrong-text">✗ wrong</b>';
        const caption = `${n ? "Second" : "First"} choice ${mark}<br>${votes} of ${many(puzzle.allVotes, "vote")}, q ${q.toFixed(2)}`;
        const drawn = grid.length ? colorGrid(grid, `${n ? "Second" : "First"} choice`) : "empty";
        return `<figure><figcaption>${caption}</figcaption><div class="small">${drawn}</div></figure>`;
      });
      parts.push(`<div><h3>Voted over all augmentations</h3><div class="pairs">${answers.join("")}</div></div>`);
    }
    if (puzzle.demonstrations && puzzle.demonstrations.length) {
      parts.push(demonstrations(puzzle.demonstrations));
    }
    $("task").innerHTML = parts.join("");
    $("task").hidden = !parts.length;
  }

  function showStep(step) {
    const puzzle = puzzles[chosen];
    const sentence = summary(puzzle, step, steps);
    $("boards").className = `boards ${layout()}`;
    $("boards").innerHTML = boards(puzzle, step, seen(puzzle, step), sentence);
    $("readout").textContent = "";
    const halt = haltingStep(puzzle);
    const q = puzzle.qHalt.map(sigmoid);
    $("q-chart").innerHTML = lineChart({
      series: [{ name: "q halt", values: q }, { name: "q continue", values: puzzle.qContinue.map(sigmoid) }],
      top: 1,
      format: (v) => v.toFixed(1),
      current: step,
      flag: halt && { step: halt, text: "halts" },
      label: `q halt by step: ${q.map((v) => v.toFixed(2)).join(", ")}`,
    });
    const wrong = range(steps).map((t) => seen(puzzle, t + 1).wrong);
    const peak = Math.max(2, ...wrong);
    const top = peak + (peak % 2);
    $("wrong-chart").innerHTML = lineChart({
      series: [{ name: "", values: wrong }],
      top,
      format: (v) => v,
      current: step,
      label: `Wrong ${cellWord}s by step: ${wrong.join(", ")}`,
    });
    return sentence;
  }

  function choose(number) {
    chosen = number;
    play.stop();
    showPuzzle();
  }

  function turn(by) {
    const shown = visible();
    choose(shown[(shown.indexOf(chosen) + by + shown.length) % shown.length]);
  }

  function readOut(event) {
    const sentence = read(event, puzzles[chosen], play.step);
    if (sentence) $("readout").textContent = sentence;
  }

  await unpack();
  const last = puzzles.findIndex((puzzle) => puzzle.tags.includes("slow"));
  chosen = Math.max(last, 0);
  $("wrong-title").textContent = `Wrong ${cellWord}s`;
  $("legend").innerHTML = legend(true);
  $("digits-option").hidden = view.drawing !== "colors";
  const play = player(showStep);
  play.setSteps(steps);
  showFigures();
  showTotals();
  showInside();
  showTiles();
  showPuzzle();
  play.goTo(1);

  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("digits").addEventListener("change", showPuzzle);
  $("tiles").addEventListener("click", (event) => {
    const tile = event.target.closest("[data-puzzle]");
    if (tile) choose(+tile.dataset.puzzle);
  });
  $("filters").addEventListener("click", (event) => {
    const button = event.target.closest("[data-filter]");
    if (!button) return;
    filter = button.dataset.filter;
    if (!visible().includes(chosen)) chosen = visible()[0];
    showPuzzle();
  });
  $("boards").addEventListener("pointermove", readOut);
  $("boards").addEventListener("pointerdown", readOut);
})();
