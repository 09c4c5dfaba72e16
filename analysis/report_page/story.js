// One task, turn by turn.
const STAGE = (row) => row.kind === "model_call" ? (F.stages.includes(row.role) ? row.role : "other") : row.kind === "retrieval" ? (row.web ? "web" : "retrieval") : row.kind === "code" ? "code" : "other";
const QUIET = new Set(["attempt", "turn"]);

async function storyPage(task) {
  const told = await rowsOf(task).catch(() => null);
  if (!told) return [...headOf(task), node("p", { class: "bad" }, `The turns of this task ${DAMAGED}.`)];
  const { rows, asked } = told, words = wordsOf(view.words);
  return [
    ...headOf(task), ...asked.map((piece) => pieceNode(piece, task, words, "asked")),
    !asked.length && D.note ? node("p", { class: "dim" }, D.note) : null,
    ...groups(rows, (row) => `${row.trial}/${row.epoch}/${row.attempt}`).map((own) => attemptNode(own, task, words)),
  ].filter(Boolean);
}

function headOf(task) {
  const state = STATES[task], outcome = word(T.outcome[task]);
  const line = [["category", word(T.category[task])], ["answer type", word(T.type[task])], ["judged by", word(T.method[task])], ["error", word(T.error[task])],
    ["confidence", T.confidence[task] < 0 ? "" : percent(T.confidence[task] / 1000, 0)], ["turns", grouped(T.turns[task])], ["model calls", grouped(T.calls[task])], ["took", outcome ? span(said(T.took[task], TICK_S)) : ""],
    ["cost", outcome ? usd(said(T.cost[task], TICK_USD)) : ""], ["tokens", outcome && T.prompt[task] >= 0 ? `${grouped(Math.max(0, T.prompt[task]))} + ${grouped(Math.max(0, T.completion[task]))}` : ""]];
  const at = view.order.indexOf(task);
  const step = (by, name) => node("button", { type: "button", disabled: at < 0 || view.order[at + by] === undefined, on: { click: () => neighbour(by) } }, name);
  return [
    node("div", { class: "crumbs" }, node("a", { href: "#/tasks" }, "\u2190 Tasks"), step(-1, "Previous (k)"), step(1, "Next (j)"), at >= 0 ? node("span", { class: "dim" }, `${grouped(at + 1)} of ${grouped(view.order.length)}`) : null),
    node("div", { class: "crumbs" }, node("h2", { class: "mono", tabindex: -1, id: "task-title" }, plain(T.id[task])), node("span", { class: `badge ${TONE[state] || "dim"}` }, state), T.trial[task] ? node("span", { class: "badge dim" }, `trial ${T.trial[task]}`) : null),
    node("div", { class: "step-line" }, line.filter(([, value]) => value).map(([name, value]) => node("span", {}, node("span", { class: "dim" }, `${name} `), plain(value)))),
    node("div", { class: "command" }, node("span", { class: "dim" }, "Every text to its end:"), node("code", { id: "show-command" }, plain(showCommand(task))), copyButton(showCommand(task))),
  ];
}

function copyButton(words) {
  return node("button", { type: "button", on: { click: () => navigator.clipboard?.writeText(words).then(() => say("copied"), () => say("the browser does not let this page copy")) } }, "Copy");
}

function groups(rows, key) {
  const found = [];
  for (const row of rows) {
    if (!found.length || found.at(-1).key !== key(row)) found.push({ key: key(row), rows: [] });
    found.at(-1).rows.push(row);
  }
  return found.map((group) => group.rows);
}

function attemptNode(rows, task, words) {
  const first = rows[0], zero = first.at;
  const turns = groups(rows, (row) => (row.kind === "result" ? -1 : row.turn));
  return node("section", {},
    node("h3", {}, `Trial ${first.trial}, attempt ${first.attempt}, epoch ${first.epoch}: ${clock(zero)} UTC`, first.worker ? node("span", { class: "dim" }, `  worker ${plain(first.worker)}`) : null),
    waterfall(turns, zero), turns.map((own) => turnNode(own, zero, task, words)));
}

