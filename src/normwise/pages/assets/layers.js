// A picked layer: in the address (#layer=…), in its rows, in the charts, and where else it is.
(() => {
  "use strict";
  const bar = document.getElementById("layer-bar");
  const jump = document.getElementById("jump");
  const listeners = []; // of the charts
  let places = [];
  let at = -1;

  // Comparing, not a selector: names are text.
  function placesOf(name) {
    const found = [];
    for (const place of document.querySelectorAll("tr[data-layer], figure[data-chart]")) {
      const figure = place.tagName === "FIGURE";
      if (figure ? window.pageLayers.charts[place.dataset.chart]?.includes(name) : place.dataset.layer === name) {
        found.push(place);
      }
    }
    return found;
  }

  function go(step) {
    if (places.length === 0) return;
    at = (at + step + places.length) % places.length;
    show(places[at]);
  }

  function show(place) {
    if (place.hidden) window.pageTables.clear(place.closest("[data-table]"));
    const target = place.querySelector(".drawing:not([hidden])") ?? place;
    if (place.tagName === "FIGURE" && target === place) place.tabIndex = -1;
    target.focus({ preventScroll: true });
    place.scrollIntoView({ block: "center" });
    tell();
  }

  function tell() {
    const where = at < 0 ? "" : `place ${at + 1} of ${places.length}`;
    bar.querySelector("span").textContent = places.length === 0 ? "is not on this page" : where;
  }

  // name: null for none. jumps: whether to go to the first row.
  function pick(name, jumps = false) {
    const hash = name === null ? "" : `#layer=${encodeURIComponent(name)}`;
    if (hash !== location.hash) {
      history.replaceState(null, "", hash || location.pathname + location.search);
    }
    apply(name, jumps);
  }

  function apply(name, jumps) {
    window.pageLayers.picked = name;
    for (const row of document.querySelectorAll("tr[data-layer]")) {
      row.classList.toggle("picked", row.dataset.layer === name);
    }
    for (const listener of listeners) listener(name);
    bar.hidden = name === null;
    if (name === null) return;
    places = placesOf(name);
    at = places.indexOf(document.activeElement.closest("tr, figure"));
    bar.querySelector("bdi").textContent = name;
    for (const button of bar.querySelectorAll("button")) {
      button.disabled = button.dataset.step !== "0" && places.length < 2;
    }
    tell();
    if (jumps && places.length > 0) {
      const row = places.findIndex((place) => place.tagName === "TR");
      at = Math.max(0, row);
      show(places[at]);
    }
  }

  function fromAddress() {
    const match = /^#layer=(.*)$/.exec(location.hash);
    if (!match) return;
    try {
      apply(decodeURIComponent(match[1]), true);
    } catch (error) {
      if (!(error instanceof URIError)) throw error; // an address that somebody mistyped
    }
  }

  window.pageLayers = { picked: null, pick, charts: [], listeners, fromAddress };

  // In a table: the layer is picked where it stands; the bar leads to its other places.
  for (const link of document.querySelectorAll('td.layer a')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      link.closest("tr").focus({ preventScroll: true });
      pick(link.closest("tr").dataset.layer);
    });
  }
  for (const button of bar.querySelectorAll("button")) {
    const step = Number(button.dataset.step);
    button.addEventListener("click", () => (step === 0 ? pick(null) : go(step)));
  }
  function jumpTo() {
    const known = [...document.getElementById("layers").options].map((option) => option.value);
    if (known.includes(jump.value)) pick(jump.value, true);
  }
  jump?.addEventListener("change", jumpTo);
  jump?.addEventListener("keydown", (event) => {
    if (event.key === "Enter") jumpTo();
  });
  window.addEventListener("hashchange", fromAddress);
})();
