"use strict";
// Puzzles and answers, drawn and played: what reports and the service's page have in common.

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

// --- shapes ---

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
const only = (kinds, kind) => range(kinds.length).filter((i) => kinds[i] === kind);
const figure = (name, caption, inner) => `<figure class="${name}">${caption ? `<figcaption>${caption}</figcaption>` : ""}${inner}</figure>`;

// --- boards ---

// How puzzles of `length` tokens are drawn. `view`: as `hrm.tasks.base.View`, and in `result` what an answer that keeps
// the rules is.
function drawing(view, length) {
  // What there is to say of every token after a step (0: before the first): given, right, wrong, open or free of a
  // label; and whether the step changed it. Where there is no label (null), what breaks the rules is wrong, and all else
  // counts as right: `broken` lists such cells by step, if the rules tell of cells.
  function look(puzzle, step) {
    const { input, label } = puzzle;
    const tokens = step ? puzzle.answers[step - 1] : input;
    const before = step > 1 ? puzzle.answers[step - 2] : null;
    const isAsked = (i) => !label || label[i] !== NO_LABEL;
    const isWrong = label ? (i) => isAsked(i) && tokens[i] !== label[i] : breaks(puzzle, step, tokens);
    const kinds = range(length).map((i) => {
      const given = view.blank !== null && input[i] !== view.blank && input[i] !== 0;
      if (step && isWrong(i)) return "wrong";
      if (given) return "given";
      if (!step) return "open";
      return isAsked(i) ? "right" : "free";
    });
    const changed = range(length).filter((i) => before && tokens[i] !== before[i] && isAsked(i));
    return { tokens, kinds, changed, wrong: only(kinds, "wrong").length, cells: range(length).filter(isAsked).length };
  }

  function breaks(puzzle, step, tokens) {
    if (view.drawing === "path") {
      const way = view.symbols.indexOf("o");
      return (i) => tokens[i] !== puzzle.input[i] && !(puzzle.input[i] === view.blank && tokens[i] === way);
    }
    const broken = new Set(step && puzzle.broken ? puzzle.broken[step - 1] : []);
    return (i) => broken.has(i);
  }

  function lookColors(puzzle, step) {
    const [rows, cols] = step ? puzzle.shapes[step - 1] : [0, 0];
    const [trueRows, trueCols] = puzzle.label ? puzzle.labelShape : [rows, cols];
    const tokens = step ? puzzle.answers[step - 1] : null;
    const before = step > 1 ? puzzle.answers[step - 2] : null;
    const [wrong, changed, missing] = [[], [], []];
    for (let r = 0; r < Math.max(rows, trueRows); r++) {
      for (let c = 0; c < Math.max(cols, trueCols); c++) {
        const i = r * view.columns + c;
        const answered = r < rows && c < cols;
        const wanted = r < trueRows && c < trueCols;
        if (answered && (!wanted || (puzzle.label && tokens[i] !== puzzle.label[i]))) wrong.push(i);
        if (wanted && !answered) missing.push(i);
        if (answered && before && tokens[i] !== before[i]) changed.push(i);
      }
    }
    return { tokens, rows, cols, wrong: wrong.length + missing.length, marks: { wrong, changed, missing }, cells: trueRows * trueCols };
  }

  const symbol = (token) => view.symbols[token] ?? "";
  const seen = (puzzle, step) => (view.drawing === "colors" ? lookColors : look)(puzzle, step);

  function symbolBoard({ tokens, kinds, changed }, label) {
    const cols = view.columns;
    const rows = Math.ceil(length / cols);
    const [boxRows, boxCols] = view.box || [rows, cols];
    const widest = Math.max(...view.symbols.map((symbol) => symbol.length));
    const size = widest > 2 ? ` font-size="${(13 / widest).toFixed(1)}"` : "";
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
    const isMissed = (i) => kinds[i] === "wrong" && puzzle.label !== null && puzzle.label[i] === way;
    const missed = cells(isMissed);
    const wrong = cells((i) => kinds[i] === "wrong" && !isMissed(i));
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

  // Pairs of grids [input, output] of an ARC task.
  function demonstrations(pairs) {
    const drawn = pairs.map(
      ([input, output], n) =>
        `<div class="pair"><div class="small">${colorGrid(input, `Demonstration ${n + 1}, input`)}</div><span aria-hidden="true">→</span><div class="small">${colorGrid(output, `Demonstration ${n + 1}, output`)}</div></div>`,
    );
    return `<div><h3>Demonstrations</h3><div class="pairs">${drawn.join("")}</div></div>`;
  }

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

  const plain = (tokens) => ({ tokens, kinds: range(length).map((i) => (tokens[i] === null || tokens[i] === NO_LABEL ? "free" : "plain")), changed: [] });

  function boards(puzzle, step, state, label) {
    if (view.drawing === "colors") {
      const answer = step
        ? colorBoard(state.rows, state.cols, colorsOf(state.tokens), label, state.marks)
        : colorBoard(0, 0, null, "No answer yet", { missing: state.marks.missing });
      const size = ([rows, cols]) => `${rows} × ${cols}`;
      const truth = puzzle.label && colorBoard(...puzzle.labelShape, colorsOf(puzzle.label), "Truth");
      return (
        figure("input", `Input, ${size(puzzle.inputShape)}`, colorBoard(...puzzle.inputShape, colorsOf(puzzle.input), "Input")) +
        figure("answer", step ? `Answer after step ${step}, ${size([state.rows, state.cols])}` : "No answer yet", answer) +
        (truth ? figure("truth", `Truth, ${size(puzzle.labelShape)}`, truth) : "")
      );
    }
    if (view.drawing === "path") return figure("answer", "", pathBoard(puzzle, state, label));
    if (view.blank !== null) return figure("answer", "", symbolBoard(state, label));
    const draw = view.columns ? symbolBoard : chips;
    const answer = step ? draw(state, label) : draw(plain(new Array(length).fill(null)), "No answer yet");
    return (
      figure("input", "Input", draw(plain(puzzle.input), "Input")) +
      figure("answer", step ? `Answer after step ${step}` : "No answer yet", answer) +
      (puzzle.label ? figure("truth", "Truth", draw(plain(puzzle.label), "Truth")) : "")
    );
  }

  // How boards() arranges its figures.
  const layout = () => {
    if (view.blank !== null) return "over";
    return view.drawing === "colors" || view.columns ? "beside" : "lists";
  };

  function thumbnail(puzzle, step) {
    const state = seen(puzzle, step);
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

  // What the marks mean, as list items. `labelled`: whether there are labels to be right or wrong by.
  function legend(labelled) {
    const icon = (inner) => `<svg class="board" viewBox="-0.5 -0.5 11 11" aria-hidden="true">${inner}</svg>`;
    const frame = '<path class="thin" d="M0 0h10v10H0z"/>';
    const digit = (kind, symbol) => `<text class="${kind}-digit" x="5" y="5.2">${symbol}</text>`;
    const changed = `<path class="changed" d="M0 0h10v10H0z"/>${frame}<path class="corner" d="M9.7 .3v3.2l-3.2 -3.2z"/>`;
    const wrongDigit = `${frame}<path class="wrong-box" d="${squares([0], 1, 1.1)}"/>${digit("wrong", 5)}`;
    const cross = "M3 3l4 4m0 -4l-4 4";
    const [right, wrong] = labelled ? ["right", "wrong"] : ["filled in", "against the rules"];
    const entries = {
      over: [
        [`<path class="given" d="M0 0h10v10H0z"/>${frame}${digit("given", 5)}`, "given"],
        [frame + digit("right", 5), right],
        [wrongDigit, wrong],
        [changed, "just changed"],
      ],
      path: [
        ['<path class="way" d="M0 5h10"/>', labelled ? right : "path"],
        [`<path class="cross" d="${cross}"/>`, wrong],
        labelled && ['<circle class="missed" cx="5" cy="5" r="2.4"/>', "path missed"],
        [changed, "just changed"],
      ],
      colors: [
        labelled && [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/>`, "right"],
        labelled && [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/><path class="mark-under" d="${cross}"/><path class="mark-over" d="${cross}"/>`, "wrong"],
        labelled && ['<path class="arc-missing" d="M1 1h8v8h-8z"/>', "missing"],
        [`<path fill="${COLORS[1]}" d="M0 0h10v10H0z"/><path class="arc-corner" d="M9.7 .3v3.2l-3.2 -3.2z"/>`, "just changed"],
      ],
      beside: [
        labelled && [frame + digit("right", "a"), "right"],
        labelled && [wrongDigit.replace(">5<", ">a<"), "wrong"],
        [changed, "just changed"],
      ],
    };
    const drawn = view.drawing === "symbols" ? (view.blank !== null ? "over" : "beside") : view.drawing;
    return entries[drawn].filter(Boolean).map(([inner, text]) => `<li>${icon(inner)}${text}</li>`).join("");
  }

  const cellWord = view.columns ? "cell" : "token";

  // A step in a sentence.
  function summary(puzzle, step, steps) {
    if (!step) return "The puzzle, before the first step";
    const { wrong, cells, changed, marks } = seen(puzzle, step);
    const count = (changed || marks.changed).length;
    const parts = [puzzle.label && (wrong ? `${wrong} of ${many(cells, cellWord)} wrong` : `all ${many(cells, cellWord)} right`)];
    if (puzzle.kept) {
      parts.push(puzzle.kept[step - 1] ? view.result : wrong ? `${many(wrong, cellWord)} against the rules` : `not ${view.result}`);
    }
    if (step > 1) parts.push(`${count || "none"} changed`);
    if (!puzzle.label) parts.push(`q halt ${puzzle.q[step - 1].toFixed(2)}`);
    return `Step ${step} of ${steps}: ${parts.filter(Boolean).join(", ")}`;
  }

  // What the cell under the pointer holds, as far as it points at one of boards().
  function read(event, puzzle, step) {
    const drawing = event.target.closest("svg[data-rows]");
    if (!drawing || !view.columns) return null;
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const [row, column] = [Math.floor(point.y / CELL), Math.floor(point.x / CELL)];
    if (row < 0 || column < 0 || row >= +drawing.dataset.rows || column >= +drawing.dataset.cols) return null;
    const i = row * view.columns + column;
    const part = drawing.closest("figure").className;
    const tokens = part === "input" || !step ? puzzle.input : part === "truth" ? puzzle.label : puzzle.answers[step - 1];
    const name = (token) => (token === NO_LABEL ? "nothing" : { " ": "free", "": "blank" }[symbol(token)] || symbol(token));
    const { label } = puzzle;
    const wrong = label && part === "answer" && step && label[i] !== NO_LABEL && tokens[i] !== label[i];
    return `Row ${row + 1}, column ${column + 1}: ${name(tokens[i])}${wrong ? `, should be ${name(label[i])}` : ""}`;
  }

  return { boards, cellWord, colorGrid, colorsOf, demonstrations, layout, legend, look, read, seen, summary, symbol, thumbnail };
}

// --- charts ---

// Lines over ACT steps 1..T. `series`: [{name, values}], the second dashed; `flag`: {step, text}; `width` in pixels.
function lineChart({ series, top, format, current, flag, label, width = 320 }) {
  const steps = series[0].values.length;
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

// --- the player ---

const ICONS = { Play: "M3 1v14l12-7z", Pause: "M2 1h4v14H2zM10 1h4v14h-4z" };

// Goes through the steps from 0 on, by the page's button #play, its slider #step, arrow keys, space bar and clicks on
// charts. `show` draws a step and returns it in a sentence.
function player(show) {
  let [steps, step, timer] = [0, 0, null]; // no steps: there is nothing to show

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
  function goTo(wanted) {
    step = Math.min(Math.max(wanted, 0), steps);
    const sentence = show(step);
    $("status").textContent = sentence;
    $("step").value = step;
    $("step").setAttribute("aria-valuetext", sentence);
    $("ticks").querySelectorAll("span").forEach((tick) => tick.classList.toggle("is-current", +tick.dataset.step === step));
  }
  function setSteps(count) {
    steps = count;
    $("step").max = steps;
    const every = Math.ceil(steps / 10);
    $("ticks").replaceChildren(
      ...range(steps + 1).filter((t) => t % every === 0).map((t) => {
        const tick = document.createElement("span");
        tick.dataset.step = tick.textContent = t;
        tick.style.left = `${(100 * t) / steps}%`;
        return tick;
      }),
    );
  }

  setPlay("Play");
  $("play").addEventListener("click", play);
  $("step").addEventListener("input", () => {
    stop();
    goTo(+$("step").value);
  });
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
    if (!steps || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, pre")) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      stop();
      goTo(step + by);
    } else if (event.key === " " && !event.target.closest("button, summary")) play();
    else return;
    event.preventDefault();
  });
  return { goTo, play, setSteps, stop, get step() { return step; } };
}