function turnNode(rows, zero, task, words) {
  const number = rows[0].kind === "result" ? -1 : rows[0].turn, turn = rows.find((row) => row.kind === "turn");
  const steps = rows.filter((row) => !QUIET.has(row.kind)), tool = rows.find((row) => row.kind === "tool_call");
  const name = number >= 0 ? `Turn ${number}` : rows.some((row) => row.kind === "result") ? "Result" : "Before the first turn";
  if (!steps.length && !turn) return null;
  const invalid = turn && turn.status !== "ok";
  const hint = [turn ? span(turn.took) : number >= 0 ? "no end in the log" : "", tool ? `${tool.tool} ${tool.alias}` : "", turn?.replayed ? "served again from the record of an earlier attempt" : ""];
  return node("details", { class: "turn", open: true },
    node("summary", {}, node("h4", {}, name), node("span", { class: "dim" }, plain(hint.filter(Boolean).join("  \u00b7  "))), invalid ? node("span", { class: "bad" }, ` ${turn.status.toUpperCase()}`) : null),
    turn ? turn.pieces.map((piece) => pieceNode(piece, task, words)) : null,
    steps.map((row) => stepNode(row, zero, task, words)));
}

// In a dialogue: who speaks to whom. An agent's turn may be an expert's.
function speaks(row) {
  const isUser = row.role === "user", who = isUser ? "user" : row.role === "orchestrator" ? "agent" : `agent (${row.role})`;
  return `${who} \u2192 ${row.pieces.some((piece) => piece.name === "chose") ? "tools" : isUser ? "agent" : "user"}`;
}

function stepNode(row, zero, task, words) {
  const opinion = row.kind === "verdict" && row.role === "judge";
  const name = opinion ? "second opinion" : D.is_dialogue && row.kind === "model_call" ? speaks(row) : row.role || (row.kind === "tool_call" ? row.tool : row.kind);
  const stages = ["queue", "prefill", "decode"].filter((stage) => row[stage] !== null).map((stage) => `${stage} ${span(row[stage])}`);
  const bits = [
    row.alias, row.model, row.endpoint && `at ${row.endpoint}`, span(row.took) + (stages.length ? ` (${stages.join(", ")})` : ""),
    row.prompt === null && row.completion === null ? "" : `${grouped(row.prompt || 0)}${row.cached ? ` (${grouped(row.cached)} cached)` : ""} + ${grouped(row.completion || 0)} tokens`,
    row.cost ? usd(row.cost) : "", row.retries ? `${row.retries} retries` : "", row.kind === "retrieval" && row.local !== null ? `${row.local} local and ${row.web || 0} web hits (${row.backend})` : "",
    row.exit === null ? "" : `exit status ${row.exit}`, row.method && `verdict by ${row.method}`, row.confidence === null ? "" : `confidence ${percent(row.confidence, 0)}`, row.outcome,
  ].filter(Boolean);
  const bad = row.status !== "ok";
  return node("div", { class: "step", style: { "--stage": colour(STAGE(row)) } },
    node("div", { class: "step-line" }, node("span", { class: "dim" }, `+${(row.at - zero).toFixed(2)} s`), node("b", {}, plain(name)), bits.map((bit) => node("span", {}, plain(bit))),
      row.right === null ? null : node("span", { class: row.right ? "good" : "bad" }, row.right ? "right" : "wrong"),
      bad ? node("span", { class: "bad" }, plain(`${row.status}${row.errorKind ? `: ${row.errorKind}` : ""}`)) : null, row.replayed ? node("span", { class: "warn" }, "served again") : null),
    row.pieces.map((piece) => pieceNode(piece, task, words)), row.found.length ? hitsNode(row, task, words) : null);
}

