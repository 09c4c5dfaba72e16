// Which page is shown, and the keys.
const PAGES = [["overview", "Overview", overviewPage], ["timing", "Timing", timingPage], ["usage", "Usage", usagePage], ["path", "Critical path", pathPage], ["tasks", "Tasks", listPage]];
const KEYS = [["1 \u2026 5", "overview, timing, usage, critical path, tasks"], ["/", "search tasks"], ["j k \u2193 \u2191", "next and previous task"], ["Home End PgUp PgDn", "far in the list"],
  ["Enter", "open the task"], ["Esc", "back to the list; out of the search"], ["e", "fold or unfold all turns of a task"], ["Tab", "everything else: buttons sort, links open"], ["?", "these keys"]];
let shown = "";

function overviewPage() {
  const share = F.overview.find((table) => table.title === "By category");
  return [node("h2", { class: "unseen" }, "Overview"), node("p", { class: "lead" }, plain(F.sentence)), F.notes.map((note) => node("p", { class: "dim" }, plain(note))),
    node("div", { class: "columns" }, node("section", {}, node("h3", {}, "The run"), facts(F.facts)), node("div", {}, outcomePlot(), share && share.rows.length > 1 ? intervalPlot(share) : null, reliabilityPlot())),
    F.overview.map((table) => sortable(table))];
}

function timingPage() {
  if (!F.timing.length) return [node("p", { class: "lead" }, D.absence || "No call is in the log yet.")];
  let chosen = 0, scale = "log";
  const place = node("div", { id: "distribution", "aria-live": "polite" });
  const show = (at, by = scale) => { [chosen, scale] = [at, by]; place.replaceChildren(distributionPlot(F.curves[chosen], scale)); };
  const scales = ["log", "linear"].map((name) => node("button", { type: "button", on: { click: () => show(chosen, name) } }, name));
  show(0);
  const parts = F.components.map((row) => ({ name: `${row.name} (${grouped(row.calls)})`, parts: F.parts.map((part) => row.parts[part] || 0) }));
  return [node("h2", { class: "unseen" }, "Timing"), node("p", { class: "dim" }, "Of calls that succeeded. A name in a table shows its distribution here."),
    node("div", { class: "columns" }, node("div", {}, place, node("div", { class: "command" }, scales)), parts.length ? stackedBars("Where a mean call goes", F.parts, parts) : null),
    F.timing.map((table) => sortable(table, (at) => { show(at); place.scrollIntoView({ block: "center" }); }))];
}

function usagePage() {
  const tables = F.usage.filter((table) => table.rows.length);
  return [node("h2", { class: "unseen" }, "Usage"), tables.length ? tables.map((table) => sortable(table)) : node("p", { class: "lead" }, D.absence || "No call is in the log yet.")];
}

function pathPage() {
  if (!F.segments.length) return [node("p", { class: "lead" }, D.absence || "No task is in the log yet.")];
  return F.segments.map((segment) => node("section", {}, node("h2", {}, `Segment ${segment.epoch}`),
    node("div", { class: "columns" }, facts(segment.facts), node("div", {}, runningPlot(segment),
      stackedBars("Slowest attempts, by stage", F.stages, segment.slowest.slice(0, 12).map((one) => ({ name: one.id, parts: one.stages })), (row) => `#/task/${T.id.indexOf(row.name)}`))),
    segment.tables.map((table) => sortable(table))));
}

function banner() {
  const lines = [];
  if (D.withheld) lines.push(`Texts are withheld: ${D.withheld}. Figures are complete. For your own eyes: python -m analysis report ${quoted(D.run)} --no-redact, or python -m analysis show ${quoted(D.run)} TASK.`);
  else if (Math.min(D.text_bytes, D.document_bytes) < D.cut) lines.push(`To stay small, this page holds the first ${D.text_bytes} bytes of each text and ${D.document_bytes ? `the first ${D.document_bytes} of each document` : "no text of the documents that were found"}; python -m analysis show ${quoted(D.run)} TASK --full has them all.`);
  if (D.state === "not ended") lines.push(`The run had not ended when this was made (${D.made}): it is a snapshot.`);
  byId("banner").hidden = !lines.length;
  byId("banner").replaceChildren(...lines.map((line) => node("p", {}, plain(line))));
}

