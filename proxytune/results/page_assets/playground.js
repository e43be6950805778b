// The playground: one prompt, the triple's systems side by side. It talks to the server's public API
// alone, the same that the copied curl and Python lines use.
(async () => {
  const { at, make, percent, visible } = page;
  const CANDIDATES = 5;
  let known = null; // GET /v1/playground
  let columns = {};
  let begin = []; // token ids that the proxy's answer begins with, after "what if"
  let choices = []; // the candidates that were chosen: [place, token id], in the text's order
  let running = null; // AbortController of the present answers
  let stop = []; // the example's stop strings
  let system = null; // its system turn
  let compared = ""; // what all systems were last asked, as JSON

  // -- the server --------------------

  const key = () => sessionStorage.getItem("proxytune-key") || "";
  const headers = () => ({ "Content-Type": "application/json",
    ...(key() ? { Authorization: "Bearer " + key() } : {}) });
  async function failure(answer) {
    try { return (await answer.json()).error.message; } catch { return `HTTP ${answer.status}`; }
  }
  async function* events(path, body, signal) {
    const answer = await fetch(path, { method: "POST", headers: headers(), signal,
      body: JSON.stringify({ ...body, stream: true }) });
    if (!answer.ok) throw new Error(await failure(answer));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part === "data: [DONE]") return;
        const event = JSON.parse(part.replace(/^data: /, ""));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }

  // -- the request of one system --------------------

  const number = (id) => Number(at(id).value);
  function asked(name) {
    const { model } = known.systems.find((each) => each.system === name);
    const body = { model, temperature: number("temperature"), seed: number("seed"),
      max_tokens: number("tokens") };
    if (stop.length) body.stop = stop;
    const prefix = at("prefix").value;
    if (at("form").value === "text") {
      return { path: "/v1/completions", body: { prompt: at("prompt").value + prefix, ...body,
        ...own(name) } };
    }
    const messages = [{ role: "user", content: at("prompt").value }];
    if (system) messages.unshift({ role: "system", content: system });
    if (prefix) messages.push({ role: "assistant", content: prefix });
    return { path: "/v1/chat/completions", body: { messages, ...body, ...own(name) } };
  }
  function own(name) {
    if (name !== "proxy") return {};
    const fields = {};
    const alphas = Object.keys(known.alphas);
    if (alphas.length) fields.alpha = alphas[0] === "alpha" ? number("alpha")
      : Object.fromEntries(alphas.map((pair) => [pair, number(alphaId(pair))]));
    const formula = chosenFormula();
    if (formula) fields.formula = { name: formula.name,
      ...Object.fromEntries(Object.keys(formula.settings).map((key) => [key, number(key)])) };
    if (known.members) fields.member_logprobs = CANDIDATES;
    if (begin.length) fields.begin_token_ids = begin;
    return fields;
  }

  // -- the formula and its alphas --------------------

  const TEXTS = {
    proxy: "base + alpha × (expert − antiexpert)",
    sum_of_pairs: "base + the sum of alpha × (expert − antiexpert) over all pairs",
    dexperts: "base + alpha × (expert − antiexpert), over the tokens that the base’s own filter keeps",
    gated: "base + alpha × (expert − antiexpert), where the base’s largest probability is below the threshold",
    contrastive: "log p(base) − alpha × log p(antiexpert), over the tokens that the base finds plausible",
    guidance: "base + alpha × (base − base under the other prompt)",
  };
  const alphaId = (name) => (name === "alpha" ? "alpha" : "alpha-" + name);
  const alphaIds = () => Object.keys(known.alphas).map(alphaId);
  const chosenFormula = () => known.formulas.find((each) => each.name === at("formula").value);
  function field(text, settings) {
    const label = make("label", text + " ");
    const input = Object.assign(make("input"), settings);
    label.append(input);
    return { label, input };
  }
  // Sets a slider, which reaches as far as its value; a browser would cut the value instead.
  function setAlpha(input, value) {
    input.min = Math.min(-1, value);
    input.max = Math.max(3, value);
    input.value = value;
  }
  function makeAlphas() {
    at("alphas").replaceChildren(...Object.entries(known.alphas).map(([name, value]) => {
      const id = alphaId(name);
      const { label, input } = field(name === "alpha" ? "alpha" : "alpha of " + name,
        { id, type: "range", step: 0.05 });
      setAlpha(input, value);
      const shown = make("output");
      shown.id = id + "-shown";
      input.before(shown);
      input.addEventListener("input", () => again(["proxy"]));
      return label;
    }));
  }
  function makeFormulas() {
    at("formula").replaceChildren(new Option(known.formula, ""),
      ...known.formulas.map(({ name }) => new Option(name, name)));
    at("formula-label").hidden = known.formulas.length === 0;
  }
  function makeSettings() {
    const formula = chosenFormula();
    at("formula-settings").replaceChildren(...Object.entries(formula ? formula.settings : {}).map(
      ([id, value]) => {
        const { label, input } = field(id, { id, type: "number", step: "any", value });
        input.addEventListener("input", () => again(["proxy"]));
        return label;
      }));
  }

  // -- one answer --------------------

  function column(name) {
    const cell = make("section", undefined, "system");
    const head = make("h4", name);
    const speed = make("span", "", "speed");
    head.append(speed);
    const body = make("div", "", "text body");
    const drafts = make("div", undefined, "drafts");
    const under = make("div", "", "under");
    cell.append(head, body, drafts, under);
    cell.dataset.system = name;
    return { cell, speed, body, drafts, under, tokens: [] };
  }
  function addToken(own, token, given) {
    const ends = known.ends.includes(token.token_id);
    const span = make("span", ends ? "end" : token.token, ends ? "end" : "");
    own.tokens.push(token);
    if (given) span.classList.add("given");
    const { system, base } = token.members;
    const rise = Math.max(0, Math.exp(system.logprob) - Math.exp(base.logprob));
    page.shade(span, rise, base.rank > 1);
    own.body.append(span);
    const mark = make("i", undefined, token.drafted ? "right" : "");
    own.drafts.append(mark);
  }
  async function answer(name, signal) {
    const own = columns[name];
    const { path, body } = asked(name);
    const shaded = name === "proxy" && known.members;
    const kept = shaded ? own.tokens.slice(0, begin.length) : [];
    own.body.textContent = own.drafts.textContent = own.under.textContent = own.speed.textContent = "";
    own.body.classList.remove("failed");
    own.tokens = [];
    if (shaded) {
      own.body.classList.add("tokens");
      own.body.tabIndex = 0;
      own.body.setAttribute("role", "group");
      own.body.setAttribute("aria-label",
        "the proxy's answer by token; arrow keys show candidates, Enter opens them");
      kept.forEach((token, i) => addToken(own, token, choices.some(([place]) => place === i)));
    }
    let count = 0;
    let first = 0;
    let reason = "";
    for await (const event of events(path, { ...body, return_token_ids: true }, signal)) {
      const choice = event.choices[0];
      if (!choice) continue;
      first = first || performance.now();
      count += (choice.token_ids || []).length;
      const text = choice.delta ? choice.delta.content : choice.text;
      if (!shaded) own.body.append(text || "");
      for (const token of choice.member_logprobs || []) addToken(own, token, false);
      const seconds = (performance.now() - first) / 1000;
      if (count > 1 && seconds > 0) own.speed.textContent = `${((count - 1) / seconds).toFixed(0)} tokens/s`;
      reason = choice.finish_reason || reason;
    }
    const drafted = own.tokens.slice(kept.length).filter((each) => each.drafted).length;
    const parts = [`${count} tokens`, reason === "length" ? "cut at the limit" : ""];
    if (drafted) parts.push(`${drafted} drafted by the expert and confirmed`);
    own.under.textContent = parts.filter(Boolean).join(", ");
    if (begin.length && name === "proxy") {
      const back = make("button", "Back to the proxy’s own answer");
      back.addEventListener("click", () => { forget(); answers(["proxy"]); });
      own.under.append(" ", back);
    }
  }
  // What each single model is asked; the proxy's own settings are no part of it.
  const common = () => JSON.stringify(asked("base"));
  async function answers(names) {
    if (!at("prompt").value) return;
    if (names.length > 1) compared = common();
    if (running) running.abort();
    const mine = running = new AbortController();
    card.hide();
    at("stop").disabled = false;
    at("status").textContent = "Writing …";
    const ended = names.map(async (name) => {
      try {
        await answer(name, mine.signal);
      } catch (error) {
        if (mine.signal.aborted) return;
        // fetch() says no more than TypeError of a server that is gone
        columns[name].body.textContent = error instanceof TypeError
          ? "The server does not answer; is it still running?" : error.message;
        columns[name].body.classList.add("failed");
      }
    });
    await Promise.all(ended);
    if (running !== mine) return;
    running = null;
    at("stop").disabled = true;
    at("status").textContent = mine.signal.aborted ? "Stopped." : "Done.";
    document.documentElement.dataset.answered = String(Number(document.documentElement.dataset.answered || 0) + 1);
  }
  const all = () => known.systems.map((each) => each.system);

  // -- the card of a token --------------------

  const tip = at("tip");
  function explain(span) {
    const own = columns.proxy;
    const i = [...own.body.children].indexOf(span);
    const token = own.tokens[i];
    const { system, base } = token.members;
    const [proxyShare, baseShare] = [system, base].map((each) => Math.exp(each.logprob));
    const line = make("div");
    line.append(make("code", visible(token.token)),
      ` proxy ${percent(proxyShare)}, base ${percent(baseShare)} (${page.points(proxyShare - baseShare)})`);
    tip.append(line);
    const table = make("table");
    for (const [role, rated] of Object.entries(token.members)) {
      const row = make("tr");
      row.append(make("th", role === "system" ? "proxy" : role));
      for (const each of rated.top) {
        const cell = make("td");
        const button = make("button");
        button.type = "button";
        const ends = known.ends.includes(each.token_id);
        button.append(make("code", ends ? "end" : visible(each.token)), " " + percent(Math.exp(each.logprob)));
        button.addEventListener("click", () => whatIf(i, each));
        cell.append(button);
        row.append(cell);
      }
      table.append(row);
    }
    tip.append(table, make("p", "Choose a candidate: the text goes on from it.", "hint"));
  }
  const card = page.card(at("systems"), tip, explain, true);
  function whatIf(place, candidate) {
    const own = columns.proxy;
    const shown = own.tokens[place];
    const before = own.tokens.slice(0, place);
    begin = [...before.map((each) => each.token_id), candidate.token_id];
    choices = [...choices.filter(([each]) => each < place), [place, candidate.token_id]];
    own.tokens = [...before, { ...shown, ...candidate, drafted: false, members: {
      ...shown.members, system: rated(shown, "system", candidate), base: rated(shown, "base", candidate) } }];
    remember();
    return answers(["proxy"]);
  }
  function forget() {
    begin = [];
    choices = [];
    remember();
  }
  // A candidate under one member; one that is not listed is below the last of the list.
  function rated(token, role, candidate) {
    const list = token.members[role].top;
    const rank = list.findIndex((each) => each.token_id === candidate.token_id) + 1;
    const logprob = rank ? list[rank - 1].logprob : -Infinity;
    return { ...token.members[role], logprob, rank: rank || list.length + 1 };
  }

  // -- the link --------------------

  const settingIds = () => [...at("formula-settings").querySelectorAll("input")].map(({ id }) => id);
  const fields = () => ["prompt", "prefix", "form", "temperature", "tokens", "seed", "formula",
    ...settingIds(), ...alphaIds()];
  function remember() {
    const state = new URLSearchParams(fields().map((id) => [id, at(id).value]));
    if (stop.length) state.set("stop", JSON.stringify(stop));
    if (system) state.set("system", system);
    if (choices.length) state.set("choices", JSON.stringify(choices));
    history.replaceState(null, "", "#" + state);
  }
  // A list of the link; empty where there is none, or where the link was cut.
  function listIn(state, name) {
    try {
      const list = JSON.parse(state.get(name) || "[]");
      return Array.isArray(list) ? list : [];
    } catch {
      return [];
    }
  }
  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    if (!state.get("prompt")) return false;
    at("formula").value = state.get("formula") || "";
    makeSettings();
    for (const id of fields()) if (state.has(id)) at(id).value = state.get(id);
    for (const id of alphaIds()) if (state.get(id)) setAlpha(at(id), Number(state.get(id)) || 0);
    stop = listIn(state, "stop");
    system = state.get("system");
    show();
    return true;
  }
  // Whether this server has the link's formula; a link of another server may name one that it lacks.
  function hasFormula() {
    const name = new URLSearchParams(location.hash.slice(1)).get("formula") || "";
    if (at("formula").value === name) return true;
    at("formula").value = "";
    at("status").textContent = `The link's formula ${name} is not on this server.`;
    return false;
  }
  // Answers again what the link asked for, then goes on from each of its candidates.
  async function replay(chosen) {
    await answers(all());
    for (const [place, id] of chosen) {
      const token = columns.proxy.tokens[place];
      const lists = token ? Object.values(token.members).flatMap((each) => each.top) : [];
      const candidate = lists.find((each) => each.token_id === id);
      if (!candidate) {
        at("status").textContent = "The link's candidates are not in this answer.";
        return;
      }
      await whatIf(place, candidate);
    }
  }
  function show() {
    for (const id of alphaIds()) at(id + "-shown").textContent = number(id).toFixed(2);
    const name = at("formula").value || known.formula;
    at("formula-shown").textContent = TEXTS[name] || name;
    at("temperature-shown").textContent = number("temperature").toFixed(1);
  }

  // -- what can be copied --------------------

  async function copy(text, what) {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = make("textarea", text);
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    at("status").textContent = what + " copied.";
    document.documentElement.dataset.copied = text;
  }
  function curl() {
    const { path, body } = asked("proxy");
    const quoted = "'" + JSON.stringify(body).replaceAll("'", "'\\''") + "'";
    const secret = key() ? ' -H "Authorization: Bearer $PROXYTUNE_API_KEY"' : "";
    return `curl ${location.origin}${path} -H 'Content-Type: application/json'${secret} -d ${quoted}`;
  }
  function python() {
    const { path, body } = asked("proxy");
    const text = JSON.stringify(JSON.stringify(body));
    const secret = key() ? 'headers={"Authorization": "Bearer " + os.environ["PROXYTUNE_API_KEY"]}, ' : "";
    return `import json${key() ? ", os" : ""}, requests\n\nbody = json.loads(${text})\n` +
      `answer = requests.post("${location.origin}${path}", ${secret}json=body)\nprint(answer.json())\n`;
  }

  // -- controls --------------------

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    forget();
    answers(all());
  });
  at("stop").addEventListener("click", () => running && running.abort());
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
  });
  at("link").addEventListener("click", () => { remember(); copy(location.href, "Link"); });
  at("curl").addEventListener("click", () => copy(curl(), "curl line"));
  at("python").addEventListener("click", () => copy(python(), "Python lines"));
  let wait;
  // Answers anew once a setting has stopped moving.
  function again(names) {
    show();
    clearTimeout(wait);
    if (!columns.proxy || !columns.proxy.body.textContent) return;
    wait = setTimeout(() => {
      forget();
      // after another prompt or length, the other systems' answers would be to another question
      answers(common() === compared ? names : all());
    }, 250);
  }
  at("temperature").addEventListener("input", () => again(all()));
  at("formula").addEventListener("input", () => {
    makeSettings();
    again(["proxy"]);
  });
  for (const id of ["prompt", "prefix", "form"]) at(id).addEventListener("input", () => {
    at("example").value = "";
    stop = [];
    system = null;
  });
  at("example").addEventListener("change", () => {
    const chosen = known.examples[at("example").value];
    if (!chosen) return;
    at("form").value = chosen.form;
    at("prompt").value = chosen.prompt;
    at("prefix").value = chosen.prefix;
    at("tokens").value = chosen.max_tokens;
    ({ stop, system } = chosen);
  });
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("proxytune-key", at("key").value);
    start();
  });

  async function start() {
    const answer = await fetch("/v1/playground", { headers: headers() });
    at("key-form").hidden = answer.status !== 401;
    if (!answer.ok) {
      at("about").textContent = await failure(answer);
      return;
    }
    known = await answer.json();
    at("about").textContent = known.about;
    makeAlphas();
    makeFormulas();
    columns = Object.fromEntries(known.systems.map(({ system }) => [system, column(system)]));
    at("systems").style.setProperty("--columns", known.systems.length);
    at("systems").replaceChildren(...Object.values(columns).map((each) => each.cell));
    known.examples.forEach((each, i) => at("example").append(new Option(each.label, i)));
    at("example-label").hidden = known.examples.length === 0;
    at("run").disabled = false;
    const chosen = listIn(new URLSearchParams(location.hash.slice(1)), "choices");
    if (recall()) {
      if (hasFormula()) replay(chosen);
    } else if (known.examples.length) {
      at("example").value = "0";
      at("example").dispatchEvent(new Event("change"));
    }
    show();
    document.documentElement.dataset.ready = "yes";
  }
  await start();
})();
