// The list of tasks: a window on rows of one height, so that any number of them scrolls.
const ROW = 28, HEAD = 31;
const STATE = (task) => {
  const outcome = word(T.outcome[task]);
  if (!outcome) return "pending";
  return outcome !== "ok" ? outcome : T.right[task] === 1 ? "right" : T.right[task] === 0 ? "wrong" : "ok";
};
const STATES = T.id.map((_, task) => STATE(task));
const TONE = { right: "good", wrong: "bad", failed: "bad", limited: "warn", owed: "warn" };
const HEADS = [
  ["#", "number", (task) => task], ["task", "", (task) => T.id[task]], ["state", "", (task) => STATES[task]],
  ["category", "wide", (task) => word(T.category[task])], ["conf.", "number wide", (task) => T.confidence[task]], ["turns", "number", (task) => T.turns[task]],
  ["took", "number", (task) => T.took[task]], ["cost", "number", (task) => T.cost[task]], ["tokens", "number wide", (task) => T.prompt[task] + T.completion[task]],
  ["models", "wide", (task) => T.models[task].map(word).join(" ")],
];
const ABOUT = T.id.map((id, task) => [id, STATES[task], ...[T.category, T.type, T.error, T.method].map((column) => word(column[task])),
  ...[...T.tools[task], ...T.models[task]].map(word)].join("\n").toLowerCase());
const FILTERS = [
  ["trial", (task) => [String(T.trial[task])]], ["state", (task) => [STATES[task]]], ["category", (task) => [word(T.category[task])]], ["tool", (task) => T.tools[task].map(word)],
  ["model", (task) => T.models[task].map(word)], ["error", (task) => [word(T.error[task])]], ["answer type", (task) => [word(T.type[task])]],
];
const view = { words: "", chosen: {}, sort: 0, down: false, order: T.id.map((_, task) => task), selected: 0, top: 0, search: 0, matched: null };

function wordsOf(typed) {
  return typed.toLowerCase().split(/\s+/).filter(Boolean);
}

function passes(task) {
  return FILTERS.every(([name, values]) => !view.chosen[name] || values(task).includes(view.chosen[name]));
}

function arrange() {
  const keep = view.order[view.selected], value = HEADS[view.sort][2], sign = view.down ? -1 : 1;
  view.order = T.id.map((_, task) => task).filter((task) => passes(task) && (!view.matched || view.matched.has(task)));
  if (view.sort || view.down) view.order.sort((a, b) => sign * compare(value(a), value(b)) || a - b);
  view.selected = Math.max(0, view.order.indexOf(keep));
  draw();
}

// What is known of a task is looked through at once, its texts part by part: the list fills while one reads.
async function search(typed) {
  const run = ++view.search, words = wordsOf(typed);
  view.words = typed;
  if (!words.length) {
    view.matched = null;
    arrange();
    return tell("");
  }
  const escaped = words.map((one) => JSON.stringify(one).slice(1, -1));
  view.matched = new Set(T.id.map((_, task) => task).filter((task) => words.every((one) => ABOUT[task].includes(one))));
  arrange();
  let told = performance.now(), damage = "";
  for (let block = 0; block < D.told.length && !D.withheld; block++) {
    const lines = await searchable(block).catch(() => []);
    if (!lines.length) damage = `some texts ${DAMAGED}`;
    if (run !== view.search) return undefined;
    lines.forEach((line, place) => {
      const task = TOLD[block] + place;
      if (words.every((one, at) => line.includes(escaped[at]) || ABOUT[task].includes(one))) view.matched.add(task);
    });
    if (performance.now() - told > 80) {
      tell(`searching the texts, ${percent(block / D.told.length, 0)}`);
      arrange();
      await new Promise((done) => setTimeout(done));
      if (run !== view.search) return undefined;
      told = performance.now();
    }
  }
  arrange();
  return tell(damage);
}

function tell(doing) {
  const count = `${grouped(view.order.length)} of ${grouped(COUNT)} tasks`;
  if (byId("count")) byId("count").textContent = doing ? `${count} (${doing})` : count;
  if (!doing) say(count);
}

