// On every page: sort of small tables, the switch between light and dark, copies of BibTeX. Pages are complete without it.
"use strict";
(() => {
  const key = (td) => (td && td.hasAttribute("data-order") ? td.getAttribute("data-order") : td ? td.textContent.trim() : "");

  function compare(a, b) {
    const x = Number(a), y = Number(b);
    if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  // A figure that is no success: the attack did not implant, or the defense failed or ruined the model.
  const isVoid = (row, td) => Boolean(td) && td.hasAttribute("data-metric") && /\b(weak|lost)\b/.test(row.className);

  // Rows stay within their body, so controls never mix with contestants; in either direction figures that are no success
  // come after those that count, and empty fields last.
  function sort(table, column, down) {
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((r) => !r.classList.contains("group"));
      const keyed = rows.map((row, i) => ({ row, i, k: key(row.cells[column]), late: isVoid(row, row.cells[column]) }));
      keyed.sort((a, b) => {
        if ((a.k === "") !== (b.k === "")) return a.k === "" ? 1 : -1;
        if (a.late !== b.late) return a.late ? 1 : -1;
        return (down ? -compare(a.k, b.k) : compare(a.k, b.k)) || a.i - b.i;
      });
      body.append(...keyed.map((e) => e.row));
    }
    // Say in the headings which column the table is sorted by.
    [...table.tHead.rows[0].cells].forEach((th, i) => {
      const on = i === column;
      if (on) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
      const button = th.querySelector("button.sort");
      if (button) button.textContent = on ? (down ? "▼" : "▲") : "↕";
    });
  }

  // A button per heading.
  function headings(table) {
    [...table.tHead.rows[0].cells].forEach((th, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = "↕";
      button.setAttribute("aria-label", `sort by ${th.textContent.trim()}`);
      button.addEventListener("click", () => {
        // Figures start with the largest, words with the first; a second click turns the order.
        const now = th.getAttribute("aria-sort");
        sort(table, column, now ? now === "ascending" : th.classList.contains("num"));
      });
      th.append(" ", button);
    });
  }

  function theme(button) {
    const root = document.documentElement, names = ["auto", "dark", "light"];
    const now = () => root.dataset.theme || "auto";
    const say = () => { button.textContent = `Theme: ${now()}`; };
    button.addEventListener("click", () => {
      const next = names[(names.indexOf(now()) + 1) % names.length];
      if (next === "auto") delete root.dataset.theme;
      else root.dataset.theme = next;
      try { localStorage.setItem("sleeperbench-theme", next); } catch { /* lasts for this page */ }
      say();
    });
    say();
    button.hidden = false;
  }

  // A button beside each BibTeX entry that copies it, where the browser lets a page do so.
  function copies() {
    if (!navigator.clipboard) return;
    for (const pre of document.querySelectorAll("pre.bibtex")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(pre.textContent);
          button.textContent = "Copied";
        } catch { button.textContent = "Not allowed here"; }
      });
      pre.before(button);
    }
  }

  const switcher = document.getElementById("theme");
  if (switcher) theme(switcher);
  copies();
  for (const table of document.querySelectorAll("table.sortable")) {
    headings(table);
  }
})();
