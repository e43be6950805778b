// What the pages share: elements, texts of tokens, and the card that explains a token.
"use strict";
const page = (() => {
  const at = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const percent = (share) => (100 * share).toFixed(1) + " %";
  // A difference of two shares in points: "+1.2", and "0.0" for what rounds to it.
  const points = (difference) => {
    const text = (100 * difference).toFixed(1);
    return Number(text) === 0 ? "0.0" : (difference > 0 ? "+" : "") + text;
  };
  const visible = (text) => JSON.stringify(text).slice(1, -1).replace(/ /g, "·");

  // On a phone, where a table's head is hidden, each number bears its column's name.
  function labelCells() {
    for (const cell of document.querySelectorAll(".comparison td"))
      cell.dataset.label = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent;
  }

  // The data of a block that proxytune/results/packed.py wrote.
  async function unpack(id) {
    const packed = Uint8Array.from(atob(at(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // Shades a token by how much its probability rose; underlines it if the base would have
  // written another one.
  function shade(span, rise, changed) {
    if (rise > 0.005) span.style.backgroundColor = `rgb(var(--shade) / ${(0.6 * rise).toFixed(3)})`;
    span.classList.toggle("changed", changed);
  }

  // The card of the token under the pointer, or of the one that the arrow keys reach. `list` holds
  // elements of class "tokens", whose children are the tokens; `fill(span)` fills the card. With
  // `pins`, a click or Enter keeps the card open, so that its buttons can be reached.
  function card(list, box, fill, pins = false) {
    let current = null;
    let pinned = false;
    function show(span) {
      hide();
      current = span;
      span.classList.add("current");
      box.textContent = "";
      fill(span);
      box.hidden = false;
      const place = span.getClientRects()[0] || span.parentElement.getBoundingClientRect();
      const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
      const below = place.bottom + 6 + box.offsetHeight < innerHeight;
      box.style.left = Math.max(8, left) + scrollX + "px";
      box.style.top = (below ? place.bottom + 6 : place.top - 6 - box.offsetHeight) + scrollY + "px";
    }
    function hide() {
      if (current) current.classList.remove("current");
      current = null;
      pinned = false;
      box.hidden = true;
      box.classList.remove("pinned");
    }
    function pin(span) {
      if (current !== span) show(span);
      pinned = true;
      box.classList.add("pinned");
    }
    const token = (event) => event.target.closest(".tokens > span");
    list.addEventListener("mouseover", (event) => {
      if (pinned) return;
      const span = token(event);
      if (span) show(span); else hide();
    });
    list.addEventListener("mouseleave", () => { if (!pinned) hide(); });
    document.addEventListener("click", (event) => {
      if (box.contains(event.target)) return;
      const span = list.contains(event.target) ? token(event) : null;
      if (!span) hide();
      else if (pins) pin(span);
      else show(span);
    });
    list.addEventListener("keydown", (event) => {
      const body = event.target.closest(".tokens");
      if (!body || !["ArrowLeft", "ArrowRight", "Escape", "Enter"].includes(event.key)) return;
      event.preventDefault();
      if (event.key === "Escape") return hide();
      const here = current && current.parentElement === body ? current : null;
      if (event.key === "Enter") {
        if (here && pins) {
          pin(here);
          const first = box.querySelector("button");
          if (first) first.focus();
        }
        return;
      }
      const next = event.key === "ArrowRight" ? (here ? here.nextElementSibling : body.firstElementChild)
        : here && here.previousElementSibling;
      if (next) { next.scrollIntoView({ block: "nearest" }); show(next); }
    });
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !current) return;
      const body = current.parentElement;
      hide();
      body.focus();
    });
    return { hide };
  }
  // A list under filter buttons, a search field and page numbers, of which one page is drawn.
  // `texts(item)` are what is searched, `draw(item)` gives its element, `total()` says of how many
  // items ("20 examples") the list is, `leave()` is called before another page is drawn.
  function browse({ items, filters, texts, draw, total, leave = () => {} }) {
    const PAGE = 10;
    const buttons = [...document.querySelectorAll("[data-filter]")];
    const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
    const state = { filter: pressed.dataset.filter, query: "", page: 0 };
    function render() {
      leave();
      const query = state.query.toLowerCase();
      const found = items().filter((item) => filters[state.filter](item)
        && (!query || texts(item).some((text) => text.toLowerCase().includes(query))));
      const pages = Math.max(1, Math.ceil(found.length / PAGE));
      state.page = Math.min(state.page, pages - 1);
      at("count").textContent = `${found.length} of ${total()}, page ${state.page + 1} of ${pages}`;
      at("previous").disabled = state.page === 0;
      at("next").disabled = state.page >= pages - 1;
      at("examples").replaceChildren(...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(draw));
      for (const button of buttons)
        button.setAttribute("aria-pressed", button.dataset.filter === state.filter);
    }
    const change = (values) => { Object.assign(state, { page: 0 }, values); render(); };
    for (const button of buttons)
      button.addEventListener("click", () => change({ filter: button.dataset.filter }));
    let wait;
    at("query").addEventListener("input", (event) => {
      clearTimeout(wait);
      wait = setTimeout(() => change({ query: event.target.value }), 120);
    });
    const turn = (step) => { change({ page: state.page + step }); at("browser").scrollIntoView(); };
    at("previous").addEventListener("click", () => turn(-1));
    at("next").addEventListener("click", () => turn(1));
    return { restart: () => change({}) };
  }
  return { at, make, percent, points, visible, labelCells, unpack, shade, card, browse };
})();
