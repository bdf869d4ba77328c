"use strict";
// Draws the pictures of the report from the numbers in the page. Texts are set as text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const followers = []; // called with the chosen checkpoint
  let chosen = data.checkpoints.length - 1;
  let metric = null;

  // --- numbers ---------------------------------------------------------------------------------------------------

  function decoded(text, Kind) {
    return new Kind(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
  }

  function decodeAll(object, Kind) {
    return Object.fromEntries(Object.entries(object).map(([name, text]) => [name, decoded(text, Kind)]));
  }

  for (const one of data.metrics) {
    one.values = decodeAll(one.values, Float64Array);
    one.errors = decodeAll(one.errors, Float32Array);
  }
  data.places = decodeAll(data.places, Uint16Array);
  metric = data.metrics[0];

  const cell = (column, layer) => column * data.layers + layer;

  function shownValue(component, column, layer) {
    const stored = metric.values[component][cell(column, layer)];
    return metric.complement ? 1 - stored : stored;
  }

  const short = (value) => (value === null || Number.isNaN(value) ? "–" : String(Number(value.toPrecision(3))));
  const label = (component) => data.components.find((one) => one.name === component).label;
  const checkpointText = (k) => {
    const { name, where } = data.checkpoints[k];
    return where && where !== name ? `${name} (${where})` : name;
  };

  // --- colours ---------------------------------------------------------------------------------------------------

  function colour(value, range) {
    const share = range.high > range.low ? (value - range.low) / (range.high - range.low) : 0;
    const at = Math.min(255, Math.max(0, Math.floor(share * 256)));
    return `#${data.maps[range.map].slice(6 * at, 6 * at + 6)}`;
  }

  function hatching(context, repeats) {
    const size = Math.round(7 * devicePixelRatio);
    const tile = new OffscreenCanvas(size, size);
    const ink = tile.getContext("2d");
    ink.fillStyle = repeats ? "#d1d1d1" : "#ededed";
    ink.fillRect(0, 0, size, size);
    ink.strokeStyle = repeats ? "#808080" : "#b2b2b2";
    ink.lineWidth = Math.max(1, devicePixelRatio / 2);
    ink.beginPath();
    for (const shift of [-size, 0, size]) {
      ink.moveTo(shift, repeats ? 0 : size);
      ink.lineTo(shift + size, repeats ? size : 0);
    }
    ink.stroke();
    return context.createPattern(tile, "repeat");
  }

  // --- elements --------------------------------------------------------------------------------------------------

  function add(parent, tag, attributes = {}, text = null) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  function draw(parent, tag, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  // Redraws what depends on the width of its element, now and whenever that changes.
  function followWidth(element, redraw) {
    let width = 0;
    new ResizeObserver(() => {
      if (element.clientWidth && element.clientWidth !== width) {
        width = element.clientWidth;
        redraw();
      }
    }).observe(element);
  }

  const tip = byId("tip");

  function showTip(x, y, { title, lines }) {
    tip.replaceChildren();
    add(tip, "strong", {}, title);
    for (const line of lines) add(tip, "span", {}, line);
    tip.hidden = false;
    const page = document.documentElement;
    const left = Math.max(4, Math.min(x + 14, page.clientWidth - tip.offsetWidth - 4));
    const fitsBelow = y + 14 + tip.offsetHeight < page.clientHeight;
    const top = fitsBelow ? y + 14 : Math.max(4, y - 14 - tip.offsetHeight);
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  // --- heatmaps --------------------------------------------------------------------------------------------------

  // A matrix on a canvas, row 0 at the bottom. `paint` gives the colour of a cell, null where it has no value;
  // `blank` says why a column has none ("repeats" or "missing"); `tell` what is told of a cell.
  class Heatmap {
    constructor(host, options) {
      Object.assign(this, options);
      const figure = add(host, "figure");
      add(figure, "figcaption", {}, this.caption);
      this.plot = add(figure, "div", { class: "plot" });
      this.canvas = add(this.plot, "canvas", {
        tabindex: 0,
        role: "application",
        "aria-roledescription": "heatmap",
        "aria-label": this.spoken,
        "aria-describedby": "hint",
      });
      this.columnMark = add(this.plot, "div", { class: "mark column", hidden: "" });
      this.cellMark = add(this.plot, "div", { class: "mark", hidden: "" });
      this.row = 0;
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", hideTip);
      this.canvas.addEventListener("click", (event) => {
        const at = this.under(event);
        if (!at) return;
        this.row = at.row;
        this.choose(at.column);
        this.point(event);
      });
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      this.canvas.addEventListener("focus", () => this.canvas.matches(":focus-visible") && this.stand());
      this.canvas.addEventListener("blur", () => {
        this.cellMark.hidden = true;
        hideTip();
      });
      followWidth(this.plot, () => this.redraw());
      followers.push(() => this.place());
    }

    measure() {
      const width = this.plot.clientWidth;
      const left = 8 + 7 * Math.max(...this.yTicks.map((tick) => tick.label.length), 1);
      const inner = width - left - 2;
      const height = this.square ? inner : Math.max(150, Math.min(10 * this.rows, 330));
      const strip = this.strip ? Math.max(12, height / this.rows) : 0;
      this.box = { width, left, inner, top: 4, height, strip, gap: this.strip ? 5 : 0, bottom: 20 };
    }

    get total() {
      const { top, height, strip, gap, bottom } = this.box;
      return top + height + gap + strip + bottom;
    }

    x(column) {
      return this.box.left + (column * this.box.inner) / this.columns;
    }

    // Upper and lower edge of a row; neighbours share theirs to the last bit, or a seam would show.
    y(row) {
      const { top, height, strip, gap } = this.box;
      if (this.strip && row === 0) return [top + height + gap, top + height + gap + strip];
      const first = this.strip ? 1 : 0;
      const size = height / (this.rows - first);
      const edge = (count) => top + height - count * size;
      return [edge(row - first + 1), edge(row - first)];
    }

    redraw() {
      this.measure();
      const { width, left, inner } = this.box;
      const scale = devicePixelRatio;
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(this.total * scale);
      const ink = this.canvas.getContext("2d");
      const edge = (at) => Math.round(at * scale);
      const fill = (style, x0, x1, [y0, y1]) => {
        ink.fillStyle = style;
        ink.fillRect(edge(x0), edge(y0), edge(x1) - edge(x0), edge(y1) - edge(y0));
      };
      const missing = hatching(ink, false);
      const repeats = hatching(ink, true);
      for (let row = 0; row < this.rows; row++) {
        for (let column = 0; column < this.columns; column++) {
          const empty = this.blank(column) === "repeats" ? repeats : missing;
          fill(this.paint(column, row) ?? empty, this.x(column), this.x(column + 1), this.y(row));
        }
      }
      ink.scale(scale, scale);
      ink.strokeStyle = "#333";
      ink.lineWidth = 1;
      const [upper] = this.y(this.rows - 1);
      const [, lower] = this.y(this.strip ? 1 : 0);
      ink.strokeRect(left - 0.5, upper - 0.5, inner + 1, lower - upper + 1);
      if (this.strip) {
        const [from, to] = this.y(0);
        ink.strokeRect(left - 0.5, from - 0.5, inner + 1, to - from + 1);
      }
      this.writeTicks(ink);
      this.place();
    }

    writeTicks(ink) {
      ink.fillStyle = "#1c1c1c";
      ink.font = `11px ${getComputedStyle(document.documentElement).fontFamily}`;
      ink.textBaseline = "middle";
      ink.textAlign = "right";
      for (const { row, label: text } of this.yTicks) {
        const [upper, lower] = this.y(row);
        ink.fillText(text, this.box.left - 4, (upper + lower) / 2);
      }
      ink.textBaseline = "alphabetic";
      ink.textAlign = "center";
      let free = 0;
      for (const { column, label: text } of this.xTicks) {
        const half = ink.measureText(text).width / 2;
        const middle = (this.x(column) + this.x(column + 1)) / 2;
        const at = Math.min(Math.max(middle, half), this.box.width - half);
        if (at - half < free) continue;
        ink.fillText(text, at, this.total - 6);
        free = at + half + 6;
      }
    }

    under(event) {
      if (!this.box) return null;
      const frame = this.canvas.getBoundingClientRect();
      const x = event.clientX - frame.left;
      const y = event.clientY - frame.top;
      const column = Math.floor(((x - this.box.left) / this.box.inner) * this.columns);
      if (column < 0 || column >= this.columns) return null;
      for (let row = 0; row < this.rows; row++) {
        const [upper, lower] = this.y(row);
        if (y >= upper && y < lower) return { column, row };
      }
      return null;
    }

    point(event) {
      const at = this.under(event);
      if (at) showTip(event.clientX, event.clientY, this.tell(at.column, at.row));
      else hideTip();
    }

    key(event) {
      if (event.key === "Escape") hideTip();
      const last = this.columns - 1;
      const column = this.chosenColumn() ?? last;
      const moves = {
        ArrowLeft: [Math.max(0, column - 1), this.row],
        ArrowRight: [Math.min(last, column + 1), this.row],
        ArrowUp: [column, Math.min(this.rows - 1, this.row + 1)],
        ArrowDown: [column, Math.max(0, this.row - 1)],
        Home: [0, this.row],
        End: [last, this.row],
      };
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const [to, row] = moves[event.key];
      this.row = row;
      this.choose(to);
      this.stand();
    }

    // Marks the cell that the keyboard stands on and tells of it.
    stand() {
      const column = this.chosenColumn();
      if (column === null || !this.box) return;
      const [upper, lower] = this.y(this.row);
      this.put(this.cellMark, column, upper, lower);
      const told = this.tell(column, this.row);
      const frame = this.canvas.getBoundingClientRect();
      showTip(frame.left + this.x(column + 1), frame.top + lower, told);
      byId("told").textContent = [told.title, ...told.lines].join(", ");
    }

    place() {
      this.cellMark.hidden = true;
      if (!this.box) return;
      const column = this.chosenColumn();
      if (column === null) this.columnMark.hidden = true;
      else this.put(this.columnMark, column, this.y(this.rows - 1)[0], this.y(0)[1]);
    }

    put(mark, column, upper, lower) {
      const width = Math.max(3, this.x(column + 1) - this.x(column));
      const left = (this.x(column) + this.x(column + 1) - width) / 2;
      Object.assign(mark.style, {
        left: `${left}px`,
        top: `${upper}px`,
        width: `${width}px`,
        height: `${lower - upper}px`,
      });
      mark.hidden = false;
    }
  }

  const layerRows = data.layerTicks.map((layer) => ({ row: layer, label: String(layer) }));

  function drawMaps() {
    const host = byId("maps");
    return data.components.map(({ name, label: caption }) =>
      new Heatmap(host, {
        caption,
        spoken: `${caption}: ${data.layers} layers by ${data.checkpoints.length} checkpoints`,
        columns: data.checkpoints.length,
        rows: data.layers,
        strip: data.layers > 1,
        xTicks: data.ticks.at,
        yTicks: [{ row: 0, label: "0" }, ...layerRows],
        blank: (column) => (data.checkpoints[column].repeats ? "repeats" : "missing"),
        chosenColumn: () => chosen,
        choose,
        paint: (column, layer) => {
          const value = shownValue(name, column, layer);
          if (Number.isNaN(value)) return null;
          return colour(value, layer === 0 ? metric.firstLimits : metric.limits);
        },
        tell: (column, layer) => tellValue(name, column, layer),
      }),
    );
  }

  function tellValue(component, column, layer) {
    const title = `Layer ${layer}, ${label(component)}, ${checkpointText(column)}`;
    const value = shownValue(component, column, layer);
    const { blank } = data.checkpoints[column];
    if (Number.isNaN(value)) return { title, lines: [blank ?? "The layer has no such part, or it was not scored."] };
    const error = metric.errors[component][cell(column, layer)];
    const band = Number.isNaN(error) ? "" : ` ± ${Number(error.toPrecision(2))}`;
    const lines = [`${metric.name.replaceAll("_", " ")} ${value}${band}`];
    if (metric.complement) {
      lines.push(`stored cosine similarity ${metric.values[component][cell(column, layer)]}`);
      const stored = metric.values[component].subarray(cell(column, 0), cell(column + 1, 0));
      const there = stored.filter((one) => !Number.isNaN(one)).length;
      lines.push(`place ${data.places[component][cell(column, layer)] + 1} of ${there} in the order of dropping`);
    }
    return { title, lines };
  }

  function drawPairs() {
    const host = byId("pairs");
    const pairs = data.agreement;
    if (!host || !pairs) return;
    const size = pairs.columns.length;
    const range = { low: pairs.low, high: 1, map: pairs.map };
    const column = (k) => pairs.columns[k];
    const step = Math.max(1, Math.ceil(size / 5));
    const ends = [...Array(size).keys()].filter((k) => (size - 1 - k) % step === 0);
    const tick = (k) => {
      const { name, where } = data.checkpoints[column(k)];
      return where.match(/^step (\S+?),?(?: |$)/)?.[1] ?? (name.length > 9 ? `${name.slice(0, 8)}…` : name);
    };
    for (const { name, label: caption } of data.components) {
      const matrix = decoded(pairs.values[name], Int16Array);
      const value = (one, other) => {
        const found = matrix[one * size + other];
        return found === pairs.none ? null : found * pairs.quantum;
      };
      new Heatmap(host, {
        caption,
        spoken: `Agreement of ${size} checkpoints in the order of the layers, ${caption}`,
        columns: size,
        rows: size,
        square: true,
        strip: false,
        xTicks: ends.map((k) => ({ column: k, label: tick(k) })),
        yTicks: ends.map((k) => ({ row: k, label: tick(k) })),
        blank: () => "missing",
        chosenColumn: () => (pairs.columns.includes(chosen) ? pairs.columns.indexOf(chosen) : null),
        choose: (k) => choose(column(k)),
        paint: (one, other) => {
          const found = value(one, other);
          return found === null ? null : colour(found, range);
        },
        tell: (one, other) => ({
          title: `${caption}, ${checkpointText(column(one))} and ${checkpointText(column(other))}`,
          lines: [`Spearman ${value(one, other)?.toFixed(4) ?? "is not defined: all layers are equal"}`],
        }),
      });
    }
    drawBar(byId("pairs-legend"), range, "Spearman");
  }

  function drawBar(host, range, text) {
    const line = add(host, "span");
    line.append(`${text}: ${short(range.low)} `);
    const bar = add(line, "canvas", { width: 256, height: 1, "aria-hidden": "true" });
    const ink = bar.getContext("2d");
    for (let at = 0; at < 256; at++) {
      ink.fillStyle = `#${data.maps[range.map].slice(6 * at, 6 * at + 6)}`;
      ink.fillRect(at, 0, 1, 1);
    }
    const beyond = range.reaches?.length ? ` (values reach ${range.reaches.join(" and ")})` : "";
    line.append(` ${short(range.high)}${beyond}`);
  }

  function drawHatching(host, repeats, text) {
    const line = add(host, "span");
    const bar = add(line, "canvas", { class: "swatch", width: 56, height: 28, "aria-hidden": "true" });
    const ink = bar.getContext("2d");
    ink.fillStyle = hatching(ink, repeats);
    ink.fillRect(0, 0, 56, 28);
    line.append(` ${text}`);
  }

  function drawLegend() {
    const host = byId("legend");
    host.replaceChildren();
    const last = data.layers - 1;
    if (last > 0) drawBar(host, metric.limits, `${metric.label}, layers 1 to ${last}`);
    drawBar(host, last > 0 ? metric.firstLimits : metric.limits, last > 0 ? "layer 0" : metric.label);
    if (data.checkpoints.some((one) => one.repeats)) drawHatching(host, true, "repeats other weights");
    if (data.checkpoints.some((one) => one.blank && !one.repeats)) drawHatching(host, false, "not scored");
    add(host, "span", {}, data.ticks.label);
  }

  // --- curves ----------------------------------------------------------------------------------------------------

  // Lines over positions from 0 to 1, with bands or bars of what is left open, and values below for the chosen place.
  class Chart {
    constructor(host, spoken) {
      this.host = host;
      this.picture = draw(host, "svg", { role: "img", "aria-label": spoken });
      this.keys = add(host, "div", { class: "keys" });
      this.chosenPoint = null;
      this.picture.addEventListener("pointermove", (event) => this.point(event));
      this.picture.addEventListener("pointerleave", hideTip);
      this.picture.addEventListener("click", (event) => this.choosePoint?.(this.nearest(event)));
      followWidth(host, () => this.redraw());
    }

    show(spec) {
      this.spec = spec;
      this.redraw();
    }

    redraw() {
      const { spec } = this;
      const width = this.host.clientWidth;
      if (!spec || !width) return;
      const left = 12 + 6.3 * Math.max(...spec.yTicks.map((tick) => tick.label.length), 1);
      this.box = { left, right: 10, top: 8, bottom: 36, width, height: spec.height ?? 210 };
      const { right, top, bottom, height } = this.box;
      this.picture.replaceChildren();
      this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.frame = draw(this.picture, "g", { "font-size": 11, fill: "#1c1c1c" });
      for (const tick of spec.yTicks) {
        const y = this.y(tick.at);
        draw(this.frame, "line", { x1: left, x2: width - right, y1: y, y2: y, stroke: "#e6e6e6" });
        draw(this.frame, "text", { x: left - 5, y: y + 4, "text-anchor": "end" }, tick.label);
      }
      for (const tick of spec.ticks) {
        const x = this.x(tick.at);
        const base = height - bottom;
        draw(this.frame, "line", { x1: x, x2: x, y1: base, y2: base + 4, stroke: "#1c1c1c" });
        draw(this.frame, "text", { x, y: base + 15, "text-anchor": "middle" }, tick.label);
      }
      draw(this.frame, "text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, spec.axis);
      const edges = { x: left, y: top, width: width - left - right, height: height - top - bottom };
      draw(this.frame, "rect", { ...edges, fill: "none", stroke: "#888" });
      if (spec.chance !== null && spec.chance !== undefined) {
        const y = this.y(spec.chance);
        const line = { x1: left, x2: width - right, y1: y, y2: y, stroke: "#777", "stroke-dasharray": "1 3" };
        draw(this.frame, "line", { ...line, "stroke-width": 1.5 });
        draw(this.frame, "text", { x: width - right - 4, y: y - 4, "text-anchor": "end", fill: "#5a5a5a" }, "by chance");
      }
      for (const line of spec.lines) this.drawLine(line);
      this.stick = draw(this.picture, "line", { y1: top, y2: height - bottom, stroke: "#777", "stroke-width": 1.5 });
      this.mark(this.chosenPoint);
    }

    x(at) {
      return this.box.left + at * (this.box.width - this.box.left - this.box.right);
    }

    y(value) {
      const { low, high, log } = this.spec;
      const spread = (number) => (log ? Math.log10(Math.max(number, low)) : number);
      const share = (spread(value) - spread(low)) / (spread(high) - spread(low));
      return this.box.height - this.box.bottom - share * (this.box.height - this.box.top - this.box.bottom);
    }

    drawLine(line) {
      const { spec } = this;
      const known = [...line.value.keys()].filter((k) => line.value[k] !== null && !Number.isNaN(line.value[k]));
      const open = known.filter((k) => line.low[k] !== null && !Number.isNaN(line.low[k]));
      const placed = (points) => points.filter((k) => k < (spec.apart ?? Infinity));
      const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
      const at = (k, name) => [this.x(spec.x[k]), this.y(line[name][k])];
      const band = placed(open);
      if (spec.bars) {
        for (const k of open) {
          const [x, y1] = at(k, "low");
          draw(this.picture, "line", { x1: x, x2: x, y1, y2: at(k, "high")[1], stroke: line.colour });
        }
      } else if (band.length > 1) {
        const around = [...band.map((k) => at(k, "high")), ...band.reverse().map((k) => at(k, "low"))];
        draw(this.picture, "path", { d: `${path(around)}Z`, fill: line.colour, "fill-opacity": 0.2 });
      }
      const stroke = { fill: "none", stroke: line.colour, "stroke-width": 1.8, "stroke-dasharray": line.dashes };
      draw(this.picture, "path", { d: path(placed(known).map((k) => at(k, "value"))), ...stroke });
      const dots = known.length <= 60 ? known : known.filter((k) => k >= (spec.apart ?? Infinity));
      for (const k of dots) {
        const [cx, cy] = at(k, "value");
        draw(this.picture, "circle", { cx, cy, r: 2.2, fill: line.colour });
      }
    }

    nearest(event) {
      if (!this.box) return null;
      const frame = this.picture.getBoundingClientRect();
      const at = (event.clientX - frame.left) * (this.box.width / frame.width);
      const far = this.spec.x.map((place) => Math.abs(this.x(place) - at));
      return far.indexOf(Math.min(...far));
    }

    point(event) {
      const k = this.nearest(event);
      if (k === null) return;
      const lines = this.spec.lines.map((line) => {
        const open = line.low[k] === null || Number.isNaN(line.low[k]);
        const band = open ? "" : ` (${short(line.low[k])} to ${short(line.high[k])})`;
        return `${line.label ? `${line.label} ` : ""}${short(line.value[k])}${band}`;
      });
      showTip(event.clientX, event.clientY, { title: this.spec.name(k), lines });
    }

    mark(k) {
      this.chosenPoint = k;
      if (!this.stick) return;
      const there = k !== null && k >= 0;
      this.stick.setAttribute("visibility", there ? "visible" : "hidden");
      if (there) {
        const x = this.x(this.spec.x[k]);
        this.stick.setAttribute("x1", x);
        this.stick.setAttribute("x2", x);
      }
      this.keys.replaceChildren();
      for (const line of this.spec.lines) {
        const key = add(this.keys, "span");
        const sample = draw(key, "svg", { viewBox: "0 0 28 8", "aria-hidden": "true" });
        const stroke = { stroke: line.colour, "stroke-width": 2.2, "stroke-dasharray": line.dashes };
        draw(sample, "line", { x1: 0, x2: 28, y1: 4, y2: 4, ...stroke });
        key.append(there ? `${line.label} ${short(line.value[k])}` : line.label);
      }
    }
  }

  function drawCurves() {
    const host = byId("charts");
    if (!host) return;
    for (const curve of data.curves) {
      const figure = add(host, "figure", { class: "chart" });
      add(figure, "figcaption", {}, curve.title);
      const chart = new Chart(add(figure, "div"), `${curve.title}, over training; the values are in the tables`);
      chart.choosePoint = (k) => choose(curve.columns[k]);
      chart.show({ ...curve, name: (k) => checkpointText(curve.columns[k]) });
      followers.push(() => chart.mark(curve.columns.indexOf(chosen)));
    }
  }

  function drawProfile() {
    const chart = new Chart(byId("profile"), "The chosen metric over depth at the chosen checkpoint");
    const layers = [...Array(data.layers).keys()];
    const place = (layer) => (data.layers > 1 ? (layer + 0.5) / data.layers : 0.5);
    const ticks = [0, ...data.layerTicks].filter((layer, i, all) => i === 0 || layer !== all[i - 1]);
    followers.push(() => {
      const { low, high, log } = metric.profile;
      byId("profile-title").textContent = `${metric.label} over depth at ${checkpointText(chosen)}`;
      const lines = data.components.map(({ name, ...style }) => {
        const value = layers.map((layer) => shownValue(name, chosen, layer));
        const error = layers.map((layer) => metric.errors[name][cell(chosen, layer)]);
        return {
          ...style,
          value,
          low: value.map((number, layer) => number - error[layer]),
          high: value.map((number, layer) => number + error[layer]),
        };
      });
      chart.chosenPoint = null;
      chart.show({
        height: 240,
        bars: true,
        axis: log ? "layer (vertical: log scale)" : "layer",
        x: layers.map(place),
        ticks: ticks.map((layer) => ({ at: place(layer), label: String(layer) })),
        low,
        high,
        log,
        yTicks: metric.profile.ticks,
        lines,
        name: (layer) => `Layer ${layer}, ${checkpointText(chosen)}`,
      });
    });
  }

  // --- what is chosen --------------------------------------------------------------------------------------------

  const slider = byId("checkpoint");

  function choose(column) {
    chosen = column;
    const { loss, blank } = data.checkpoints[column];
    const said = [checkpointText(column), `${column + 1} of ${data.checkpoints.length}`];
    if (loss !== null) said.push(`loss ${loss.toFixed(4)}`);
    if (blank) said.push(blank);
    byId("chosen").textContent = said.join(" · ");
    slider.value = column;
    slider.setAttribute("aria-valuetext", said.join(", "));
    for (const follow of followers) follow();
  }

  function start() {
    slider.max = data.checkpoints.length - 1;
    slider.disabled = data.checkpoints.length === 1;
    slider.addEventListener("input", () => choose(Number(slider.value)));
    const select = byId("metric");
    for (const one of data.metrics) add(select, "option", { value: one.name }, one.label);
    const maps = drawMaps();
    select.addEventListener("change", () => {
      metric = data.metrics.find((one) => one.name === select.value);
      drawLegend();
      for (const map of maps) map.redraw();
      choose(chosen);
    });
    drawLegend();
    drawProfile();
    drawCurves();
    drawPairs();
    const valued = data.checkpoints.map((one) => one.blank === null);
    choose(Math.max(0, valued.lastIndexOf(true)));
    document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
    window.addEventListener("beforeprint", () => {
      for (const details of document.querySelectorAll("details")) details.open = true;
    });
  }

  start();
})();
