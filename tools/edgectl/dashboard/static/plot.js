// Lines over time in SVG. A gap in what is known is a gap in the line.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 170;
const LEFT = 38;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;
const COLOURS = 6;

export class Plot {
  constructor(title, { unit, least = 1, most = Infinity, digits = 1 }) {
    this.unit = unit;
    this.least = least;
    this.most = most;
    this.digits = digits;
    this.title = title;
    this.element = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    this.svg = make("svg", { role: "img" });
    this.legend = document.createElement("div");
    this.legend.className = "legend";
    this.element.append(caption, this.svg, this.legend);
  }

  // series: [{name, points: [[at_s, value or null], …]}]; gap_s: a longer silence breaks the line
  draw(series, now_s, window_s, gap_s) {
    const width = Math.max(this.element.clientWidth, 200);
    const highest = Math.max(0, ...series.flatMap((one) => one.points.map(([, value]) => value ?? 0)));
    const top = Math.min(nice(Math.max(highest, this.least)), this.most);
    const x = (at_s) => LEFT + (1 - (now_s - at_s) / window_s) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    const drawn = [...this.axes(width, top, x, y, now_s, window_s)];
    series.forEach((one, index) => {
      const points = one.points.filter(([at_s]) => at_s >= now_s - window_s);
      for (const run of runs(points, gap_s)) drawn.push(curve(run, index, x, y));
    });
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...drawn);
    this.legend.replaceChildren(...series.map((one, index) => this.entry(one, index, now_s - gap_s)));
    this.svg.setAttribute("aria-label", `${this.title}: ${this.legend.textContent}`);
  }

  *axes(width, top, x, y, now_s, window_s) {
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      yield make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at });
      yield text(label(top * share), LEFT - 5, at + 4, "end");
    }
    yield text("now", x(now_s), HEIGHT - 6, "end");
    for (const back_s of window_s > 60 ? range(60, window_s - 30, 60) : range(20, 50, 20)) {
      yield text(back_s < 60 ? `−${back_s} s` : `−${back_s / 60} min`, x(now_s - back_s), HEIGHT - 6, "middle");
    }
  }

  entry(one, index, since_s) {
    const entry = document.createElement("span");
    const swatch = make("svg", { viewBox: "0 0 14 8", "aria-hidden": "true" });
    swatch.append(make("line", { class: `curve s${index % COLOURS}`, x1: 1, x2: 13, y1: 4, y2: 4 }));
    const [at_s, value] = one.points.at(-1) ?? [0, null];
    const known = value !== null && at_s >= since_s;
    const words = document.createElement("span");
    words.textContent = `${one.name} ${known ? `${value.toFixed(this.digits)}${this.unit}` : "–"} `;
    entry.append(swatch, words);
    return entry;
  }
}

function* runs(points, gap_s) {
  let run = [];
  for (const [at_s, value] of points) {
    if (run.length && (value === null || at_s - run.at(-1)[0] > gap_s)) {
      yield run;
      run = [];
    }
    if (value !== null) run.push([at_s, value]);
  }
  if (run.length) yield run;
}

function curve(run, index, x, y) {
  const colour = `s${index % COLOURS}`;
  if (run.length === 1) return make("circle", { class: `dot ${colour}`, cx: x(run[0][0]), cy: y(run[0][1]), r: 2 });
  const points = run.map(([at_s, value]) => `${x(at_s).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  return make("polyline", { class: `curve ${colour}`, points });
}

function* range(first, last, step) {
  for (let at = first; at <= last; at += step) yield at;
}

// The next of 1, 2, 2.5, 5 and 10 times a power of ten.
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= value * 0.999);
}

function label(value) {
  return String(Number(value.toPrecision(3)));
}

function text(words, x, y, anchor) {
  const element = make("text", { x, y, "text-anchor": anchor });
  element.textContent = words;
  return element;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