function listPage() {
  const field = node("input", { type: "search", id: "search", placeholder: D.withheld ? "Search ids, models, categories (texts are withheld)" : "Search ids, questions, replies, code, outputs", "aria-label": "Search tasks", autocomplete: "off", spellcheck: "false", maxlength: 200 });
  field.value = view.words;
  let wait = 0;
  field.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => search(field.value), 120); });
  const filters = FILTERS.map(([name, values]) => filterOf(name, values)).filter(Boolean);
  const reset = node("button", { type: "button", on: { click: () => { view.chosen = {}; field.value = ""; search(""); render(); byId("search").focus(); } } }, "Reset");
  const heads = node("div", { class: "heads", role: "row" }, HEADS.map(([name, look], at) =>
    node("span", { class: look, role: "columnheader" }, node("button", { type: "button", on: { click: () => sortBy(at) } }, name))));
  const rows = node("div", { class: "rows", id: "rows", role: "presentation" }, heads, node("div", { id: "canvas", role: "rowgroup" }));
  rows.addEventListener("scroll", () => { view.top = rows.scrollTop; requestAnimationFrame(draw); });
  const grid = node("div", { class: "list", id: "grid", role: "grid", tabindex: 0, "aria-label": "Tasks", "aria-rowcount": COUNT + 1 }, rows);
  return [node("h2", { class: "unseen" }, "Tasks"),
    node("search", { class: "bar" }, field, filters, reset, node("span", { id: "count", class: "dim" })),
    COUNT ? grid : node("p", { class: "lead" }, D.absence || "No task is in the log yet.")];
}

function filterOf(name, values) {
  const counts = new Map();
  for (let task = 0; task < COUNT; task++) for (const value of new Set(values(task))) if (value) counts.set(value, (counts.get(value) || 0) + 1);
  if (counts.size < 2 && !view.chosen[name]) return null;
  const options = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) => node("option", { value, selected: view.chosen[name] === value }, `${clipped(plain(value), 60)} (${grouped(count)})`));
  const choose = (event) => { view.chosen[name] = event.target.value; arrange(); tell(""); };
  return node("label", {}, node("span", {}, name), node("select", { id: `filter-${name.replace(" ", "-")}`, on: { change: choose } }, node("option", { value: "" }, "all"), options));
}

function sortBy(at) {
  const first = HEADS[at][1].includes("number") && at > 0;
  if (view.sort !== at) [view.sort, view.down] = [at, first];
  else view.down = !view.down;
  arrange();
}

function draw() {
  const rows = byId("rows");
  if (!rows) return;
  document.querySelectorAll(".heads > span").forEach((head, at) => at === view.sort ? head.setAttribute("aria-sort", view.down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
  rows.style.height = `${Math.max(8 * ROW, Math.min(view.order.length * ROW + HEAD + 2, innerHeight - rows.getBoundingClientRect().top - scrollY - 18))}px`;
  byId("canvas").style.height = `${view.order.length * ROW}px`;
  const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - 6), last = Math.min(view.order.length, first + Math.ceil(rows.clientHeight / ROW) + 12);
  byId("canvas").replaceChildren(...view.order.slice(first, last).map((task, at) => taskRow(task, first + at)));
  if (!view.order.length) byId("canvas").replaceChildren(node("p", { class: "row dim" }, node("span"), node("span", {}, "No task matches.")));
  byId("grid").setAttribute("aria-activedescendant", view.order.length ? `row-${view.selected}` : "");
}

function taskRow(task, at) {
  const trial = T.trial[task] ? ` trial ${T.trial[task]}` : "", state = STATES[task];
  const values = [grouped(task), plain(T.id[task]) + trial, state, plain(word(T.category[task])), T.confidence[task] < 0 ? DASH : percent(T.confidence[task] / 1000, 0),
    grouped(T.turns[task]), span(said(T.took[task], TICK_S)), usd(said(T.cost[task], TICK_USD)), T.prompt[task] < 0 ? DASH : grouped(T.prompt[task] + Math.max(0, T.completion[task])),
    plain(T.models[task].map(word).join(", "))];
  const looks = HEADS.map(([, look]) => look);
  const made = node("div", { class: "row", role: "row", id: `row-${at}`, "aria-rowindex": at + 2, "aria-selected": String(at === view.selected), style: { top: `${at * ROW}px` },
    on: { click: () => { select(at); go(`#/task/${task}`); } } },
    values.map((value, column) => node("span", { role: "gridcell", class: [looks[column], column === 1 ? "id" : "", column === 2 ? TONE[state] : ""].filter(Boolean).join(" ") || null, title: column === 1 || column === 9 ? value : null }, value)));
  return made;
}

function select(at) {
  view.selected = Math.max(0, Math.min(view.order.length - 1, at));
  const rows = byId("rows");
  if (rows) {
    const top = view.selected * ROW;
    if (top < rows.scrollTop) rows.scrollTop = top;
    else if (top + ROW + HEAD > rows.scrollTop + rows.clientHeight) rows.scrollTop = top + ROW + HEAD - rows.clientHeight;
    view.top = rows.scrollTop;
  }
  draw();
}
