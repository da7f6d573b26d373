// Sort, search, facets, and CSV of what is shown. The page is complete without it. State lives in the URL's hash.
"use strict";
(() => {
  const key = (td) => (td && td.hasAttribute("data-order") ? td.getAttribute("data-order") : td ? td.textContent.trim() : "");

  function compare(a, b) {
    const x = Number(a), y = Number(b);
    if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  // Rows stay within their body, so controls never mix with contestants; empty fields come last either way.
  function sort(table, column, down) {
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((r) => !r.classList.contains("group"));
      const keyed = rows.map((row, i) => ({ row, i, k: key(row.cells[column]) }));
      keyed.sort((a, b) => {
        if ((a.k === "") !== (b.k === "")) return a.k === "" ? 1 : -1;
        return (down ? -compare(a.k, b.k) : compare(a.k, b.k)) || a.i - b.i;
      });
      body.append(...keyed.map((e) => e.row));
    }
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      const on = i === column;
      if (on) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
      const button = th.querySelector("button.sort");
      if (button) button.textContent = on ? (down ? "▼" : "▲") : "↕";
    });
  }

  function makeSortable(table, changed) {
    [...table.tHead.rows[0].cells].forEach((th, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = "↕";
      button.setAttribute("aria-label", `sort by ${th.textContent.trim()}`);
      button.addEventListener("click", () => {
        // Figures start with the largest, words with the first; a second click turns the order.
        const now = th.getAttribute("aria-sort");
        const down = now ? now === "ascending" : th.classList.contains("num");
        sort(table, column, down);
        changed(column, down);
      });
      th.append(" ", button);
    });
  }

  // A spreadsheet takes text that starts so for a formula; numbers are left alone.
  const quote = (text) => {
    const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };

  function csv(table) {
    const heads = [...table.tHead.rows[0].cells].map((th) => {
      const copy = th.cloneNode(true);
      copy.querySelectorAll("button").forEach((b) => b.remove());
      return th.dataset.metric || copy.textContent.trim();
    });
    const lines = [heads.map(quote).join(",")];
    for (const row of table.querySelectorAll("tbody tr[data-cell]")) {
      if (row.hidden) continue;
      lines.push([...row.cells].map((td) => quote(key(td).replace(/\s+/g, " "))).join(","));
    }
    return lines.join("\r\n") + "\r\n";
  }

  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function board(table) {
    const box = document.getElementById("filters");
    if (!box) return makeSortable(table, () => {});
    const search = document.getElementById("search");
    const facets = [...box.querySelectorAll("select[data-facet]")];
    const rows = [...table.querySelectorAll("tbody tr[data-cell]")];
    // What a reader can search: identity and status, not every figure.
    const words = new Map(rows.map((r) => [r, [...r.cells].slice(0, 9).map((c) => c.textContent).concat(r.dataset.cell).join(" ").toLowerCase()]));
    const heads = [...table.tHead.rows[0].cells];
    const names = heads.map((th) => th.dataset.metric || th.textContent.trim().toLowerCase());
    let order = null;

    for (const select of facets) {
      for (const value of [...new Set(rows.map((r) => r.dataset[select.dataset.facet]))].sort()) {
        const option = new Option(value || "none");
        option.value = `=${value}`;
        select.add(option);
      }
    }

    function apply() {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const hit = facets.every((s) => !s.value || s.value === `=${row.dataset[s.dataset.facet]}`) && wanted.every((w) => words.get(row).includes(w));
        row.hidden = !hit;
        shown += hit;
      }
      for (const group of table.querySelectorAll("tr.group")) {
        group.hidden = ![...group.parentElement.rows].some((r) => r !== group && !r.hidden);
      }
      document.getElementById("shown").textContent = `${shown} of ${rows.length} rows of this page`;
    }

    function remember() {
      const state = new URLSearchParams();
      if (search.value) state.set("q", search.value);
      for (const s of facets) if (s.value) state.set(s.dataset.facet, s.value.slice(1));
      if (order) state.set("sort", `${names[order[0]]}:${order[1] ? "down" : "up"}`);
      const text = state.toString();
      history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    }

    function recall() {
      const state = new URLSearchParams(location.hash.slice(1));
      search.value = state.get("q") || "";
      for (const s of facets) {
        const value = state.has(s.dataset.facet) ? `=${state.get(s.dataset.facet)}` : "";
        s.value = [...s.options].some((o) => o.value === value) ? value : "";
      }
      const [, name, way] = /^(.*):(up|down)$/.exec(state.get("sort") || "") || [];
      const column = names.indexOf(name);
      if (column >= 0) {
        order = [column, way === "down"];
        sort(table, ...order);
      }
      apply();
    }

    makeSortable(table, (column, down) => {
      order = [column, down];
      remember();
    });
    const change = () => { apply(); remember(); };
    search.addEventListener("input", change);
    for (const s of facets) s.addEventListener("change", change);
    document.getElementById("clear").addEventListener("click", () => {
      search.value = "";
      for (const s of facets) s.value = "";
      change();
    });
    document.getElementById("csv").addEventListener("click", () => save("sleeperbench.csv", csv(table)));
    window.addEventListener("hashchange", recall);
    box.hidden = false;
    recall();
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.id === "board") board(table);
    else makeSortable(table, () => {});
  }
})();
