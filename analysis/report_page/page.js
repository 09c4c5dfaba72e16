// What all parts of the page share. Texts of a run become text nodes and nothing else: `node` is the only maker of
// elements, and no markup is ever parsed.
const D = JSON.parse(document.getElementById("data").textContent);
const dense = (letters) => new TextDecoder().decode(unlzma(unlettered(letters)));
const T = typeof D.tasks === "string" ? JSON.parse(dense(D.tasks)) : D.tasks;
const F = D.figures, COUNT = T.id.length;
const byId = (id) => document.getElementById(id);

function node(name, options = {}, ...children) {
  return filled(document.createElement(name), options, children);
}

function svg(name, options = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), options, children);
}

function filled(made, options, children) {
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (key === "style") for (const [property, set] of Object.entries(value)) made.style.setProperty(property, set);
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function say(text) {
  byId("said").textContent = text;
}

// As a shell takes it, whatever an id holds.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) && !text.startsWith("-") ? text : `'${text.replaceAll("'", "'\\''")}'`);

function showCommand(task, full = true) {
  const trial = T.trial[task] ? ` --trial ${T.trial[task]}` : "";
  const id = T.id[task];
  return `python -m analysis show ${quoted(D.run)}${trial}${full ? " --full" : ""} ${id.startsWith("-") ? "-- " : ""}${quoted(id)}`;
}
