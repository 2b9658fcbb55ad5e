// Line charts in SVG: a line breaks where nothing was measured, lines differ by dashes too, and a
// cursor follows the mouse or the arrow keys.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 150;
const MARGIN = { left: 54, right: 8, top: 8, bottom: 20 };
const CLASSES = ["first", "second"];

function element(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function html(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `value`. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 2, 2.5, 5, 10]) {
    if (step * power >= value) return step * power;
  }
  return value;
}

export function clockTime(unix_s) {
  return new Date(unix_s * 1000).toLocaleTimeString([], { hour12: false });
}

export class LineChart {
  /**
   * @param {string} title
   * @param {{label: string, value: (sample: object) => number|null}[]} series at most two
   * @param {(value: number) => string} format with the unit
   * @param {{top?: number, target?: () => number|null, say: (text: string) => void}} options
   *   top: a fixed upper end; target: a line to keep below or above; say: to screen readers.
   */
  constructor(title, series, format, options) {
    Object.assign(this, { title, series, format, options });
    this.samples = [];
    this.span_s = [0, 1];
    this.cursor = null; // index of a sample; null: the last one
    this.root = html("figure");
    this.readouts = series.map(() => html("span", "readout"));
    this.moment = html("span", "moment");
    this.svg = element("svg", { role: "img", tabindex: "0" });
    this.root.append(this.#caption(), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#moveTo(null));
    this.svg.addEventListener("blur", () => this.#moveTo(null));
    this.svg.addEventListener("keydown", (event) => this.#press(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** Show `samples`, of which those from `from_s` to `to_s` (seconds since the epoch) are seen. */
  show(samples, from_s, to_s) {
    const pointed = this.cursor === null ? null : this.samples[this.cursor];
    this.samples = samples.filter((sample) => sample.unix_s >= from_s);
    this.cursor = pointed ? this.samples.indexOf(pointed) : null;
    if (this.cursor === -1) this.cursor = null;
    this.span_s = [from_s, Math.max(to_s, from_s + 1)];
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth || 400;
    this.width = width;
    const top = this.#top();
    this.y = (value) =>
      HEIGHT - MARGIN.bottom - (Math.min(value, top) / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const [from_s, to_s] = this.span_s;
    this.x = (unix_s) =>
      MARGIN.left + ((unix_s - from_s) / (to_s - from_s)) * (width - MARGIN.left - MARGIN.right);
    this.svg.replaceChildren(...this.#grid(top), ...this.#curves(), ...this.#mark());
    this.#read();
  }

  #caption() {
    const caption = html("figcaption");
    caption.append(html("strong", "", this.title));
    this.series.forEach(({ label }, index) => {
      const key = html("span", "key");
      const sign = element("svg", { "aria-hidden": "true" });
      sign.append(element("path", { class: `curve ${CLASSES[index]}`, d: "M2 4h20" }));
      key.append(sign, label, this.readouts[index]);
      caption.append(key);
    });
    caption.append(this.moment);
    return caption;
  }

  #top() {
    if (this.options.top) return this.options.top;
    let highest = this.options.target?.() ?? 0;
    for (const { value } of this.series) {
      for (const sample of this.samples) highest = Math.max(highest, value(sample) ?? 0);
    }
    return highest > 0 ? roundUp(highest) : 1;
  }

  #grid(top) {
    const parts = [];
    const right = this.width - MARGIN.right;
    for (const part of [0, 0.5, 1]) {
      const y = this.y(part * top);
      parts.push(element("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }));
      const at = { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" };
      parts.push(element("text", at, this.format(part * top)));
    }
    const [from_s, to_s] = this.span_s;
    for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const unix_s = from_s + part * (to_s - from_s);
      const at = { x: this.x(unix_s), y: HEIGHT - 5, "text-anchor": anchor };
      parts.push(element("text", at, clockTime(unix_s)));
    }
    const target = this.options.target?.();
    if (target) {
      const y = this.y(target);
      parts.push(element("line", { class: "target", x1: MARGIN.left, x2: right, y1: y, y2: y }));
    }
    return parts;
  }

  #curves() {
    return this.series.map(({ value }, index) => {
      let path = "";
      let is_open = false;
      for (const sample of this.samples) {
        const found = value(sample);
        if (found === null) {
          is_open = false;
          continue;
        }
        const point = `${this.x(sample.unix_s).toFixed(1)} ${this.y(found).toFixed(1)}`;
        path += is_open ? `L${point}` : `M${point}h0`; // h0: a point with no neighbour is a dot
        is_open = true;
      }
      return element("path", { class: `curve ${CLASSES[index]}`, d: path });
    });
  }

  #mark() {
    if (this.cursor === null) return [];
    const x = this.x(this.samples[this.cursor].unix_s);
    return [element("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom })];
  }

  #described(sample) {
    return this.series.map(({ label }, index) => `${label} ${this.#value(sample, index)}`).join(", ");
  }

  #value(sample, index) {
    const found = sample ? this.series[index].value(sample) : null;
    return found === null ? "–" : this.format(found);
  }

  #read() {
    const sample = this.samples[this.cursor ?? this.samples.length - 1];
    const text = sample ? this.#described(sample) : "no data yet";
    this.readouts.forEach((readout, index) => {
      readout.textContent = this.#value(sample, index);
    });
    this.moment.textContent = this.cursor === null || !sample ? "" : clockTime(sample.unix_s);
    const target = this.options.target?.();
    const aim = target ? ` Target ${this.format(target)}.` : "";
    this.svg.setAttribute("aria-label", `${this.title}, last: ${text}.${aim}`);
  }

  #moveTo(index) {
    this.cursor = index;
    this.draw();
  }

  #point(event) {
    if (!this.samples.length) return;
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    let best = 0;
    this.samples.forEach((sample, index) => {
      const distance = Math.abs(this.x(sample.unix_s) - x);
      if (distance < Math.abs(this.x(this.samples[best].unix_s) - x)) best = index;
    });
    this.#moveTo(best);
  }

  #press(event) {
    const last = this.samples.length - 1;
    const now = this.cursor ?? last;
    const page = Math.max(1, Math.round(last / 10));
    const moves = {
      ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - page, PageDown: now + page, Home: 0, End: last,
    };
    if (last < 0 || !(event.key in moves)) return;
    event.preventDefault();
    this.#moveTo(Math.min(last, Math.max(0, moves[event.key])));
    this.options.say(`${clockTime(this.samples[this.cursor].unix_s)}: ${this.#described(this.samples[this.cursor])}`);
  }
}