function hitsNode(row, task, words) {
  const made = node("details", { class: "hits" }, node("summary", {}, `${grouped(row.found.length)} documents found`));
  if (!D.withheld && !D.document_bytes) made.append(node("div", { class: "cut" }, "Texts of documents are left out of this page: ", node("code", {}, plain(showCommand(task)))));
  made.addEventListener("toggle", async () => {
    if (!made.open || made.dataset.filled) return;
    made.dataset.filled = "yes";
    for (const [at, hit] of row.found.entries()) {
      const label = `hit ${at + 1} (${hit.source}, document ${hit.document}, ${hit.score.toFixed(3)})`;
      const found = await documentAt(hit.text).catch(() => ({ text: "", left: 0, absent: `its text ${DAMAGED}` }));
      made.append(pieceNode({ ...found, name: label }, task, words));
    }
  });
  return made;
}

function pieceNode(piece, task, words, look = "") {
  if (D.withheld) return node("div", { class: "piece" }, node("span", { class: "label" }, `${plain(piece.name)}: `), node("span", { class: "cut" }, "text withheld"));
  if (piece.absent) return node("div", { class: "piece" }, node("span", { class: "label" }, `${plain(piece.name)}: `), node("span", { class: "cut" }, piece.absent));
  const cut = piece.left ? node("div", { class: "cut" }, `${grouped(piece.left)} more characters are left out of this page: `, node("code", {}, plain(showCommand(task)))) : null;
  return node("div", { class: `piece ${look}` }, node("span", { class: "label" }, plain(piece.name)), node("pre", {}, marked(piece.text, words)), cut);
}

// The text, with what was searched for marked in it.
function marked(body, words) {
  if (!words.length) return [body];
  const lower = body.toLowerCase(), found = [];
  if (lower.length !== body.length) return [body];
  let at = 0;
  while (at < body.length && found.length < 400) {
    const next = words.map((one) => [lower.indexOf(one, at), one.length]).filter(([place]) => place >= 0).sort((a, b) => a[0] - b[0] || b[1] - a[1])[0];
    if (!next) break;
    found.push(body.slice(at, next[0]), node("mark", {}, body.slice(next[0], next[0] + next[1])));
    at = next[0] + next[1];
  }
  return [...found, body.slice(at)];
}

// The calls of an attempt on one clock, a line a turn.
function waterfall(turns, zero) {
  const shown = turns.map((rows) => rows.filter((row) => ["model_call", "retrieval", "code"].includes(row.kind) && !row.replayed)).filter((rows) => rows.length);
  const end = Math.max(...shown.flat().map((row) => row.at + (row.took || 0) - zero), 0);
  if (!shown.length || end <= 0) return null;
  const width = 900, left = 60, line = shown.length > 30 ? 8 : 14, height = shown.length * line + 20, scale = (width - left - 10) / end;
  const bars = shown.map((rows, place) => [
    place % Math.ceil(12 / line) === 0 && (shown.length <= 30 || place % 5 === 0) ? text(left - 6, place * line + 10, rows[0].turn < 0 ? "judge" : `turn ${rows[0].turn}`, { "text-anchor": "end", class: "dim" }) : null,
    rows.map((row) => {
      const wait = Math.min(row.queue || 0, row.took || 0), x = left + (row.at - zero) * scale, y = place * line + 2;
      const title = `${row.role || row.kind} ${row.model || row.alias}: ${span(row.took)} from +${(row.at - zero).toFixed(2)} s`;
      return [wait > 0 ? rect(x, y, wait * scale, line - 4, colour("queue"), title) : null, rect(x + wait * scale, y, Math.max(1, ((row.took || 0) - wait) * scale), line - 4, colour(STAGE(row)), title)];
    }),
  ]);
  const ticks = niceTicks(end, 8).map((tick) => [svg("line", { class: "axis", x1: left + tick * scale, x2: left + tick * scale, y1: 0, y2: height - 16 }),
    text(left + tick * scale, height - 4, span(tick), { class: "dim", "text-anchor": "middle" })]);
  const made = figure("Calls over time", width, height, "calls of this attempt over time", ticks, bars);
  const used = new Set(shown.flat().map(STAGE));
  made.append(legend(["queue", ...F.stages.slice(1)].filter((name) => used.has(name) || (name === "queue" && shown.flat().some((row) => row.queue > 0))).map((name) => [name, colour(name)])));
  return made;
}
