// The browser of changed completions: two runs of one system, the examples that both have. Each
// cell's texts are in a block of their own, which is unpacked when it is first shown.
(async () => {
  const { at, make, unpack } = page;
  page.labelCells();
  if (typeof DecompressionStream === "undefined") {
    at("count").textContent = "This browser is too old to show the completions (it lacks DecompressionStream).";
    return;
  }
  const tasks = await unpack("tasks-data");
  const blocks = new Map();
  // example -> { text, value, answer, parsed } of a cell
  async function textsOf(block) {
    if (!blocks.has(block)) blocks.set(block, unpack("block-" + block).then((rows) => new Map(
      rows.map(([place, text, value, answer, parsed]) => [place, { text, value, answer, parsed }]))));
    return blocks.get(block);
  }

  const task = () => tasks[Number(at("task").value)];
  const cellsOf = (system) => task().cells.filter((cell) => cell.system === system);
  const known = (value) => value !== null && value !== undefined;
  // how much better the second run's value is
  const rise = ([, one, other]) => !known(one.value) || !known(other.value) ? 0
    : (task().harmful ? -1 : 1) * (other.value - one.value);
  const FILTERS = {
    all: () => true,
    changed: (pair) => pair[1].text !== pair[2].text || pair[1].value !== pair[2].value,
    scored: (pair) => pair[1].value !== pair[2].value,
    gained: (pair) => rise(pair) > 0,
    lost: (pair) => rise(pair) < 0,
  };
  let pairs = [];

  function fill(select, names, wanted) {
    const before = select.value;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(before) ? before : wanted;
  }
  function offer() {
    const systems = [...new Set(task().cells.map((cell) => cell.system))];
    fill(at("system"), systems, systems.includes("proxy") ? "proxy" : systems[0]);
    const cells = cellsOf(at("system").value);
    const runs = cells.map((cell) => cell.run);
    const comparable = cells.filter((cell) => cell.part === cells[0].part);
    fill(at("one"), runs, runs[0]);
    fill(at("other"), runs, comparable[comparable.length - 1].run);
  }
  let chosen = 0;
  async function compare() {
    const mine = ++chosen;
    const cells = cellsOf(at("system").value);
    const [one, other] = ["one", "other"].map((id) => cells.find((cell) => cell.run === at(id).value));
    const [first, second] = await Promise.all([textsOf(one.block), textsOf(other.block)]);
    if (mine !== chosen) return; // another choice was made meanwhile
    pairs = [...first].filter(([place]) => second.has(place))
      .map(([place, text]) => [task().examples[place], text, second.get(place)]);
    at("same").hidden = one.block !== other.block;
    list.restart();
  }

  function verdict(found) {
    if (!found.parsed) return make("span", "– unparsed", "verdict");
    if (!known(found.value)) return make("span", "", "verdict");
    if (found.value !== 0 && found.value !== 1) return make("span", found.value.toFixed(2), "verdict");
    const good = (found.value === 1) !== task().harmful;
    return good ? make("span", "✓ " + task().good, "verdict right") : make("span", "✗ " + task().bad, "verdict");
  }
  function column(name, found, from) {
    const cell = make("section", undefined, "system");
    const head = make("h4", name);
    head.append(verdict(found));
    const body = make("div", undefined, "text body");
    body.append(found.text.slice(0, from));
    if (from < found.text.length) body.append(make("span", found.text.slice(from), "other"));
    cell.append(head, body);
    if (found.answer) cell.append(make("div", "answer: " + found.answer, "answer"));
    return cell;
  }
  function parting(one, other) {
    let from = 0;
    while (from < one.length && one[from] === other[from]) from++;
    while (from > 0 && /[\p{L}\p{N}]/u.test(other[from - 1] || "")) from--; // at the word's begin
    return one === other ? one.length : from;
  }
  function draw([example, one, other]) {
    const box = make("article", undefined, "example");
    box.append(make("h3", `${task().name} · ${example.id}`), make("div", example.prompt, "text prompt"));
    if (example.target) box.append(make("div", "target: " + example.target, "answer"));
    const grid = make("div", undefined, "systems");
    grid.append(column(at("one").value, one, one.text.length),
      column(at("other").value, other, parting(one.text, other.text)));
    box.append(grid);
    return box;
  }
  const list = page.browse({
    items: () => pairs,
    filters: FILTERS,
    texts: ([example, one, other]) => [example.prompt, example.id, one.text, other.text],
    draw,
    total: () => `${pairs.length} common examples`,
  });
  for (const id of ["task", "system"]) at(id).addEventListener("change", () => { offer(); compare(); });
  for (const id of ["one", "other"]) at(id).addEventListener("change", compare);
  tasks.forEach((each, i) => at("task").append(new Option(each.name, i)));
  if (tasks.length) {
    offer();
    await compare();
  } else at("browser").hidden = true; // the runs keep their completions elsewhere
  document.documentElement.dataset.ready = "yes";
})();
