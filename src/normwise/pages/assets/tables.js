// Tables: sorting, filtering, walking through rows; and the light and dark of the page.
(() => {
  "use strict";
  const RANK = { error: 0, warning: 1, info: 2 };

  function keyOf(row, index) {
    const cell = row.cells[index];
    if (cell.dataset.key !== undefined) return Number(cell.dataset.key);
    const text = cell.textContent.trim();
    if (cell.classList.contains("severity") && text in RANK) return RANK[text];
    return text === "" || cell.classList.contains("number") ? null : text;
  }

  // Nothing goes last in both directions; numbers go before text.
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    const order = typeof a === "number" ? a - b || 0 : a.localeCompare(b, undefined, { numeric: true });
    return sign * order;
  }

  function sort(table, head) {
    const index = [...head.parentNode.children].indexOf(head);
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.ariaSort = "none";
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [keyOf(row, index), row]);
    keyed.sort((a, b) => compare(a[0], b[0], sign)); // stable: the order before breaks ties
    body.append(...keyed.map(([, row]) => row));
    reachable(body);
  }

  // One row is in the order of Tab; arrows go to the others.
  function reachable(body, row) {
    const shown = [...body.rows].filter((r) => !r.hidden);
    const chosen = row && !row.hidden ? row : shown[0];
    for (const r of body.rows) r.tabIndex = r === chosen ? 0 : -1;
  }

  function filter(block) {
    const text = block.querySelector(".filter").value.trim().toLowerCase();
    const wanted = new Map(); // column -> its pressed values
    for (const chip of block.querySelectorAll('.chip[aria-pressed="true"]')) {
      const { column, value } = chip.dataset;
      wanted.set(column, [...(wanted.get(column) ?? []), value]);
    }
    const columns = [...block.querySelector("thead tr").cells].map((head) => head.dataset.column);
    const rows = [...block.querySelector("tbody").rows];
    let shown = 0;
    for (const row of rows) {
      const said = [...row.cells].map((cell) => cell.textContent.trim());
      const kinds = said.every((text, i) => wanted.get(columns[i])?.includes(text) ?? true);
      row.hidden = !(kinds && said.join("\n").toLowerCase().includes(text));
      shown += !row.hidden;
    }
    const all = rows.length;
    block.querySelector("output").value = shown === all ? `${all} rows` : `${shown} of ${all} rows`;
    block.querySelector(".empty").hidden = shown > 0;
    reachable(block.querySelector("tbody"));
  }

  function clear(block) {
    block.querySelector(".filter").value = "";
    for (const chip of block.querySelectorAll(".chip")) chip.ariaPressed = "false";
    filter(block);
  }

  function walk(event) {
    const row = event.target.closest("tr");
    const body = row?.parentNode;
    if (body?.tagName !== "TBODY") return;
    const shown = [...body.rows].filter((r) => !r.hidden);
    const at = shown.indexOf(row);
    const goals = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 };
    if (event.key === "Enter" && event.target === row && row.dataset.layer !== undefined) {
      window.pageLayers.pick(row.dataset.layer);
    } else if (event.key in goals) {
      const goal = shown[Math.max(0, Math.min(shown.length - 1, goals[event.key]))];
      reachable(body, goal);
      goal.focus();
      goal.scrollIntoView({ block: "nearest" });
    } else {
      return;
    }
    event.preventDefault();
  }

  // A phone shows rows as cards, with the column's name before each value; roles say that it is a
  // table still. Set here, and not written at each cell, they leave a large file a quarter smaller.
  function complete(table) {
    const labels = [...table.tHead.rows[0].cells].map((head) => head.textContent);
    table.role = "table";
    table.tHead.role = table.tBodies[0].role = "rowgroup";
    for (const row of table.rows) row.role = "row";
    for (const head of table.tHead.rows[0].cells) head.role = "columnheader";
    for (const row of table.tBodies[0].rows) {
      labels.forEach((label, i) => {
        row.cells[i].role = "cell";
        row.cells[i].dataset.label = label;
      });
    }
    reachable(table.tBodies[0]);
  }

  for (const block of document.querySelectorAll("[data-table]")) {
    const table = block.querySelector("table");
    complete(table);
    for (const head of table.tHead.rows[0].cells) {
      head.querySelector("button").addEventListener("click", () => sort(table, head));
    }
    block.querySelector(".filter").addEventListener("input", () => filter(block));
    for (const chip of block.querySelectorAll(".chip")) {
      chip.addEventListener("click", () => {
        chip.ariaPressed = String(chip.ariaPressed !== "true");
        filter(block);
      });
    }
    table.addEventListener("keydown", walk);
    table.addEventListener("focusin", (event) => {
      const row = event.target.closest("tbody tr");
      if (row) reachable(row.parentNode, row);
    });
  }

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "Escape") {
      const block = event.target.closest?.("[data-table]");
      if (window.pageLayers.picked !== null) window.pageLayers.pick(null);
      else if (block) clear(block);
    } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      const block = event.target.closest?.("[data-table]") ?? document;
      const field = block.querySelector(".filter");
      if (field) {
        field.focus();
        event.preventDefault();
      }
    }
  });

  // Light and dark: what the system says until somebody chooses; kept where a browser lets us.
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  function kept(value) {
    try {
      if (value === undefined) return localStorage.getItem("normwise-theme");
      localStorage.setItem("normwise-theme", value);
    } catch {
      // Storage may be forbidden for files; then the choice lasts as long as the page.
    }
    return null;
  }
  function isDark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : system.matches;
  }
  function tell() {
    button.ariaPressed = String(isDark());
  }
  const before = kept();
  if (before === "dark" || before === "light") document.documentElement.dataset.theme = before;
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    kept(theme);
    tell();
  });
  system.addEventListener("change", tell);
  tell();

  window.pageTables = { clear };
})();
