// A run in progress: asks the server that sent this page what is new, and changes what has changed.
(async () => {
  const EVERY = 2000; // milliseconds between two looks
  const { at, make } = page;
  const rows = new Map();
  let held = false;
  let latest = "";

  const write = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const whole = (number) => Math.round(number).toLocaleString("en");

  function row(cell) {
    const key = JSON.stringify([cell.system, cell.task]);
    if (!rows.has(key)) {
      const line = make("tr");
      const head = make("th", `${cell.system} · ${cell.task}`);
      head.scope = "row";
      const bar = make("progress");
      bar.setAttribute("aria-label", `examples that ${cell.system} has done on ${cell.task}`);
      const count = make("span");
      const done = make("td");
      done.append(count, bar);
      const speed = make("td", "", "num");
      const score = make("td");
      const value = make("span");
      const between = make("span", "", "ci");
      score.append(value, between);
      line.append(head, done, speed, score);
      at("cells").append(line);
      rows.set(key, { line, bar, count, speed, score, value, between });
    }
    return rows.get(key);
  }
  function show(cell, current) {
    const { line, bar, count, speed, score, value, between } = row(cell);
    line.classList.toggle("current", current);
    write(count, cell.total ? `${whole(cell.done)} of ${whole(cell.total)}` : "not begun");
    bar.max = cell.total || 1;
    bar.value = cell.done;
    write(speed, cell.speed === null ? "" : cell.speed < 10 ? cell.speed.toFixed(1) : whole(cell.speed));
    const known = cell.value !== null && !cell.problem;
    write(value, cell.problem || (known ? `${cell.metric} ${cell.value.toFixed(1)}${cell.percent ? " %" : ""}` : ""));
    score.classList.toggle("none", !cell.problem && !known); // a phone leaves it out
    const range = known && cell.low !== null ? `${cell.low.toFixed(1)}–${cell.high.toFixed(1)}` : "";
    write(between, known ? `${range} of ${whole(cell.scored)} ${cell.scored === 1 ? "example" : "examples"}` : "");
  }
  function draw(each) {
    const box = make("article", undefined, "example");
    box.append(make("h3", `${each.system} · ${each.task} · ${each.example}`));
    box.append(make("div", each.prompt, "text prompt"));
    box.append(make("div", each.text, "text"));
    const facts = [`ended by ${each.ended}`];
    if (each.value !== null) facts.push(`scored ${Number(each.value.toFixed(3))}`);
    box.append(make("div", facts.join(", "), "answer"));
    return box;
  }
  function update(state) {
    at("problem").hidden = !state.error;
    if (state.error) return write(at("problem"), state.error);
    write(at("name"), state.name);
    document.title = `${state.name}: ${state.phase}`;
    write(at("said"), state.said);
    const newest = state.latest[0];
    for (const cell of state.cells)
      show(cell, Boolean(newest) && cell.system === newest.system && cell.task === newest.task && state.phase === "generating");
    page.labelCells();
    at("report").hidden = !state.report;
    const text = JSON.stringify(state.latest);
    if (!held && text !== latest) {
      latest = text;
      at("latest").replaceChildren(...state.latest.map(draw));
    }
  }
  at("pause").addEventListener("click", () => {
    held = !held;
    at("pause").setAttribute("aria-pressed", held);
  });
  async function look() {
    try {
      const answer = await fetch("state");
      update(await answer.json());
    } catch {
      at("problem").hidden = false;
      write(at("problem"), "proxytune watch has ended, or cannot be reached: this is what it said last.");
    }
    document.documentElement.dataset.ready = "yes";
    setTimeout(look, EVERY);
  }
  await look();
})();
