"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { view, puzzles, totals, steps, length } = data;
  const NO_LABEL = 255;
  const CELL = 10; // of every board's own units
  const COLORS = [
    "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25",
  ];
  const $ = (id) => document.getElementById(id);
  const escape = (text) =>
    String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
  const many = (n, one, more = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));

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

  // What there is to say of every token after a step (0: before the first): given, right, wrong, open or free of a
  // label; and whether the step changed it.
  function look(puzzle, step) {
    const tokens = step ? puzzle.answers[step - 1] : puzzle.input;
    const before = step > 1 ? puzzle.answers[step - 2] : null;
    const kinds = range(length).map((i) => {
      const given = view.blank !== null && puzzle.input[i] !== view.blank && puzzle.input[i] !== 0;
      if (step && puzzle.label[i] !== NO_LABEL && tokens[i] !== puzzle.label[i]) return "wrong";
      if (given) return "given";
      if (!step) return "open";
      return puzzle.label[i] === NO_LABEL ? "free" : "right";
    });
    const changed = range(length).filter((i) => before && tokens[i] !== before[i] && puzzle.label[i] !== NO_LABEL);
    const labelled = range(length).filter((i) => puzzle.label[i] !== NO_LABEL);
    const wrong = labelled.filter((i) => kinds[i] === "wrong").length;
    return { tokens, kinds, changed, wrong, cells: labelled.length };
  }

  function lookColors(puzzle, step) {
    const [rows, cols] = step ? puzzle.shapes[step - 1] : [0, 0];
    const [trueRows, trueCols] = puzzle.labelShape;
    const tokens = step ? puzzle.answers[step - 1] : null;
    const before = step > 1 ? puzzle.answers[step - 2] : null;
    const [wrong, changed, missing] = [[], [], []];
    for (let r = 0; r < Math.max(rows, trueRows); r++) {
      for (let c = 0; c < Math.max(cols, trueCols); c++) {
        const i = r * view.columns + c;
        const answered = r < rows && c < cols;
        const wanted = r < trueRows && c < trueCols;
        if (answered && (!wanted || tokens[i] !== puzzle.label[i])) wrong.push(i);
        if (wanted && !answered) missing.push(i);
        if (answered && before && tokens[i] !== before[i]) changed.push(i);
      }
    }
    return { tokens, rows, cols, wrong: wrong.length + missing.length, marks: { wrong, changed, missing }, cells: trueRows * trueCols };
  }

  const symbol = (token) => (token === NO_LABEL ? "" : view.symbols[token]);
  const seen = (puzzle, step) => (view.drawing === "colors" ? lookColors : look)(puzzle, step);

  // --- boards ---

  const at = (i, cols) => [CELL * (i % cols), CELL * Math.floor(i / cols)];
  const squares = (cells, cols, inset = 0) =>
    cells
      .map((i) => {
        const [x, y] = at(i, cols);
        const side = CELL - 2 * inset;
        return `M${x + inset} ${y + inset}h${side}v${side}h${-side}z`;
      })
      .join("");
  const corners = (cells, cols) =>
    cells.map((i) => at(i, cols)).map(([x, y]) => `M${x + CELL - 0.3} ${y + 0.3}v2.8l-2.8 -2.8z`).join("");
  const crosses = (cells, cols, reach = 2) =>
    cells
      .map((i) => at(i, cols))
      .map(([x, y]) => `M${x + 5 - reach} ${y + 5 - reach}l${2 * reach} ${2 * reach}m0 ${-2 * reach}l${-2 * reach} ${2 * reach}`)
      .join("");
  // The border of the region that cells make up.
  function outline(cells, cols) {
    const inside = new Set(cells);
    const has = (r, c) => c >= 0 && c < cols && inside.has(r * cols + c);
    return cells
      .map((i) => {
        const [r, c, x, y] = [Math.floor(i / cols), i % cols, ...at(i, cols)];
        const sides = [[r - 1, c, `M${x} ${y}h10`], [r + 1, c, `M${x} ${y + 10}h10`], [r, c - 1, `M${x} ${y}v10`], [r, c + 1, `M${x + 10} ${y}v10`]];
        return sides.filter(([row, col]) => !has(row, col)).map(([, , d]) => d).join("");
      })
      .join("");
  }
  const path = (d, name) => (d ? `<path class="${name}" d="${d}"/>` : "");
  const lines = (rows, cols, down, across) =>
    range(rows + 1).filter((r) => r % down === 0).map((r) => `M0 ${CELL * r}h${CELL * cols}`).join("") +
    range(cols + 1).filter((c) => c % across === 0).map((c) => `M${CELL * c} 0v${CELL * rows}`).join("");
  const board = (rows, cols, inner, label, margin = 0.5) =>
    `<svg class="board" viewBox="${-margin} ${-margin} ${CELL * cols + 2 * margin} ${CELL * rows + 2 * margin}" ` +
    `data-rows="${rows}" data-cols="${cols}" ${label ? `role="img" aria-label="${escape(label)}"` : 'aria-hidden="true"'}>${inner}</svg>`;
  const only = (kinds, kind) => range(length).filter((i) => kinds[i] === kind);

  function symbolBoard({ tokens, kinds, changed }, label) {
    const cols = view.columns;
    const rows = Math.ceil(length / cols);
    const [boxRows, boxCols] = view.box || [rows, cols];
    const widest = Math.max(...view.symbols.map((symbol) => symbol.length));
    const size = widest > 2 ? ` style="font-size:${(13 / widest).toFixed(1)}px"` : "";
    const text = range(length).map((i) => {
      const [x, y] = at(i, cols);
      return `<text class="${kinds[i]}-digit" x="${x + 5}" y="${y + 5.2}"${size}>${escape(symbol(tokens[i]))}</text>`;
    });
    return board(
      rows,
      cols,
      `<path class="surface" d="M0 0h${CELL * cols}v${CELL * rows}H0z"/>` +
        path(squares(only(kinds, "given"), cols), "given") +
        path(squares(changed, cols), "changed") +
        path(lines(rows, cols, 1, 1), "thin") +
        path(lines(rows, cols, boxRows, boxCols), "thick") +
        path(corners(changed, cols), "corner") +
        path(squares(only(kinds, "wrong"), cols, 1.1), "wrong-box") +
        text.join(""),
      label,
    );
  }

  function pathBoard(puzzle, { tokens, kinds, changed }, label, marks = true) {
    const cols = view.columns;
    const rows = length / cols;
    const [wall, start, goal, way] = ["#", "S", "G", "o"].map((symbol) => view.symbols.indexOf(symbol));
    const cells = (test) => range(length).filter(test);
    const good = (i) => kinds[i] !== "wrong" && [start, goal, way].includes(tokens[i]);
    const segments = range(length).flatMap((i) => {
      const [x, y] = at(i, cols);
      const middle = `M${x + 5} ${y + 5}`;
      const right = good(i) && (i + 1) % cols && good(i + 1) && [i, i + 1].some((j) => tokens[j] === way);
      const down = good(i) && i + cols < length && good(i + cols) && [i, i + cols].some((j) => tokens[j] === way);
      return [tokens[i] === way && good(i) ? `${middle}h0` : "", right ? `${middle}h10` : "", down ? `${middle}v10` : ""];
    });
    const missed = cells((i) => kinds[i] === "wrong" && puzzle.label[i] === way);
    const wrong = cells((i) => kinds[i] === "wrong" && puzzle.label[i] !== way);
    const rings = missed.map((i) => at(i, cols)).map(([x, y]) => `M${x + 2.6} ${y + 5}a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0 -4.8 0`);
    const ends = cells((i) => [start, goal].includes(puzzle.input[i])).map((i) => {
      const [x, y] = at(i, cols);
      const isGoal = puzzle.input[i] === goal;
      const shape = isGoal
        ? `<rect class="goal" x="${x + 0.4}" y="${y + 0.4}" width="9.2" height="9.2" rx="1.5"/>`
        : `<circle class="start" cx="${x + 5}" cy="${y + 5}" r="4.2"/>`;
      const letter = `<text class="end-letter${isGoal ? " on-goal" : ""}" x="${x + 5}" y="${y + 5.3}">${view.symbols[puzzle.input[i]]}</text>`;
      return shape + letter;
    });
    return board(
      rows,
      cols,
      `<path class="surface" d="M0 0h${CELL * cols}v${CELL * rows}H0z"/>` +
        (marks ? path(squares(changed, cols), "changed") : "") +
        (marks ? path(lines(rows, cols, 1, 1), "thin") : "") +
        path(squares(cells((i) => puzzle.input[i] === wall), cols, -0.05), "wall") +
        path(lines(rows, cols, rows, cols), "thick") +
        path(segments.join(""), "way") +
        path(rings.join(""), "missed") +
        path(crosses(wrong, cols), "cross") +
        (marks ? path(corners(changed, cols), "corner") : "") +
        ends.join(""),
      label,
    );
  }

  // `color(r, c)` of a grid, and lists of cells to mark, as places in the model's square.
  function colorBoard(rows, cols, color, label, marks = {}) {
    const [wrong, changed, missing] = ["wrong", "changed", "missing"].map((name) =>
      (marks[name] || []).map((i) => [Math.floor(i / view.columns), i % view.columns]),
    );
    const height = Math.max(rows, 1, ...missing.map(([r]) => r + 1));
    const width = Math.max(cols, 1, ...missing.map(([, c]) => c + 1));
    const place = (cells) => cells.map(([r, c]) => r * width + c);
    const byColor = COLORS.map(() => []);
    const digits = [];
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < cols; c++) {
        byColor[color(r, c)].push(r * width + c);
        if (label && $("digits").checked) {
          digits.push(`<text class="arc-digit" x="${CELL * c + 5}" y="${CELL * r + 5.2}">${color(r, c)}</text>`);
        }
      }
    }
    const grid = range(rows + 1).map((r) => `M0 ${CELL * r}h${CELL * cols}`).join("") +
      range(cols + 1).map((c) => `M${CELL * c} 0v${CELL * rows}`).join("");
    return board(
      height,
      width,
      byColor.map((cells, number) => (cells.length ? `<path fill="${COLORS[number]}" d="${squares(cells, width)}"/>` : "")).join("") +
        (rows ? path(grid, "arc-lines") + path(`M0 0h${CELL * cols}v${CELL * rows}H0z`, "arc-frame") : "") +
        path(outline(place(missing), width), "arc-missing") +
        path(corners(place(changed), width), "arc-corner") +
        path(crosses(place(wrong), width), "mark-under") +
        path(crosses(place(wrong), width), "mark-over") +
        digits.join(""),
      label,
    );
  }
  const colorsOf = (tokens) => (r, c) => +view.symbols[tokens[r * view.columns + c]];
  const colorGrid = (grid, label) => colorBoard(grid.length, grid.length ? grid[0].length : 0, (r, c) => +grid[r][c], label);

  function chips({ tokens, kinds, changed }) {
    const names = { right: "right", wrong: "wrong", free: "not asked for", given: "given", open: "" };
    return `<ol class="chips">${range(length)
      .map((i) => {
        const isChanged = changed.includes(i);
        const spoken = [names[kinds[i]], isChanged ? "changed" : ""].filter(Boolean).join(", ");
        return `<li class="chip is-${kinds[i]}${isChanged ? " is-changed" : ""}" title="${spoken}">${escape(symbol(tokens[i])) || "·"}</li>`;
      })
      .join("")}</ol>`;
  }

  const plain = (tokens) => ({ tokens, kinds: range(length).map((i) => (tokens[i] === NO_LABEL ? "free" : "plain")), changed: [] });
  const figure = (name, caption, inner) => `<figure class="${name}">${caption ? `<figcaption>${caption}</figcaption>` : ""}${inner}</figure>`;

  function boards(puzzle, step, state, label) {
    if (view.drawing === "colors") {
      const answer = step
        ? colorBoard(state.rows, state.cols, colorsOf(state.tokens), label, state.marks)
        : colorBoard(0, 0, null, "No answer yet", { missing: state.marks.missing });
      const size = ([rows, cols]) => `${rows} × ${cols}`;
      return (
        figure("input", `Input, ${size(puzzle.inputShape)}`, colorBoard(...puzzle.inputShape, colorsOf(puzzle.input), "Input")) +
        figure("answer", step ? `Answer after step ${step}, ${size([state.rows, state.cols])}` : "No answer yet", answer) +
        figure("truth", `Truth, ${size(puzzle.labelShape)}`, colorBoard(...puzzle.labelShape, colorsOf(puzzle.label), "Truth"))
      );
    }
    if (view.drawing === "path") return figure("answer", "", pathBoard(puzzle, state, label));
    if (view.blank !== null) return figure("answer", "", symbolBoard(state, label));
    const draw = view.columns ? symbolBoard : chips;
    const answer = step ? draw(state, label) : draw(plain(new Uint8Array(length).fill(NO_LABEL)), "No answer yet");
    return (
      figure("input", "Input", draw(plain(puzzle.input), "Input")) +
      figure("answer", step ? `Answer after step ${step}` : "No answer yet", answer) +
      figure("truth", "Truth", draw(plain(puzzle.label), "Truth"))
    );
  }

  function thumbnail(puzzle) {
    const state = seen(puzzle, steps);
    if (view.drawing === "colors") return colorBoard(state.rows, state.cols, colorsOf(state.tokens), "", { missing: state.rows ? [] : [0] });
    if (view.drawing === "path") return pathBoard(puzzle, state, "", false);
    const cols = view.columns || Math.ceil(Math.sqrt(length));
    const rows = Math.ceil(length / cols);
    return board(
      rows,
      cols,
      path(squares(only(state.kinds, "given"), cols, 0.8), "small-given") +
        path(squares(only(state.kinds, "right"), cols, 0.8), "small-right") +
        path(squares(only(state.kinds, "wrong"), cols, 0.8), "small-wrong"),
      "",
    );
  }

  // --- charts ---

  // Lines over ACT steps 1..T. `series`: [{name, values}], the second dashed; `flag`: {step, text}; `width` in pixels.
  function lineChart({ series, top, format, current, flag, label, width = 320 }) {
    const [height, left, right, above, below] = [Math.max(132, Math.round(width / 3)), 46, 12, 18, 20];
    const x = (step) => left + ((width - left - right) * (step - 1)) / Math.max(steps - 1, 1);
    const y = (value) => height - below - ((height - above - below) * value) / top;
    const every = Math.ceil(steps / 10);
    const grid = [0, top / 2, top]
      .map((v) => `<line class="axis" x1="${left}" x2="${width - right}" y1="${y(v)}" y2="${y(v)}"/><text x="${left - 6}" y="${y(v) + 4}" text-anchor="end">${format(v)}</text>`)
      .join("");
    const ticks = range(steps)
      .map((t) => t + 1)
      .filter((step) => step % every === 0)
      .map((step) => `<text x="${x(step)}" y="${height - 4}" text-anchor="middle">${step}</text>`)
      .join("");
    const drawn = series
      .map(({ values }, number) => {
        const points = values.map((value, t) => `${x(t + 1).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
        const dots = number ? "" : values.map((value, t) => `<circle class="dot" cx="${x(t + 1)}" cy="${y(value)}" r="2.5"/>`).join("");
        return `<polyline class="line${number ? " second" : ""}" points="${points}"/>${dots}`;
      })
      .reverse()
      .join("");
    let marks = "";
    if (flag) {
      const anchor = flag.step <= 1 + (steps - 1) * 0.3 ? "start" : flag.step >= 1 + (steps - 1) * 0.7 ? "end" : "middle";
      marks += `<line class="flag" x1="${x(flag.step)}" x2="${x(flag.step)}" y1="${above - 4}" y2="${y(0)}"/><text class="on-line" x="${x(flag.step)}" y="10" text-anchor="${anchor}">${flag.text}</text>`;
    }
    if (current) {
      const value = series[0].values[current - 1];
      marks += `<line class="cursor" x1="${x(current)}" x2="${x(current)}" y1="${above}" y2="${y(0)}"/>`;
      marks += `<circle class="dot current" cx="${x(current)}" cy="${y(value)}" r="6"/>`;
    }
    const samples = series.length > 1
      ? `<div class="samples">${series.map(({ name }, n) => `<span><svg viewBox="0 0 22 8" aria-hidden="true"><line class="line${n ? " second" : ""}" x1="0" x2="22" y1="4" y2="4"/></svg>${name}</span>`).join("")}</div>`
      : "";
    return `${samples}<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(label)}" data-left="${left}" data-right="${width - right}" data-width="${width}">${grid}${ticks}${drawn}${marks}</svg>`;
  }

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

  // --- the page ---

  const cellWord = !view.columns ? "token" : "cell";
  let chosen = 0;
  let step = 1;
  let timer = null;
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

  function showLegend() {
    const icon = (inner) => `<svg class="board" viewBox="-0.5 -0.5 11 11" aria-hidden="true">${inner}</svg>`;
    const frame = '<path class="thin" d="M0 0h10v10H0z"/>';
    const digit = (kind, symbol) => `<text class="${kind}-digit" x="5" y="5.2">${symbol}</text>`;
    const changed = `<path class="changed" d="M0 0h10v10H0z"/>${frame}<path class="corner" d="M9.7 .3v3.2l-3.2 -3.2z"/>`;
    const wrongDigit = `${frame}<path class="wrong-box" d="${squares([0], 1, 1.1)}"/>${digit("wrong", 5)}`;
    const entries = {
      over: [
        [`<path class="given" d="M0 0h10v10H0z"/>${frame}${digit("given", 5)}`, "given"],
        [frame + digit("right", 5), "right"],
        [wrongDigit, "wrong"],
        [changed, "just changed"],
      ],
      path: [
        ['<path class="way" d="M0 5h10"/>', "right"],
        ['<path class="cross" d="M3 3l4 4m0 -4l-4 4"/>', "wrong"],
        ['<circle class="missed" cx="5" cy="5" r="2.4"/>', "path missed"],
        [changed, "just changed"],
      ],
      colors: [
        [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/>`, "right"],
        [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/><path class="mark-under" d="M3 3l4 4m0 -4l-4 4"/><path class="mark-over" d="M3 3l4 4m0 -4l-4 4"/>`, "wrong"],
        ['<path class="arc-missing" d="M1 1h8v8h-8z"/>', "missing"],
        [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/><path class="arc-corner" d="M9.7 .3v3.2l-3.2 -3.2z"/>`, "just changed"],
      ],
      beside: [
        [frame + digit("right", "a"), "right"],
        [wrongDigit.replace(">5<", ">a<"), "wrong"],
        [changed, "just changed"],
      ],
    };
    const drawn = view.drawing === "symbols" ? (view.blank !== null ? "over" : "beside") : view.drawing;
    $("legend").innerHTML = entries[drawn].map(([inner, text]) => `<li>${icon(inner)}${text}</li>`).join("");
    $("digits-option").hidden = view.drawing !== "colors";
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
        return `<button class="tile" data-puzzle="${n}" aria-label="${escape(label)}"><span class="thumb">${thumbnail(puzzle)}</span><span>${mark} ${escape(puzzle.name || puzzle.index)}</span></button>`;
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
    showStep();
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
      const pairs = puzzle.demonstrations.map(
        ([input, output], n) =>
          `<div class="pair"><div class="small">${colorGrid(input, `Demonstration ${n + 1}, input`)}</div><span aria-hidden="true">→</span><div class="small">${colorGrid(output, `Demonstration ${n + 1}, output`)}</div></div>`,
      );
      parts.push(`<div><h3>Demonstrations</h3><div class="pairs">${pairs.join("")}</div></div>`);
    }
    $("task").innerHTML = parts.join("");
    $("task").hidden = !parts.length;
  }

  function showStep() {
    const puzzle = puzzles[chosen];
    const state = seen(puzzle, step);
    const changed = state.changed || state.marks.changed;
    const summary = step
      ? `Step ${step} of ${steps}: ${state.wrong ? `${state.wrong} of ${many(state.cells, cellWord)} wrong` : `all ${many(state.cells, cellWord)} right`}` +
        (step > 1 ? `, ${changed.length || "none"} changed` : "")
      : "The puzzle, before the first step";
    $("boards").className = `boards ${view.blank !== null ? "over" : view.drawing === "colors" || view.columns ? "beside" : "lists"}`;
    $("boards").innerHTML = boards(puzzle, step, state, summary);
    $("status").textContent = summary;
    $("step").value = step;
    $("step").setAttribute("aria-valuetext", summary);
    $("ticks").querySelectorAll("span").forEach((tick) => tick.classList.toggle("is-current", +tick.dataset.step === step));
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
  }

  function goTo(wanted) {
    step = Math.min(Math.max(wanted, 0), steps);
    showStep();
  }

  function choose(number) {
    chosen = number;
    stop();
    showPuzzle();
  }

  function turn(by) {
    const shown = visible();
    choose(shown[(shown.indexOf(chosen) + by + shown.length) % shown.length]);
  }

  const ICONS = { Play: "M3 1v14l12-7z", Pause: "M2 1h4v14H2zM10 1h4v14h-4z" };
  function setPlay(name) {
    $("play").setAttribute("aria-label", name);
    $("play").innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[name]}"/></svg>`;
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    setPlay("Play");
  }
  function play() {
    if (timer) return stop();
    if (step === steps) goTo(0);
    setPlay("Pause");
    timer = setInterval(() => {
      goTo(step + 1);
      if (step === steps) stop();
    }, 700);
  }

  // What the cell under the pointer holds.
  function read(event) {
    const drawing = event.target.closest("svg[data-rows]");
    if (!drawing || !view.columns) return;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const [row, column] = [Math.floor(point.y / CELL), Math.floor(point.x / CELL)];
    if (row < 0 || column < 0 || row >= +drawing.dataset.rows || column >= +drawing.dataset.cols) return;
    const puzzle = puzzles[chosen];
    const i = row * view.columns + column;
    const part = drawing.closest("figure").className;
    const tokens = part === "input" || !step ? puzzle.input : part === "truth" ? puzzle.label : puzzle.answers[step - 1];
    const name = (token) => (token === NO_LABEL ? "nothing" : { " ": "free", "": "blank" }[view.symbols[token]] || view.symbols[token]);
    const wrong = part === "answer" && step && puzzle.label[i] !== NO_LABEL && tokens[i] !== puzzle.label[i];
    $("readout").textContent = `Row ${row + 1}, column ${column + 1}: ${name(tokens[i])}${wrong ? `, should be ${name(puzzle.label[i])}` : ""}`;
  }

  await unpack();
  const last = puzzles.findIndex((puzzle) => puzzle.tags.includes("slow"));
  chosen = Math.max(last, 0);
  $("step").max = steps;
  const every = Math.ceil(steps / 10);
  $("ticks").innerHTML = range(steps + 1)
    .filter((t) => t % every === 0)
    .map((t) => `<span data-step="${t}" style="left:${(100 * t) / steps}%">${t}</span>`)
    .join("");
  $("wrong-title").textContent = `Wrong ${cellWord}s`;
  setPlay("Play");
  showFigures();
  showTotals();
  showInside();
  showLegend();
  showTiles();
  showPuzzle();

  $("play").addEventListener("click", play);
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("digits").addEventListener("change", showPuzzle);
  $("step").addEventListener("input", () => {
    stop();
    goTo(+$("step").value);
  });
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
  $("boards").addEventListener("pointermove", read);
  $("boards").addEventListener("pointerdown", read);
  document.querySelectorAll(".pickable").forEach((chart) =>
    chart.addEventListener("click", (event) => {
      const drawing = event.target.closest("svg[data-left]");
      if (!drawing) return;
      const { left, right, width } = drawing.dataset;
      const box = drawing.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      stop();
      goTo(Math.max(1, 1 + Math.round(((x - left) / (right - left)) * (steps - 1))));
    }),
  );
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input")) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      stop();
      goTo(step + by);
    } else if (event.key === " " && !event.target.closest("button")) play();
    else return;
    event.preventDefault();
  });
})();
