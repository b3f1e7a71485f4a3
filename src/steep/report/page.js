/* Draws the charts with Vega, links their cursors and zoom, and while a run goes on takes in what is new.

   Vega draws axes, scales and lines as SVG. Colours are CSS variables of the page, so that light, dark and print are
   the style sheet's affair. */
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  let data = JSON.parse(byId("data").textContent);
  const live = data.live;
  let axis = "step";
  let zoom = null; // [from, to] on the axis
  const hidden = new Set(); // "chart id/curve name"
  const drawn = new Map(); // chart id -> {chart, view, figure, head, plot, cursor, values}

  const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];
  const colour = (curve) => (curve.colour === "base" ? "var(--base)" : `var(--s${((curve.colour - 1) % 8) + 1})`);
  const dash = (curve) => DASHES[curve.dash % DASHES.length];

  function element(tag, given = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // --- what is drawn -----------------------------------------------------------------------------------------

  function extent() {
    let last = 0;
    for (const chart of data.charts) for (const curve of chart.curves) last = Math.max(last, curve[axis].at(-1) ?? 0);
    return [0, last || 1];
  }

  /* The points of a chart between the ends of the axis, with one neighbour on either side so that lines reach them. */
  function points(chart) {
    const [from, to] = zoom ?? extent();
    const rows = [];
    chart.curves.forEach((curve, number) => {
      if (hidden.has(`${chart.id}/${curve.name}`)) return;
      const xs = curve[axis];
      let first = xs.findIndex((x) => x >= from);
      let last = xs.findLastIndex((x) => x <= to);
      first = Math.max(0, (first < 0 ? xs.length : first) - 1);
      last = Math.min(xs.length - 1, last + 1);
      for (let i = first; i <= last; i++) {
        rows.push({
          curve: number,
          x: xs[i],
          y: curve.y[i],
          colour: colour(curve),
          dash: dash(curve),
          width: curve.weight === "raw" ? 1 : 2,
          opacity: curve.weight === "raw" ? 0.35 : 1,
          dot: curve.colour !== "base" && xs.length <= 40 && curve.weight !== "raw",
        });
      }
    });
    return rows;
  }

  /* The ends of the vertical axis: what is drawn, but not so near that noise fills the height. */
  function span(chart, rows) {
    const values = rows.map((row) => row.y).filter((y) => y != null);
    let low = chart.zero ? 0 : Math.min(...values);
    let high = Math.max(...values);
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [0, 1];
    const missing = Math.max(chart.least, Math.abs(high) * 1e-3, 1e-12) - (high - low);
    if (missing > 0) {
      high += chart.zero ? missing : missing / 2;
      low -= chart.zero ? 0 : missing / 2;
    }
    return [low, high];
  }

  function specification(chart, width) {
    // Vega measures labels with the font's real name.
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: "var(--muted)", labelFont: font, labelFontSize: 12, domain: false, ticks: false };
    const grid = { gridColor: "var(--line)", gridWidth: 1, labelPadding: 8 };
    const label = (expression) => ({ labels: { update: { text: { signal: expression } } } });
    const [from, to] = zoom ?? extent();
    const rows = points(chart);
    const [low, high] = span(chart, rows);
    return {
      width,
      height: 220,
      padding: { left: 4, right: 14, top: 6, bottom: 2 },
      autosize: { type: "fit", contains: "padding" },
      signals: [
        { name: "from", value: from },
        { name: "to", value: to },
        { name: "low", value: low },
        { name: "high", value: high },
      ],
      data: [
        { name: "points", values: rows },
        {
          name: "dots",
          source: "points",
          transform: [{ type: "filter", expr: "datum.dot && isValid(datum.y) && datum.x >= from && datum.x <= to" }],
        },
      ],
      scales: [
        { name: "x", type: "linear", range: "width", domain: [{ signal: "from" }, { signal: "to" }], nice: false, zero: false },
        {
          name: "y",
          type: "linear",
          range: "height",
          domain: [{ signal: "low" }, { signal: "high" }],
          nice: 5,
          zero: false,
        },
      ],
      axes: [
        {
          orient: "bottom",
          scale: "x",
          tickCount: { signal: "max(3, floor(width / 110))" },
          tickMinStep: 1,
          labelFlush: true,
          ...text,
          labelPadding: 6,
          encode: label("format(datum.value, datum.value < 1e4 ? ',' : '~s')"),
        },
        {
          orient: "left",
          scale: "y",
          tickCount: 5,
          grid: true,
          ...grid,
          ...text,
          encode: chart.format ? label(`datum.value ? format(datum.value, '${chart.format}') : '0'`) : {},
        },
      ],
      marks: [
        {
          type: "group",
          clip: true,
          encode: { update: { width: { signal: "width" }, height: { signal: "height" } } },
          from: { facet: { name: "curve", data: "points", groupby: "curve" } },
          marks: [
            {
              type: "line",
              from: { data: "curve" },
              encode: {
                update: {
                  x: { scale: "x", field: "x" },
                  y: { scale: "y", field: "y" },
                  defined: { signal: "isValid(datum.y)" },
                  stroke: { field: "colour" },
                  strokeWidth: { field: "width" },
                  strokeDash: { field: "dash" },
                  strokeOpacity: { field: "opacity" },
                  strokeJoin: { value: "round" },
                },
              },
            },
          ],
        },
        {
          type: "symbol",
          from: { data: "dots" },
          encode: {
            update: {
              x: { scale: "x", field: "x" },
              y: { scale: "y", field: "y" },
              size: { value: 28 },
              fill: { field: "colour" },
            },
          },
        },
      ],
    };
  }

  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

  function shown(chart, value) {
    if (value == null) return "–";
    if (chart.format === "~e") return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
    return (Math.abs(value) >= 1000 ? whole : precise).format(value).replace("-", "−");
  }

  function swatch(curve) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    const line = document.createElementNS(space, "line");
    for (const [name, value] of Object.entries({ width: 22, height: 8, "aria-hidden": true })) svg.setAttribute(name, value);
    for (const [name, value] of Object.entries({ x1: 0, x2: 22, y1: 4, y2: 4, "stroke-dasharray": dash(curve).join(" ") }))
      line.setAttribute(name, value);
    line.style.stroke = colour(curve);
    line.style.strokeWidth = curve.weight === "raw" ? 1 : 2.5;
    svg.append(line);
    return svg;
  }

  /* One item for each name; the logged values behind a smoothed curve may share its name. */
  function legend(entry) {
    const list = element("ul", { class: "legend" });
    entry.values = new Map(entry.chart.curves.map((curve) => [curve, element("output")]));
    const named = new Map(entry.chart.curves.map((curve) => [curve.name, curve]));
    for (const [name, curve] of named) {
      const key = `${entry.chart.id}/${name}`;
      const button = element("button", { type: "button", "aria-pressed": !hidden.has(key) });
      button.append(swatch(curve), element("span", {}, name), entry.values.get(curve));
      button.addEventListener("click", () => {
        hidden.has(key) ? hidden.delete(key) : hidden.add(key);
        button.setAttribute("aria-pressed", !hidden.has(key));
        redraw(entry);
      });
      list.append(element("li", {}, button));
    }
    return list;
  }

  async function draw(chart) {
    const entry = { chart };
    const cursor = element("div", { class: "cursor", hidden: "" });
    const band = element("div", { class: "band", hidden: "" });
    const canvas = element("div", { class: "canvas" });
    entry.plot = element("div", { class: "plot" }, canvas, cursor, band);
    entry.cursor = cursor;
    entry.head = element("figcaption");
    entry.figure = element("figure", { "data-chart": chart.id }, entry.head, entry.plot);
    describe(entry);
    document.querySelector(`[data-charts="${chart.group}"]`).append(entry.figure);
    // clientWidth is rounded: what is wider than its place by a part of a pixel would be shrunk and blurred.
    const width = () => Math.max(200, Math.floor(entry.plot.getBoundingClientRect().width));
    // ast: expressions are interpreted and not compiled, so that the page's policy can forbid eval.
    const how = { mode: "vega", renderer: "svg", ast: true, actions: false, tooltip: false, hover: false, defaultStyle: false };
    entry.view = (await vegaEmbed(canvas, specification(chart, width()), how)).view;
    drawn.set(chart.id, entry);
    new ResizeObserver(() => {
      if (entry.plot.clientWidth && entry.view.width() !== width()) entry.view.width(width()).run();
    }).observe(entry.plot);
    point(entry, band);
  }

  function describe(entry) {
    const { chart } = entry;
    const ends = chart.curves.map((curve) => `${curve.name}: ${shown(chart, curve.y[0])} to ${shown(chart, curve.y.at(-1))}`);
    entry.plot.setAttribute("role", "img");
    entry.plot.setAttribute("aria-label", `${chart.title}, ${chart.unit}. ${ends.join("; ")}`);
    entry.head.replaceChildren(element("h3", {}, chart.title, " ", element("span", { class: "quiet" }, chart.unit)), legend(entry));
    if (chart.note) entry.head.append(element("p", { class: "note" }, chart.note));
  }

  function redraw(entry) {
    const [from, to] = zoom ?? extent();
    const rows = points(entry.chart);
    const [low, high] = span(entry.chart, rows);
    const signals = { from, to, low, high };
    for (const [name, value] of Object.entries(signals)) entry.view.signal(name, value);
    entry.view.data("points", rows).run();
  }

  function redrawAll() {
    for (const entry of drawn.values()) redraw(entry);
    byId("reset").hidden = zoom === null;
  }

  // --- cursor and zoom -------------------------------------------------------------------------------------

  /* Where the inner plot begins in the element, and how wide it is. */
  const inner = (entry) => [entry.view.origin()[0] + entry.view.padding().left, entry.view.scale("x").range()[1]];
  const at = (entry, event) => {
    const [left, wide] = inner(entry);
    const pixels = event.clientX - entry.plot.getBoundingClientRect().left - left;
    return entry.view.scale("x").invert(Math.min(wide, Math.max(0, pixels)));
  };

  function nearest(xs, x) {
    let low = 0;
    let high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  /* The value of a curve at x; nothing beyond its end. */
  function valueAt(curve, x) {
    const xs = curve[axis];
    const step = xs.length > 1 ? xs.at(-1) - xs.at(-2) : 0;
    return x > xs.at(-1) + step || x < xs[0] - step ? null : curve.y[nearest(xs, x)];
  }

  function follow(x) {
    for (const entry of drawn.values()) {
      entry.cursor.hidden = x === null;
      for (const [curve, output] of entry.values) {
        output.textContent = x === null ? "" : shown(entry.chart, valueAt(curve, x));
      }
      if (x === null) continue;
      entry.cursor.style.left = `${inner(entry)[0] + entry.view.scale("x")(x)}px`;
      entry.cursor.dataset.at = axis === "step" ? `step ${whole.format(x)}` : `${whole.format(x)} tokens`;
      entry.cursor.classList.toggle("flipped", entry.view.scale("x")(x) > inner(entry)[1] * 0.7);
    }
  }

  function point(entry, band) {
    let start = null;
    entry.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0) start = { x: at(entry, event), pixel: event.clientX };
    });
    entry.plot.addEventListener("pointermove", (event) => {
      const x = at(entry, event);
      follow(x);
      if (!start || Math.abs(event.clientX - start.pixel) < 6) return;
      if (band.hidden) entry.plot.setPointerCapture(event.pointerId);
      const scale = entry.view.scale("x");
      const [left, right] = [scale(start.x), scale(x)].sort((a, b) => a - b);
      band.hidden = false;
      band.style.left = `${inner(entry)[0] + left}px`;
      band.style.width = `${right - left}px`;
    });
    const leave = () => {
      start = null;
      band.hidden = true;
    };
    entry.plot.addEventListener("pointerup", (event) => {
      if (start && !band.hidden) {
        const range = [start.x, at(entry, event)].sort((a, b) => a - b);
        if (range[1] > range[0]) zoom = range;
        redrawAll();
      }
      leave();
    });
    entry.plot.addEventListener("pointercancel", leave);
    entry.plot.addEventListener("pointerleave", () => follow(null));
    entry.plot.addEventListener("dblclick", unzoom);
  }

  function unzoom() {
    zoom = null;
    redrawAll();
  }

  byId("reset").addEventListener("click", unzoom);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && zoom) unzoom();
  });
  for (const choice of document.querySelectorAll('input[name="axis"]')) {
    choice.checked = choice.value === axis; // a browser may bring an old choice back
    choice.addEventListener("change", () => {
      axis = choice.value;
      unzoom();
    });
  }

  async function drawAll() {
    const wanted = new Set(data.charts.map((chart) => chart.id));
    for (const [id, entry] of drawn) {
      if (wanted.has(id)) continue;
      entry.view.finalize();
      entry.figure.remove();
      drawn.delete(id);
    }
    for (const chart of data.charts) {
      const entry = drawn.get(chart.id);
      if (!entry) await draw(chart);
      else {
        entry.chart = chart;
        describe(entry);
        redraw(entry);
      }
    }
    document.querySelector(".tools").hidden = drawn.size === 0;
  }

  // --- while a run goes on ---------------------------------------------------------------------------------

  /* Puts new HTML in place of old, with the same <details> open. */
  function replacePart(name, html) {
    const part = document.querySelector(`[data-part="${name}"]`);
    if (part.dataset.html === html) return;
    part.dataset.html = html;
    const open = new Map([...part.querySelectorAll("details[id]")].map((details) => [details.id, details.open]));
    part.innerHTML = html;
    for (const details of part.querySelectorAll("details[id]")) {
      if (open.has(details.id)) details.open = open.get(details.id);
    }
  }

  async function refresh(news) {
    data = news;
    for (const [name, html] of Object.entries(data.parts)) {
      replacePart(name, html);
      const empty = data.empty.includes(name);
      byId(name).hidden = empty;
      document.querySelector(`[data-link="${name}"]`).hidden = empty;
    }
    await drawAll();
  }

  function banner(text, kind) {
    byId("banner").hidden = false;
    byId("banner").className = kind;
    byId("banner").textContent = text;
  }

  function ago(seconds) {
    if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} minutes ago`;
    return seconds < 172800 ? `${Math.round(seconds / 3600)} hours ago` : `${Math.round(seconds / 86400)} days ago`;
  }

  function tell() {
    if (data.problem) banner(`${data.problem} What stands below is older.`, "bad");
    else if (data.finished) banner("The run has finished. This page stays as it is.", "good");
    else if (data.written === null) banner("Waiting for the run: its folder is not there yet, or has nothing in it.", "open");
    else {
      const silence = Date.now() / 1000 - data.written;
      const doubt = silence > 900 ? " The run may have stopped." : "";
      banner(`Live: last written ${ago(silence)}.${doubt}`, "open");
    }
  }

  async function poll() {
    let wait = 2000;
    try {
      const answer = await fetch(`data.json?have=${data.version ?? ""}`, { cache: "no-store" });
      if (answer.status === 200) await refresh(await answer.json());
      tell();
      if (data.finished) wait = 15000;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // fetch's only error is that nobody answers
      banner("steep report --watch has ended. What stands below is the last it said.", "bad");
      wait = 10000;
    }
    setTimeout(poll, wait);
  }

  drawAll().then(() => {
    document.documentElement.dataset.drawn = "";
    if (live) poll();
  });
})();
