"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (name, properties = {}, ...inside) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
};
const exact = (cell) => cell.dataset.v ?? cell.textContent;

// Tables: sorted by a heading, filtered, copied with all digits.
function compared(a, b) {
  const [x, y] = [Number(a.replaceAll(",", "")), Number(b.replaceAll(",", ""))];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}
function sort(table, heading) {
  const [before, first] = [heading.getAttribute("aria-sort"), heading.className === "words" ? "ascending" : "descending"];
  const down = (before === null ? first : before === "ascending" ? "descending" : "ascending") === "descending";
  all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => exact(row.cells[heading.cellIndex]);
  const [known, unknown] = [[], []];
  for (const row of table.tBodies[0].rows) (value(row) === "-" ? unknown : known).push(row);
  known.sort((a, b) => (down ? -1 : 1) * compared(value(a), value(b)));
  table.tBodies[0].append(...known, ...unknown);
}
function filter(table, wanted, count) {
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted.toLowerCase());
  const shown = rows.filter((row) => !row.hidden).length;
  count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
}
function copy(table) {
  const rows = [...table.rows].filter((row) => !row.hidden);
  const lines = rows.map((row) => [...row.cells].map((cell) => exact(cell).replace(/\s+/g, " ")).join("\t"));
  document.addEventListener("copy", (event) => {
    event.clipboardData.setData("text/plain", lines.join("\n"));
    event.preventDefault();
  }, { once: true });
  document.execCommand("copy");
}
function equip(table) {
  all("th", table).forEach((heading) => heading.firstChild.addEventListener("click", () => sort(table, heading)));
  const count = make("span", { role: "status" });
  const input = make("input", { type: "search", placeholder: "filter", ariaLabel: "filter rows" });
  const button = make("button", { type: "button", textContent: "copy", title: "as tab-separated values, with all digits" });
  input.addEventListener("input", () => filter(table, input.value, count));
  button.addEventListener("click", () => copy(table));
  const title = make("b", {}, table.closest("figure") ? "" : table.caption.textContent);
  const many = table.tBodies[0].rows.length > 7 ? [count, input] : [];
  table.parentElement.before(make("div", { className: "tools" }, title, ...many, button));
  filter(table, "", count);
}

// One run in front of the others, in all figures and tables; again for all of them.
let picked = null;
function pick(series) {
  picked = picked === series ? null : series;
  document.body.classList.toggle("picking", picked !== null);
  for (const one of all("[data-series]")) {
    one.classList.toggle("on", one.dataset.series === picked);
    if (one.type === "button") one.ariaPressed = String(one.dataset.series === picked);
  }
}

// Passages: drawn when they are opened, each token as warm as its activation is beside the largest one here.
function spans(pieces, hottest) {
  return pieces.map((piece) => {
    if (typeof piece === "string") return piece;
    const token = make("b", { textContent: piece[0], title: piece[1] });
    token.style.setProperty("--h", piece[1] / hottest);
    return token;
  });
}
function unfold(details) {
  const pairs = JSON.parse(details.querySelector("script").textContent);
  const warm = pairs.flatMap((pair) => [...pair.chosen, ...pair.rejected]).filter(Array.isArray);
  const hottest = Math.max(...warm.map(([, heat]) => heat));
  for (const pair of pairs) {
    const sides = ["chosen", "rejected"].map((name) => {
      const [note, ...pieces] = pair[name];
      const head = make("small", {}, [name, note].filter(Boolean).join(", "));
      return make("div", { className: "side" }, head, ...spans(pieces, hottest));
    });
    const prompt = make("p", {}, [pair.note, pair.prompt].filter(Boolean).join(": "));
    details.append(make("div", { className: "pair" }, prompt, ...sides));
  }
}
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.matches("details")) target.open = true;
}

all("table").forEach(equip);
all("[data-series]").forEach((one) => one.addEventListener("click", () => pick(one.dataset.series)));
all(".passages").forEach((one) => one.addEventListener("toggle", () => unfold(one), { once: true }));
addEventListener("hashchange", reveal);
reveal();
