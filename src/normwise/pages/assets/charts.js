// Charts: drawn by vega-embed if it is in this file; their data as tables in any case.
(() => {
  "use strict";
  const all = JSON.parse(document.getElementById("data").textContent);
  const embed = window.vegaEmbed;
  const LETTER = 6.6; // pixels of a letter of an axis, about

  function room(width) {
    return Math.max(12, Math.floor((0.34 * width) / LETTER));
  }

  function dataTable(details, { spec, names }) {
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const label of Object.values(names)) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = label;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const mark of spec.data.values) {
      const row = body.insertRow();
      for (const key of Object.keys(names)) row.insertCell().textContent = mark[key] ?? "";
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.tabIndex = 0;
    scroll.append(table);
    details.append(scroll);
  }

  // Left and right go from layer to layer of the chart that has the focus, Enter to its row.
  function keys(drawing, layers) {
    drawing.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const picked = window.pageLayers.picked;
      if (event.target.tagName === "SELECT") return;
      if (step !== undefined) {
        const at = layers.indexOf(picked);
        const next = at < 0 ? (step > 0 ? 0 : layers.length - 1) : at + step;
        window.pageLayers.pick(layers[Math.max(0, Math.min(layers.length - 1, next))]);
      } else if (event.key === "Enter" && picked !== null) {
        window.pageLayers.pick(picked, true);
      } else {
        return;
      }
      event.preventDefault();
    });
  }

  async function draw(figure, { spec, layers }) {
    const drawing = figure.querySelector(".drawing");
    drawing.hidden = false;
    const longest = Math.max(1, ...spec.data.values.map((mark) => mark.c?.length ?? 0));
    const columns = Math.max(1, Math.floor(drawing.clientWidth / (LETTER * longest + 26)));
    const params = spec.params.map((p) => (p.name === "room" ? { ...p, value: room(drawing.clientWidth) } : p));
    const config = {
      background: "transparent",
      view: { stroke: null },
      axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", domain: false, tickColor: "#7f8994" },
      legend: { orient: "top", labelFontSize: 12, labelLimit: 0, columns, symbolOpacity: 1 },
    };
    // ast: expressions are interpreted, as the policy of the page forbids to compile them.
    const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config };
    const { view } = await embed(drawing, { ...spec, params }, options);
    const menu = spec.params.find((p) => p.name === "chosen");
    window.pageLayers.listeners.push((name) => {
      view.signal("picked", name);
      if (menu && layers.includes(name)) view.signal("chosen", name);
      view.run();
    });
    view.addEventListener("click", (event, item) => {
      const name = item?.datum?.l;
      if (name !== undefined && name !== null) window.pageLayers.pick(name);
    });
    new ResizeObserver(() => {
      view.signal("room", room(drawing.clientWidth)).resize().run();
    }).observe(drawing);
    if (layers.length > 0) {
      drawing.tabIndex = 0;
      drawing.setAttribute("aria-keyshortcuts", "ArrowLeft ArrowRight Enter");
      keys(drawing, layers);
    }
  }

  const drawn = [];
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const one = all[figure.dataset.chart];
    window.pageLayers.charts.push(one.layers);
    const details = figure.querySelector("details");
    details.addEventListener("toggle", () => dataTable(details, one), { once: true });
    if (embed) drawn.push(draw(figure, one));
    else details.open = true;
  }
  Promise.all(drawn).then(() => {
    window.pageLayers.fromAddress();
    document.documentElement.dataset.ready = "true";
  });
})();
