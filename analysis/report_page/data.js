// The tasks' own rows and texts: packed in parts, unpacked when they are asked for.
const startsOf = (sizes) => sizes.reduce((starts, size) => [...starts, starts.at(-1) + size], [0]);
const FIRST = startsOf(D.parts), TOLD = startsOf(D.told), SHELVED = startsOf(D.shelves);
const TICK_S = 1e-4, TICK_USD = 1e-7;
const word = (code) => D.words[code] || "";
const whole = document.readyState === "loading" ? new Promise((done) => document.addEventListener("DOMContentLoaded", done)) : Promise.resolve();

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return bytes;
}

// What a reader is told where a part of the page is missing: the file was cut, on its way or by a full disk.
const DAMAGED = "cannot be read from this page, which is not whole";

// Of an element that nothing follows yet, only the beginning may have come.
async function unpacked(kind, part) {
  if (!byId(`${kind}-${part}`)?.nextSibling) await whole;
  const body = byId(`${kind}-${part}`).textContent;
  if (D.packing === "lzma") return dense(body);
  const stream = new Blob([bytesOf(body)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream("deflate"))).text();
}

const recent = new Map();
function remembered(key, make) {
  if (!recent.has(key)) {
    recent.set(key, make());
    if (recent.size > 9) recent.delete(recent.keys().next().value);
  }
  return recent.get(key);
}

// Which of the stretches, that begin at `first`, a place is in.
function within(first, place) {
  let low = 0, high = first.length - 2;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (first[middle] <= place) low = middle; else high = middle - 1;
  }
  return low;
}

const said = (value, tick = 1) => (value < 0 ? null : value * tick);

// A task's rows in the order of telling, each with its texts and what it found.
async function rowsOf(task) {
  const part = within(FIRST, task), place = task - FIRST[part], block = within(TOLD, task);
  const [columns, lines] = await Promise.all([
    remembered(`figures-${part}`, async () => withTimes(JSON.parse(await unpacked("figures", part)))),
    remembered(`texts-${block}`, async () => (await unpacked("texts", block)).split("\n")),
  ]);
  const start = columns.count.slice(0, place).reduce((sum, one) => sum + one, 0);
  const rows = Array.from({ length: columns.count[place] }, (_, at) => rowAt(columns, start + at));
  const asked = [], flat = JSON.parse(lines[task - TOLD[block]]);
  for (let at = 0; at < flat.length; at += 4) {
    const piece = { name: D.pieces[flat[at + 1]], text: flat[at + 2], left: flat[at + 3] };
    (flat[at] < 0 ? asked : rows[flat[at]].pieces).push(piece);
  }
  const [of, source, document_, score, text_] = columns.hits;
  for (let at = 0; at < of.length; at++) {
    const row = rows[of[at] - start];
    if (row) row.found.push({ source: word(source[at]), document: document_[at], score: score[at] / 1000, text: text_[at] });
  }
  return { rows, asked };
}

function withTimes(columns) {
  let at = 0;
  columns.at = columns.since.map((step) => (at += step) / 1e6);
  return columns;
}

function rowAt(c, at) {
  return {
    kind: word(c.kind[at]), role: word(c.role[at]), tool: word(c.tool[at]), alias: word(c.alias[at]), model: word(c.model[at]),
    endpoint: word(c.endpoint[at]), status: word(c.status[at]), errorKind: word(c.error_kind[at]), worker: word(c.worker[at]),
    backend: word(c.search_backend[at]), outcome: word(c.outcome[at]), method: word(c.verdict_method[at]),
    at: c.at[at], took: said(c.duration_s[at], TICK_S), queue: said(c.queue_s[at], TICK_S), prefill: said(c.prefill_s[at], TICK_S), decode: said(c.decode_s[at], TICK_S),
    prompt: said(c.prompt_tokens[at]), cached: said(c.cached_tokens[at]), completion: said(c.completion_tokens[at]), cost: said(c.cost_usd[at], TICK_USD),
    local: said(c.local_hits[at]), web: said(c.web_hits[at]), exit: c.exit_status[at] < 0 ? null : c.exit_status[at] - D.exit_zero,
    right: c.is_correct[at] < 0 ? null : c.is_correct[at] === 1, confidence: said(c.confidence[at], 1e-3), retries: c.retries[at],
    trial: c.trial[at], epoch: c.epoch[at], attempt: c.attempt[at], turn: c.turn[at], replayed: c.is_replayed[at] === 1, pieces: [], found: [],
  };
}

async function documentAt(place) {
  if (place < 0) return { text: "", left: 0, absent: { "-1": "text withheld", "-2": "its text is not in the log", "-3": "left out" }[place] };
  const shelf = within(SHELVED, place), at = place - SHELVED[shelf];
  const flat = await remembered(`documents-${shelf}`, async () => JSON.parse(await unpacked("documents", shelf)));
  return { text: flat[2 * at], left: flat[2 * at + 1] };
}

// The texts of a block, a line a task, as a search reads them.
const lowered = new Map();
async function searchable(block) {
  if (!lowered.has(block)) lowered.set(block, unpacked("texts", block).then((lines) => lines.toLowerCase().split("\n")));
  return lowered.get(block);
}
