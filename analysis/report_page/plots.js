// Plots as SVG, coloured by the page's own properties, so that light and dark need no second drawing.
const colour = (stage) => `var(--${stage === "code" ? "code-stage" : stage})`;
const OUTCOME_COLOURS = { right: "var(--good)", wrong: "var(--expert)", limited: "var(--web)", failed: "var(--bad)", owed: "var(--code-stage)", pending: "var(--other)" };

function figure(caption, width, height, label, ...content) {
  return node("figure", {}, node("figcaption", {}, caption),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, content));
}

function text(x, y, words, options = {}) {
  return svg("text", { x, y, ...options }, plain(words));
}

function rect(x, y, width, height, fill, title) {
  return svg("rect", { x, y, width: Math.max(0, width), height, fill }, title ? svg("title", {}, plain(title)) : null);
}

function legend(entries) {
  return node("ul", { class: "legend" }, entries.map(([name, fill]) => node("li", {}, node("i", { style: { background: fill } }), plain(name))));
}

function niceTicks(most, wanted = 5) {
  const raw = most / wanted, power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw) || 1;
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, at) => at * step);
}

function outcomePlot() {
  const all = F.outcomes.reduce((sum, [, count]) => sum + count, 0), width = 640;
  if (!all) return null;
  let x = 0;
  const bars = F.outcomes.map(([name, count]) => {
    const part = rect(x, 0, (width * count) / all, 26, OUTCOME_COLOURS[name], `${name}: ${grouped(count)} (${percent(count / all)})`);
    x += (width * count) / all;
    return part;
  });
  const said = F.outcomes.filter(([, count]) => count);
  const made = figure(`All ${grouped(all)} planned tasks`, width, 26, said.map(([name, count]) => `${name} ${count}`).join(", "), bars);
  made.append(legend(said.map(([name, count]) => [`${name} ${grouped(count)} (${percent(count / all)})`, OUTCOME_COLOURS[name]])));
  return made;
}

function intervalPlot(table) {
  const shown = table.rows.slice(0, 30), left = 178, width = 640, right = width - 12, row = 22, height = shown.length * row + 24;
  const at = (share) => left + (right - left) * share;
  const grid = [0, 0.25, 0.5, 0.75, 1].map((share) => [
    svg("line", { class: "axis", x1: at(share), x2: at(share), y1: 0, y2: height - 18 }),
    text(at(share), height - 4, percent(share, 0), { class: "dim", "text-anchor": share === 1 ? "end" : "middle" }),
  ]);
  const rows = shown.map(([name, n, , , , , accuracy, low, high], place) => {
    const y = place * row + row / 2;
    return [
      text(left - 8, y + 4, clipped(`${name} (${n})`, 24), { "text-anchor": "end" }),
      svg("line", { x1: at(low), x2: at(high), y1: y, y2: y, stroke: "var(--orchestrator)", "stroke-width": 6, "stroke-opacity": 0.35 }),
      svg("circle", { cx: at(accuracy), cy: y, r: 4, fill: "var(--orchestrator)" }, svg("title", {}, `${plain(name)}: ${percent(accuracy)}, 95% ${percent(low)} to ${percent(high)}`)),
    ];
  });
  return figure("Accuracy by category, with its 95% Wilson interval", width, height, shown.map((one) => `${plain(one[0])} ${percent(one[6])}`).join(", "), grid, rows);
}

const clipped = (words, most) => (words.length > most ? `${words.slice(0, most - 1)}\u2026` : words);

function reliabilityPlot() {
  if (!F.reliability.length) return null;
  const size = 280, pad = 42, at = (share) => pad + (size - pad - 8) * share, up = (share) => size - 26 - (size - 34) * share;
  const grid = [0, 0.5, 1].map((share) => [
    svg("line", { class: "axis", x1: at(0), x2: at(1), y1: up(share), y2: up(share) }),
    text(at(0) - 5, up(share) + 4, percent(share, 0), { class: "dim", "text-anchor": "end" }),
    text(at(share), size - 10, percent(share, 0), { class: "dim", "text-anchor": share === 1 ? "end" : "middle" }),
  ]);
  const points = F.reliability.map((bin) => svg("circle", { cx: at(bin.confidence), cy: up(bin.right), r: 4.5, fill: "var(--orchestrator)" },
    svg("title", {}, `said ${percent(bin.confidence)}, right ${percent(bin.right)} of ${bin.n}`)));
  const line = svg("line", { class: "ink", "stroke-dasharray": "4 3", x1: at(0), y1: up(0), x2: at(1), y2: up(1) });
  return figure("Calibration: stated confidence (across) and share that is right (up), bins of equal count", size, size,
    F.reliability.map((bin) => `${percent(bin.confidence)} said, ${percent(bin.right)} right`).join("; "), grid, line, points);
}