async function render() {
  const [, page, task] = location.hash.split("/"), found = PAGES.find(([name]) => name === page);
  const at = page === "task" && T.id[Number(task)] !== undefined ? Number(task) : -1;
  const current = at >= 0 ? `task/${at}` : found ? page : "overview";
  const isNew = current !== shown;
  shown = current;
  document.querySelectorAll("nav a").forEach((link) => link.dataset.page === (at >= 0 ? "tasks" : current) ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current"));
  const content = at >= 0 ? await storyPage(at) : (found || PAGES[0])[2]();
  if (shown !== current) return;
  byId("main").replaceChildren(...content.flat(Infinity).filter(Boolean));
  if (isNew) scrollTo(0, 0);
  if (at >= 0) {
    byId("task-title").focus({ preventScroll: true });
    if (view.order.includes(at)) view.selected = view.order.indexOf(at);
  }
  if (current === "tasks" && COUNT) {
    tell("");
    draw();
    byId("rows").scrollTop = view.top;
    select(view.selected);
    byId("grid").focus({ preventScroll: true });
  }
  document.documentElement.dataset.shown = current;
}

// At once: a key that follows must find the page that this one asked for.
function go(hash) {
  if (location.hash !== hash) history.pushState(null, "", hash);
  render();
}

function neighbour(by) {
  const at = view.order.indexOf(Number(shown.split("/")[1])) + by;
  if (view.order[at] === undefined) return;
  view.selected = at;
  history.replaceState(null, "", `#/task/${view.order[at]}`);
  render();
}

const MOVES = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -1e9, End: 1e9 };

function keyed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const target = event.target, key = event.key, inField = target.matches("input"), inTasks = shown === "tasks", inTask = shown.startsWith("task/");
  if (key === "Escape") {
    if (inTask) go("#/tasks");
    else if (inTasks && byId("grid")) byId("grid").focus();
    else return;
  } else if (inField) {
    if (key !== "Enter" && key !== "ArrowDown") return;
    byId("grid")?.focus();
  } else if (target.matches("select")) return;
  else if (key === "?") openHelp();
  else if (key === "/") { if (!inTasks) go("#/tasks"); byId("search").focus(); byId("search").select(); }
  else if (/^[1-5]$/.test(key)) go(`#/${PAGES[Number(key) - 1][0]}`);
  else if (inTasks && key in MOVES && COUNT) select(view.selected + MOVES[key]);
  else if (inTasks && key === "Enter" && !target.matches("a, button, summary") && view.order.length) go(`#/task/${view.order[view.selected]}`);
  else if (inTask && (key === "j" || key === "k")) neighbour(MOVES[key]);
  else if (inTask && key === "e") foldAll();
  else return;
  event.preventDefault();
}

function foldAll() {
  const turns = [...document.querySelectorAll("details.turn")], open = !turns.some((turn) => turn.open);
  turns.forEach((turn) => { turn.open = open; });
}

function openHelp() {
  byId("help").replaceChildren(node("h2", { id: "help-title" }, "Keys"), facts(KEYS), node("form", { method: "dialog" }, node("button", {}, "Close")));
  byId("help").showModal();
}

byId("run").textContent = plain(D.name);
byId("run").title = plain(D.run);
byId("tabs").append(...PAGES.map(([page, name]) => node("a", { href: `#/${page}`, "data-page": page }, name)));
byId("help-button").addEventListener("click", openHelp);
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
document.addEventListener("keydown", keyed);
addEventListener("hashchange", render);
addEventListener("resize", draw);
banner();
render();
