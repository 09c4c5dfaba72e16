// How values are written; the same words as in the terminal.
const DASH = "\u2013";
const grouped = (value) => Math.round(value).toLocaleString("en-US");

function short(value, digits = 3) {
  if (value === null || value === undefined) return DASH;
  const rounded = Number(value.toPrecision(digits));
  if (rounded !== 0 && Math.abs(rounded) < 1e-3) return value.toExponential(1).replace("e-", "e\u2212");
  return rounded.toLocaleString("en-US", { maximumFractionDigits: digits + 2 });
}

function percent(value, digits = 1) {
  return value === null || value === undefined ? DASH : `${(100 * value).toFixed(digits)}%`;
}

function usd(value) {
  if (value === null || value === undefined) return DASH;
  return value > 0 && value < 0.01 ? `$${value.toFixed(4)}` : `$${value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return DASH;
  if (seconds < 60) return `${short(Math.round(1000 * seconds) / 1000)} s`; // what is below is the clock's own
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

const clock = (unix) => new Date(unix * 1000).toISOString().replace("T", " ").slice(0, 19);

// An id or a name on one line: what does not print would hide what follows.
const plain = (text) => String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "\ufffd");

const FORMATS = {
  name: plain, task: plain, curve: (value) => plain(value[0]), int: (value) => (value === null ? DASH : grouped(value)),
  number: short, s: (value) => short(value), share: percent, usd, time: clock,
};