function distributionPlot(curve, scale) {
  const bins = curve.bins[scale] || curve.bins.linear;
  if (!bins) return node("p", { class: "dim" }, "No value.");
  const width = 640, height = 220, left = 46, right = width - 40, bottom = height - 34, top = 10;
  const isLog = bins === curve.bins.log, low = bins.edges[0], high = bins.edges.at(-1);
  const place = (value) => isLog ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
  const x = (value) => left + (right - left) * Math.min(1, Math.max(0, place(value)));
  const most = Math.max(...bins.counts), y = (count) => bottom - (bottom - top) * (count / most);
  const bars = bins.counts.map((count, at) => rect(x(bins.edges[at]) + 0.5, y(count), x(bins.edges[at + 1]) - x(bins.edges[at]) - 1, bottom - y(count),
    "var(--prefill)", `${short(bins.edges[at])} to ${short(bins.edges[at + 1])} ${curve.unit}: ${grouped(count)}`));
  const steps = curve.curve.map((value, at) => `${at ? "L" : "M"}${x(value).toFixed(1)} ${(bottom - (bottom - top) * (at / (curve.curve.length - 1))).toFixed(1)}`).join("");
  const labels = bins.edges.filter((_, at) => at % 2 === 0).map((edge) => text(x(edge), bottom + 14, short(edge, 2), { class: "dim", "text-anchor": "middle" }));
  const sides = [0, 0.5, 1].map((share) => [
    svg("line", { class: "axis", x1: left, x2: right, y1: bottom - (bottom - top) * share, y2: bottom - (bottom - top) * share }),
    text(left - 5, bottom - (bottom - top) * share + 4, grouped(most * share), { class: "dim", "text-anchor": "end" }),
    text(right + 4, bottom - (bottom - top) * share + 4, percent(share, 0), { class: "dim" }),
  ]);
  const unit = text((left + right) / 2, height - 3, `${curve.unit === "s" ? "seconds" : "tokens"}, ${isLog ? "logarithmic" : "linear"}`, { class: "dim", "text-anchor": "middle" });
  return figure(`${plain(curve.title)}: ${grouped(curve.n)} values; bars are counts, the line is the share below`, width, height,
    `distribution of ${plain(curve.title)}`, sides, bars, labels, svg("path", { class: "ink", "stroke-width": 1.5, d: steps }), unit);
}

function stackedBars(caption, names, rows, link = null) {
  const width = 640, left = 190, bar = 20, most = Math.max(...rows.map((row) => row.parts.reduce((sum, one) => sum + one, 0)), 1e-12);
  const height = rows.length * bar + 22, scale = (width - left - 70) / most;
  const drawn = rows.map((row, at) => {
    let x = left;
    const y = at * bar + 3, whole = row.parts.reduce((sum, one) => sum + one, 0);
    const parts = row.parts.map((value, part) => {
      const made = rect(x, y, value * scale, bar - 6, colour(names[part]), `${row.name}: ${names[part]} ${span(value)}`);
      x += value * scale;
      return made;
    });
    const label = text(left - 8, y + 11, clipped(plain(row.name), 28), { "text-anchor": "end" });
    return [link ? svg("a", { href: link(row) }, label) : label, parts, text(x + 5, y + 11, span(whole), { class: "dim" })];
  });
  const made = figure(caption, width, height - 16, rows.map((row) => plain(row.name)).join(", "), drawn);
  const used = names.filter((_, part) => rows.some((row) => row.parts[part] > 0));
  made.append(legend(used.map((name) => [name, colour(name)])));
  return made;
}

function runningPlot(segment) {
  const { span_s: whole, stages, last_start_s: last } = segment.running, moments = stages[0].length;
  const width = 900, height = 240, left = 40, right = width - 10, bottom = height - 24, top = 12, most = Math.max(segment.slots, 1) * 1.05;
  const x = (at) => left + ((right - left) * at) / moments, y = (count) => bottom - ((bottom - top) * count) / most;
  let below = new Array(moments).fill(0);
  const areas = stages.map((values, stage) => {
    const above = below.map((value, at) => value + values[at]);
    const line = (row) => row.flatMap((value, at) => [`${x(at).toFixed(1)} ${y(value).toFixed(1)}`, `${x(at + 1).toFixed(1)} ${y(value).toFixed(1)}`]);
    const d = `M${line(above).join("L")}L${line(below).reverse().join("L")}Z`;
    below = above;
    return values.some((value) => value > 0) ? svg("path", { d, fill: colour(F.stages[stage]) }, svg("title", {}, F.stages[stage])) : null;
  });
  const time = (seconds) => left + ((right - left) * seconds) / whole;
  const marks = niceTicks(whole, 8).map((tick) => [
    svg("line", { class: "axis", x1: time(tick), x2: time(tick), y1: bottom, y2: bottom + 4 }),
    text(time(tick), bottom + 16, span(tick), { class: "dim", "text-anchor": tick ? "middle" : "start" }),
  ]);
  const sides = niceTicks(segment.slots, 4).map((tick) => [
    svg("line", { class: "axis", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    text(left - 5, y(tick) + 4, grouped(tick), { class: "dim", "text-anchor": "end" }),
  ]);
  const slots = svg("line", { class: "ink", "stroke-dasharray": "5 3", x1: left, x2: right, y1: y(segment.slots), y2: y(segment.slots) });
  const tail = [svg("line", { class: "ink", "stroke-dasharray": "2 3", x1: time(last), x2: time(last), y1: top, y2: bottom }),
    text(Math.min(time(last) + 4, right - 90), top + 8, "last task starts", { class: "dim" })];
  const made = figure(`What the running tasks do, over ${span(whole)}; dashed: the ${grouped(segment.slots)} slots`, width, height,
    "tasks running over time, by stage", sides, areas, slots, tail, marks);
  made.append(legend(F.stages.filter((_, at) => stages[at].some((value) => value > 0)).map((name) => [name, colour(name)])));
  return made;
}
