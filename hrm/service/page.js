"use strict";
(async () => {
  const isReduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let puzzles = []; // what was answered, as drawing.js takes it
  let chosen = 0;
  let asking = null; // ends the request that is under way

  function say(sentence, kind = "") {
    $("outcome").textContent = sentence;
    $("outcome").className = `outcome ${kind && `${kind}-text`}`;
  }

  // JSON from the service; throws its sentence where it gives none.
  async function ask(path, options) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The service does not answer. Is it still running?");
    }
    const content = await response.json().catch(() => null);
    if (response.ok && content) return content;
    throw new Error((content && content.error) || `The service answered with status ${response.status}.`);
  }

  let model;
  try {
    [model] = (await ask("models")).models;
  } catch (error) {
    return say(error.message, "wrong");
  }
  const { view, seq_len: length } = model;
  const { boards, colorGrid, demonstrations, layout, legend, read, seen, summary } = drawing(view, length);

  // --- what is typed ---

  const isBoard = view.blank !== null; // answers are drawn over the puzzle
  const isEdited = isBoard && view.drawing === "symbols" && view.columns && view.symbols.every((symbol) => symbol.length < 2);
  const symbols = new Map(view.symbols.map((symbol, token) => [symbol, token]).filter(([symbol]) => symbol));
  const tokenOf = (symbol) => symbols.get(symbol) ?? ([".", "0", " "].includes(symbol) ? view.blank : undefined);
  const written = (text) => (symbols.has(" ") ? text.replace(/\n/g, "") : text.replace(/\s/g, ""));

  // How a puzzle is written.
  function hint() {
    if (view.drawing === "path") return "# wall, space free, S start, G goal; a row a line, or all in one";
    if (view.drawing === "colors") return "a grid, as JSON or rows of digits, or a task as its file holds it";
    if (model.example === null) return ""; // a question, of which symbols say little
    const names = [...symbols.keys()];
    const shown = names.length > 24 ? `${names.slice(0, 24).join(" ")} …` : names.join(" ");
    return isBoard ? `${shown}, and . for a blank` : `symbols: ${shown}`;
  }
  const HINT = hint();

  const isGrid = (grid) =>
    Array.isArray(grid) && grid.length > 0 && grid.length <= view.columns &&
    grid.every((row) => Array.isArray(row) && row.length > 0 && row.length === grid[0].length && row.length <= view.columns &&
      row.every((cell) => Number.isInteger(cell) && cell >= 0 && cell < COLORS.length));

  // What is typed: JSON where it is some, else the text as it is.
  function typed() {
    const text = $("text").value;
    try {
      return /^\s*[[{]/.test(text) ? JSON.parse(text) : text;
    } catch {
      return text;
    }
  }

  const isBrokenJson = () => typeof typed() === "string" && /^\s*[[{]/.test(typed()) && !symbols.has("[") && !symbols.has("{");

  // What is sent: with the name of its task, where it does not say one itself.
  function value() {
    const given = typed();
    const name = $("name").value.trim();
    if (!name) return given;
    const isObject = typeof given === "object" && !Array.isArray(given);
    const puzzle = /^(0|[1-9]\d*)$/.test(name) ? +name : name;
    return isObject ? (given.puzzle || given.name ? given : { ...given, puzzle }) : { input: given, puzzle };
  }

  // The symbols of the board that is typed, as text or JSON.
  function typedSymbols() {
    const given = typed().input ?? typed();
    return [...written(Array.isArray(given) ? given.flat().join("") : String(given))];
  }

  // The tokens of that board, blank where it has none yet.
  function typedBoard() {
    const found = typedSymbols().slice(0, length).map((symbol) => tokenOf(symbol) ?? view.blank);
    return found.concat(new Array(length - found.length).fill(view.blank));
  }

  // The tokens of what is typed, as far as they can be told without asking.
  function typedTokens() {
    if (isBoard) return isEdited || typedSymbols().length === length ? typedBoard() : null;
    const given = typed();
    const cells = Array.isArray(given) ? given.flat() : String(given).split(/\s+/).filter(Boolean);
    const tokens = cells.map((cell) => (cell === null ? 0 : symbols.get(String(cell))));
    const isWhole = view.columns ? tokens.length === length : tokens.length > 0 && tokens.length <= length;
    return isWhole && !tokens.includes(undefined) ? tokens.concat(new Array(length - tokens.length).fill(0)) : null;
  }

  // The puzzle as it is typed, before it is asked for.
  function preview() {
    const given = view.drawing === "colors" ? typed() : null;
    const input = given ? null : typedTokens();
    let drawn = "";
    if (input) {
      const puzzle = { input, label: null, answers: [] };
      drawn = boards(puzzle, 0, seen(puzzle, 0), isEdited ? "" : "The puzzle");
      [...$("cells").children].forEach((cell, i) => (cell.value = input[i] === view.blank ? "" : view.symbols[input[i]]));
    } else if (given) {
      const grids = [given, given.input, given.test && given.test[0] && given.test[0].input];
      const grid = grids.find(isGrid);
      if (grid) drawn = `<figure class="input"><figcaption>Input, ${grid.length} × ${grid[0].length}</figcaption>${colorGrid(grid, "Input")}</figure>`;
    }
    $("boards").innerHTML = drawn;
    const train = given && Array.isArray(given.train) ? given.train : [];
    const pairs = train.map((pair) => [pair && pair.input, pair && pair.output]).filter((pair) => pair.every(isGrid));
    $("task").innerHTML = pairs.length ? demonstrations(pairs) : "";
    $("task").hidden = !pairs.length;
    const count = isBoard ? typedSymbols().length : 0;
    $("hint").textContent = (count ? `${count} of ${length} cells; ` : "") + HINT;
  }

  // After every change: answers to what stood there before are gone.
  function changed() {
    if (asking) asking.abort();
    puzzles = [];
    play.stop();
    play.setSteps(0);
    for (const id of ["player", "q", "answer", "marks", "pager"]) $(id).hidden = true;
    $("cells").hidden = !isEdited;
    $("text").removeAttribute("aria-invalid");
    $("readout").textContent = "";
    say($("text").value ? "" : "Type or paste a puzzle, or take the example.");
    preview();
  }

  function setText(text) {
    $("text").value = text;
    changed();
  }

  // --- the board's own cells ---

  function makeCells() {
    const [columns, rows] = [view.columns, length / view.columns];
    const isDigits = [...symbols.keys()].every((symbol) => /\d/.test(symbol));
    $("cells").style.setProperty("--columns", columns);
    $("cells").style.setProperty("--rows", rows);
    $("cells").setAttribute("aria-label", `Board of ${rows} rows and ${columns} columns; arrow keys move`);
    $("cells").append(
      ...range(length).map((i) => {
        const cell = document.createElement("input");
        cell.inputMode = isDigits ? "numeric" : "text";
        cell.tabIndex = i ? -1 : 0;
        cell.setAttribute("aria-label", `Row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`);
        return cell;
      }),
    );
    const cells = [...$("cells").children];
    const goTo = (i) => cells[Math.min(Math.max(i, 0), length - 1)].focus();
    const write = (first, tokens) => {
      const all = typedBoard();
      all.splice(first, tokens.length, ...tokens);
      setText(all.map((token) => (token === view.blank ? "." : view.symbols[token])).join(""));
    };
    $("cells").addEventListener("focusin", ({ target }) => {
      for (const cell of cells) cell.tabIndex = cell === target ? 0 : -1;
      target.select();
    });
    $("cells").addEventListener("input", ({ target, data }) => {
      const i = cells.indexOf(target);
      const token = tokenOf((data ?? target.value).slice(-1));
      if (target.value === "") write(i, [view.blank]);
      else if (token === undefined) preview(); // takes back what is no symbol
      else {
        write(i, [token]);
        goTo(i + 1);
      }
      document.activeElement.select();
    });
    $("cells").addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const i = cells.indexOf(event.target);
      const column = i % columns;
      const next = {
        ArrowLeft: column ? i - 1 : i,
        ArrowRight: column < columns - 1 ? i + 1 : i,
        ArrowUp: i >= columns ? i - columns : i,
        ArrowDown: i + columns < length ? i + columns : i,
        Home: i - column,
        End: i - column + columns - 1,
        Backspace: i - 1,
        Delete: i,
      }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      if (event.key === "Backspace" || event.key === "Delete") write(i, [view.blank]);
      goTo(next);
    });
    $("cells").addEventListener("paste", (event) => {
      event.preventDefault();
      const text = event.clipboardData.getData("text");
      const found = [...written(text)];
      const i = cells.indexOf(event.target);
      if (found.length > length || !found.every((symbol) => tokenOf(symbol) !== undefined)) return setText(text.trim());
      const first = found.length === length ? 0 : i; // a part goes into the cells from here on
      write(first, found.slice(0, length - first).map(tokenOf));
      goTo(first + found.length);
    });
  }

  // --- answers ---

  function shapeOf(tokens) {
    const isCell = (i) => view.symbols[tokens[i]] !== "";
    const rows = range(length / view.columns).filter((r) => isCell(r * view.columns)).length;
    return [rows, range(view.columns).filter(isCell).length];
  }

  function puzzlesOf(response) {
    return response.tokens.map(({ input, answers }, n) => {
      const steps = response.trajectory[n];
      const puzzle = { input, answers, label: null, text: response.texts[n], value: response.answers[n] };
      puzzle.q = steps.map((step) => step.q_halt);
      puzzle.kept = view.result ? steps.map((step) => step.keeps_rules) : null;
      puzzle.broken = "broken" in steps[0] ? steps.map((step) => step.broken) : null;
      if (view.drawing === "colors") {
        puzzle.inputShape = shapeOf(input);
        puzzle.shapes = steps.map(({ answer }) => [answer.length, answer.length ? answer[0].length : 0]);
      }
      return puzzle;
    });
  }

  function outcome({ answers, kept, q }) {
    const after = `after ${many(answers.length, "ACT step")}, q halt ${q.at(-1).toFixed(2)}`;
    if (!kept) return [`Answered ${after}. Nothing but q halt tells whether it is right.`];
    return kept.at(-1) ? [`✓ Solved: ${view.result} ${after}`, "right"] : [`✗ Not ${view.result} ${after}`, "wrong"];
  }

  function choose(number) {
    chosen = (number + puzzles.length) % puzzles.length;
    const puzzle = puzzles[chosen];
    say(...outcome(puzzle));
    $("place").textContent = `${chosen + 1} of ${puzzles.length}`;
    const isRows = Array.isArray(puzzle.value) && puzzle.value.every((row) => typeof row === "string");
    $("answer-text").textContent = isBoard && isRows && view.columns ? puzzle.value.join("\n") : puzzle.text;
    $("q").hidden = puzzle.answers.length < 2;
    play.stop();
    play.setSteps(puzzle.answers.length);
    if (isReduced) return play.goTo(puzzle.answers.length);
    play.goTo(0);
    play.play();
  }

  function showStep(step) {
    const puzzle = puzzles[chosen];
    const sentence = summary(puzzle, step, puzzle.answers.length);
    const isTyped = isEdited && !step;
    $("cells").hidden = !isTyped;
    $("boards").innerHTML = boards(puzzle, step, seen(puzzle, step), isTyped ? "" : sentence);
    $("readout").textContent = "";
    $("q-chart").innerHTML = lineChart({
      series: [{ name: "q halt", values: puzzle.q }],
      top: 1,
      format: (v) => v.toFixed(1),
      current: step,
      label: `q halt by step: ${puzzle.q.map((v) => v.toFixed(2)).join(", ")}`,
    });
    return sentence;
  }

  async function solve(event) {
    event.preventDefault();
    changed();
    const own = (asking = new AbortController());
    $("solve").disabled = true;
    say("Solving …");
    try {
      if (isBrokenJson()) throw new Error("The puzzle begins as JSON does, but is none: check brackets, commas and quotes.");
      const response = await ask("infer", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ inputs: [value()], trajectory: true, tokens: true }),
        signal: own.signal,
      });
      puzzles = puzzlesOf(response);
      for (const id of ["player", "answer", "marks"]) $(id).hidden = false;
      $("pager").hidden = puzzles.length < 2;
      choose(0);
    } catch (error) {
      if (own.signal.aborted) return; // what was asked for has changed
      const sentence = error.message.replace(/^input 0: /, "");
      say(sentence[0].toUpperCase() + sentence.slice(1), "wrong");
      $("text").setAttribute("aria-invalid", true);
    } finally {
      if (asking === own) asking = null;
      $("solve").disabled = asking !== null;
    }
  }

  // --- the page ---

  const play = player(showStep);
  document.title = `${model.title ?? model.name} · hrm serve`;
  $("title").textContent = model.title ?? model.name;
  $("subtitle").textContent = `${model.title ? `${model.name}: ` : ""}${many(model.parameters, "parameter")} on ${model.device}, at most ${many(model.act_max_steps, "ACT step")}`;
  $("boards").className = `boards ${layout()}`;
  $("form").classList.add(view.drawing === "path" ? "is-grid" : isBoard ? "is-line" : "is-free");
  $("form").querySelector(".area").classList.toggle("is-square", isBoard);
  $("legend").innerHTML = legend(false);
  $("digits-option").hidden = view.drawing !== "colors";
  $("text").rows = isBoard && !isEdited ? Math.min(length / view.columns, 16) : isEdited ? 3 : 6;
  $("example").hidden = model.example === null;
  $("name-entry").hidden = model.num_puzzle_identifiers < 2;
  $("names").append(...model.puzzles.map((name) => new Option(name, name)));
  if (isEdited) makeCells();
  changed();
  $("solve").disabled = false;

  function showExample() {
    const { example } = model;
    const rows = (value) => JSON.stringify(value).replaceAll("],", "],\n");
    $("name").value = (example && example.puzzle) ?? "";
    setText(typeof example === "string" ? example : rows(example.input ?? example));
  }

  $("form").addEventListener("submit", solve);
  $("text").addEventListener("input", changed);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  $("name").addEventListener("input", changed);
  $("example").addEventListener("click", showExample);
  $("clear").addEventListener("click", () => {
    $("name").value = "";
    setText("");
  });
  $("previous").addEventListener("click", () => choose(chosen - 1));
  $("next").addEventListener("click", () => choose(chosen + 1));
  $("digits").addEventListener("change", () => play.goTo(play.step));
  for (const kind of ["pointermove", "pointerdown"]) {
    $("boards").addEventListener(kind, (event) => {
      const sentence = puzzles.length ? read(event, puzzles[chosen], play.step) : null;
      if (sentence) $("readout").textContent = sentence;
    });
  }
})();
