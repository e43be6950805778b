// The browser of examples. It draws the examples of the current page only. All texts are in one
// packed block; the traces are in blocks of a few examples, each unpacked when it is needed.
(async () => {
  const { at, make, percent, unpack, visible } = page;
  if (typeof DecompressionStream === "undefined") {
    at("count").textContent = "This browser is too old to show the examples (it lacks DecompressionStream).";
    return;
  }
  const data = await unpack("examples-data");
  const current = () => data.tasks[Number(at("task").value)];
  const blocks = new Map();
  const traceOf = async (example) => {
    if (example.block === undefined) return null;
    if (!blocks.has(example.block)) blocks.set(example.block, unpack("traces-" + example.block));
    return (await blocks.get(example.block))[example.slot];
  };

  const right = (example, system) => example.right[system] === 1;
  const wrong = (example, system) => example.right[system] === 0;
  const FILTERS = {
    all: () => true,
    gained: (e) => right(e, "proxy") && wrong(e, "base"),
    lost: (e) => wrong(e, "proxy") && right(e, "tuned"),
    unparsed: (e) => e.unparsed.length > 0,
  };
  function verdict(example, system) {
    if (example.unparsed.includes(system)) return make("span", "– unparsed", "verdict");
    const value = example.right[system];
    if (value === 1) return make("span", "✓ " + current().good, "verdict right");
    if (value === 0) return make("span", "✗ " + current().bad, "verdict");
    return make("span", "", "verdict");
  }
  function draw(example) {
    const box = make("article", undefined, "example");
    box.append(make("h3", `${current().name} · ${example.id}`));
    box.append(make("div", example.prompt, "text prompt"));
    if (example.target) box.append(make("div", "target: " + example.target, "answer"));
    const grid = make("div", undefined, "systems");
    grid.style.setProperty("--columns", data.systems.length);
    for (const system of data.systems) {
      const cell = make("section", undefined, "system");
      const head = make("h4", system);
      head.append(verdict(example, system));
      const text = example.texts[system];
      const body = make("div", text === undefined ? "(none)" : text, "text body");
      cell.append(head, body);
      if (example.answers[system]) cell.append(make("div", "answer: " + example.answers[system], "answer"));
      if (system === "proxy") traceOf(example).then((trace) => trace && shade(body, trace));
      grid.append(cell);
    }
    box.append(grid);
    return box;
  }

  // a trace is [token texts, p proxy, p base, tops], probabilities in thousandths; tops holds per
  // member and token a flat list: text, probability, text, probability, ...
  function shade(body, trace) {
    const [tokens, proxy, base] = trace;
    body.textContent = "";
    body.classList.add("tokens");
    body.tabIndex = 0;
    body.setAttribute("aria-label", "completion by token; arrow keys show each token's probabilities");
    body.trace = trace;
    tokens.forEach((piece, i) => {
      const span = make("span", data.pieces[piece]);
      const top = trace[3].base;
      const changed = Boolean(top && top[i] && top[i][0] !== piece);
      page.shade(span, Math.max(0, proxy[i] - base[i]) / 1000, changed);
      body.append(span);
    });
  }
  const tip = at("tip");
  function explain(span) {
    const body = span.parentElement;
    const i = [...body.children].indexOf(span);
    const [tokens, proxy, base, tops] = body.trace;
    const line = make("div");
    line.append(make("code", visible(data.pieces[tokens[i]])),
      ` proxy ${percent(proxy[i] / 1000)}, base ${percent(base[i] / 1000)} (${page.points((proxy[i] - base[i]) / 1000)})`);
    tip.append(line);
    const table = make("table");
    for (const [role, lists] of Object.entries(tops)) {
      const row = make("tr");
      row.append(make("th", role));
      const list = lists[i];
      for (let k = 0; k < list.length; k += 2) {
        const cell = make("td");
        cell.append(make("code", visible(data.pieces[list[k]])), " " + percent(list[k + 1] / 1000));
        row.append(cell);
      }
      table.append(row);
    }
    tip.append(table);
  }
  const card = page.card(at("examples"), tip, explain);

  data.tasks.forEach((t, i) => at("task").append(new Option(`${t.name} (${t.examples.length})`, i)));
  const list = page.browse({
    items: () => current().examples,
    filters: FILTERS,
    texts: (example) => [example.prompt, example.id, ...Object.values(example.texts)],
    draw,
    total: () => `${current().examples.length} examples`,
    leave: card.hide,
  });
  at("task").addEventListener("change", list.restart);
  page.labelCells();
  if (data.tasks.length) list.restart();
  else at("browser").hidden = true; // tasks of lm-eval keep their examples elsewhere
  document.documentElement.dataset.ready = "yes";
})();
