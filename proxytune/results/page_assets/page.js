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
  return { at, make, percent, visible, labelCells, unpack, shade, card };
})();
