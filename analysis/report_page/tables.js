// A table of a page: every column sorts, by its button; a third press brings back the order that it came in.
const LEFT = new Set(["name", "task", "curve"]);

function sortable({ title, columns, rows }, open = null) {
  let column = -1, down = false;
  const body = node("tbody");
  const heads = columns.map(([name, kind], place) =>
    node("th", { scope: "col", class: LEFT.has(kind) ? null : "number" },
      node("button", { type: "button", on: { click: () => sort(place) } }, plain(name))));
  function sort(place) {
    const first = !LEFT.has(columns[place][1]);
    if (column !== place) [column, down] = [place, first];
    else if (down === first) down = !down;
    else column = -1;
    heads.forEach((head, at) => at === column ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    fill();
  }
  function fill() {
    const order = column < 0 ? rows : [...rows].sort((a, b) => (down ? -1 : 1) * compare(a[column], b[column]) || 0);
    body.replaceChildren(...order.map((row) => node("tr", {}, row.map((value, at) => cell(value, columns[at][1], open)))));
  }
  fill();
  return node("section", {}, node("h3", {}, title),
    node("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
      node("table", {}, node("thead", {}, node("tr", {}, heads)), body)));
}

function compare(a, b) {
  if (Array.isArray(a)) return compare(a[0], b[0]);
  if (a === null || b === null) return a === b ? 0 : a === null ? -1 : 1;
  return typeof a === "string" ? (a < b ? -1 : a > b ? 1 : 0) : a - b;
}

function cell(value, kind, open) {
  const text = FORMATS[kind](value);
  if (kind === "curve" && open) return node("td", {}, node("button", { type: "button", on: { click: () => open(value[1]) } }, text));
  if (kind === "task") {
    const at = T.id.indexOf(value);
    return node("td", { class: "mono", title: text }, at < 0 ? text : node("a", { href: `#/task/${at}` }, text));
  }
  return node("td", { class: LEFT.has(kind) ? null : "number", title: LEFT.has(kind) ? text : null }, text);
}

function facts(pairs) {
  return node("dl", { class: "facts" }, pairs.map(([name, value]) => [
    node("dt", { class: name.startsWith(" ") ? "part" : null }, plain(name.trim().replaceAll("_", " "))),
    node("dd", {}, plain(value)),
  ]));
}
