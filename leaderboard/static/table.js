// The table of all cells: search, facets, sort, columns, CSV and BibTeX, over all rows of the board and not one page.
// The pages show every row without it. DataTables holds what is chosen and draws; which rows, in which order, is ours.
// What is chosen lives in the URL's hash. Text enters the page as text alone.
"use strict";

// What can be worked out without a page.
const cellTable = (() => {
  const PER_PAGE = 25;
  const FACETS = ["dataset", "arch", "attack", "rate", "defense", "access", "status"];
  const IDENTITY = ["cell", "dataset", "arch", "attack", "rate", "defense", "access", "seed", "status"];

  // A share in per cent with one decimal; halves go to the even digit, as on the pages made beforehand.
  function percent(value) {
    const y = 100 * value, n = Math.floor(y * 10);
    if ((2 * n + 1) % 5 === 0 && (n + 0.5) / 10 === y) return ((n % 2 === 0 ? n : n + 1) / 10).toFixed(1);
    return y.toFixed(1);
  }

  const span = (low, high) => `${(low / 10).toFixed(1)}${low >= 0 ? "–" : " to "}${(high / 10).toFixed(1)}`;

  // A spreadsheet takes text that starts so for a formula; numbers are left alone.
  const quote = (text) => {
    const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };

  // All cells as they were packed: `text` holds words with an index per row, `metrics` runs of reasons and the figures.
  class Cells {
    constructor(data) {
      this.data = data;
      this.count = data.rows;
      this.metrics = new Map(data.metrics.map((m) => [m.name, m]));
      this.columns = [...IDENTITY, ...this.metrics.keys()];
      this.off = new Set(data.off);
      this.usual = this.columns.filter((c) => !this.off.has(c));
      this.opened = new Map();
    }

    // A metric's figures: NaN where a row has none, `why` the index of the reason, `at` the place among the figures.
    open(name) {
      if (this.opened.has(name)) return this.opened.get(name);
      const m = this.metrics.get(name), n = this.count;
      const value = new Float64Array(n).fill(NaN), why = new Int32Array(n).fill(-1), at = new Int32Array(n).fill(-1);
      const total = new Float64Array(m.x.length);
      for (let i = 0, k = 0; k < m.total.length; k += 2) for (let j = 0; j < m.total[k + 1]; j++) total[i++] = m.total[k];
      for (let i = 0, k = 0, f = 0; k < m.runs.length; k += 2) {
        for (let j = 0; j < m.runs[k + 1]; j++, i++) {
          if (m.runs[k] >= 0) why[i] = m.runs[k];
          else {
            value[i] = total[f] ? m.x[f] / total[f] : m.x[f];
            at[i] = f++;
          }
        }
      }
      const made = { value, why, at, total };
      this.opened.set(name, made);
      return made;
    }

    page(i) { return this.data.pages.slice(12 * i, 12 * i + 12); }

    word(column, i) {
      const t = this.data.text[column];
      return t.values[t.at[i]];
    }

    name(i) {
      if (i in this.data.names) return this.data.names[i];
      const t = this.data.text, w = (k) => this.word(k, i);
      return `${w("dataset")}/${w("arch")}/${w("attack")}@${t.rate.plain[t.rate.at[i]]}/${w("defense")}/s${w("seed")}`;
    }

    // What a figure's field shows: a text, a second line, the whole in words, and the raw value.
    figure(name, i) {
      const m = this.metrics.get(name), c = this.open(name), f = c.at[i];
      if (f < 0) {
        const [word, title] = this.data.reasons[c.why[i]];
        return { empty: true, text: word, note: "", title, order: "" };
      }
      const value = c.value[i], counted = c.total[f] > 0;
      const shown = m.text ? m.text[f] : `${percent(value)} %`;
      const note = m.note ? m.note[f] : m.low && m.low[f] !== null ? span(m.low[f], m.high[f]) : "";
      const title = `${m.label} ${value}${counted ? `; ${m.x[f]} of ${c.total[f]} images` : ""}${note ? "; beneath: 95 % Wilson interval of this model on its test images" : ""}`;
      return { empty: false, text: shown, note, title, order: String(value) };
    }

    // What a reader can search: identity and status, not every figure.
    words() {
      if (!this.searched) {
        this.searched = Array.from({ length: this.count }, (_, i) => {
          const parts = [this.name(i), this.page(i), this.word("access", i), this.word("rate", i), this.word("status", i), this.word("role", i)];
          return parts.join(" ").toLowerCase();
        });
      }
      return this.searched;
    }

    // The rows that a state shows, in its order, and per facet how many rows each of its values would show. The last
    // answer is kept, since another order, page or set of columns asks for the same rows.
    select(state) {
      const asked = JSON.stringify([state.q, state.facets]), order = `${state.sort} ${state.down}`;
      if (asked !== this.asked) [this.asked, this.narrowed, this.order] = [asked, this.narrow(state), ""];
      if (order !== this.order) [this.order, this.found] = [order, state.sort ? this.sorted(this.narrowed.found, state.sort, state.down) : this.narrowed.found];
      return { found: this.found, counts: this.narrowed.counts };
    }

    narrow(state) {
      const n = this.count, wanted = state.q.toLowerCase().split(/\s+/).filter(Boolean);
      const words = wanted.length ? this.words() : null;
      const at = FACETS.map((f) => this.data.text[f].at);
      const chosen = FACETS.map((f) => (f in state.facets ? this.data.text[f].values.indexOf(state.facets[f]) : -1));
      const asked = [...chosen.keys()].filter((k) => chosen[k] >= 0);
      const counts = FACETS.map((f) => new Int32Array(this.data.text[f].values.length));
      const found = [];
      for (let i = 0; i < n; i++) {
        if (words && !wanted.every((w) => words[i].includes(w))) continue;
        let missed = -1, misses = 0;
        for (const k of asked) if (at[k][i] !== chosen[k]) { missed = k; misses++; }
        if (misses === 0) {
          found.push(i);
          for (let k = 0; k < at.length; k++) counts[k][at[k][i]]++;
        } else if (misses === 1) counts[missed][at[missed][i]]++;
      }
      return { found, counts };
    }

    // The place of each row's value among all rows; equal values share one, and an empty field has none.
    ranked(column) {
      const name = `rank ${column}`, n = this.count, { text } = this.data, word = (c) => (i) => text[c].rank[text[c].at[i]] ?? NaN;
      if (!this.opened.has(name)) {
        // A cell reads by defense, then by attack.
        const key = column !== "cell" ? word(column) : (i) => word("defense")(i) * n + word("attack")(i);
        const keys = this.metrics.has(column) ? this.open(column).value : Float64Array.from({ length: n }, (_, i) => key(i));
        const place = new Map();
        for (const v of keys.slice().sort()) if (v === v && !place.has(v)) place.set(v, place.size);
        this.opened.set(name, Int32Array.from(keys, (v) => place.get(v) ?? -1));
      }
      return this.opened.get(name);
    }

    // Rows, given in their first order: contestants before controls and oracles; figures that are no success after those
    // that count, and empty fields last, in either direction. Numbers alone are sorted the quickest, so each row is one.
    sorted(rows, column, down) {
      const n = this.count, rank = this.ranked(column), figures = this.metrics.has(column), { status } = this.data.text;
      const places = new Float64Array(rows.length);
      rows.forEach((i, k) => {
        const late = (i < this.data.contestants ? 0 : 3) + (rank[i] < 0 ? 2 : figures && status.void[status.at[i]]);
        places[k] = (late * n + (rank[i] < 0 ? 0 : down ? n - 1 - rank[i] : rank[i])) * n + k;
      });
      return Array.from(places.sort(), (place) => rows[place % n]);
    }

    // The rows as CSV: raw values, the ends of intervals, and in the last column the reasons of empty fields.
    csv(rows, columns) {
      const heads = [], fields = [];
      for (const c of columns) {
        if (!this.metrics.has(c)) {
          heads.push(c);
          fields.push(c === "cell" ? (i) => this.name(i) : (i) => this.csvWord(c, i));
          continue;
        }
        const m = this.metrics.get(c), opened = this.open(c);
        heads.push(c);
        fields.push((i) => (opened.at[i] < 0 ? "" : String(opened.value[i])));
        if (m.low) {
          for (const [end, ends] of [["low", m.low], ["high", m.high]]) {
            heads.push(`${c}_${end}`);
            fields.push((i) => (opened.at[i] < 0 || ends[opened.at[i]] === null ? "" : String(ends[opened.at[i]] / 1000)));
          }
        }
      }
      const metrics = columns.filter((c) => this.metrics.has(c));
      if (metrics.length) {
        heads.push("empty_because");
        fields.push((i) => metrics.filter((c) => this.open(c).at[i] < 0).map((c) => `${c}: ${this.figure(c, i).text}`).join("; "));
      }
      const lines = [heads.map(quote).join(",")];
      for (const i of rows) lines.push(fields.map((f) => quote(f(i))).join(","));
      return `${lines.join("\r\n")}\r\n`;
    }

    // The columns of a file: those that are shown, and what is hidden at first because the page says it otherwise.
    filed(columns) {
      return this.columns.filter((c) => columns.includes(c) || (this.off.has(c) && !this.metrics.has(c)));
    }

    csvWord(column, i) {
      const t = this.data.text[column], k = t.at[i];
      return String((t.raw || t.values)[k] ?? "");
    }

    // BibTeX of the benchmark and of all that these rows use, each entry once.
    bibtex(rows) {
      const entries = new Set();
      for (const kind of ["dataset", "attack", "defense"]) {
        const t = this.data.text[kind];
        for (const k of new Set(rows.map((i) => t.at[i]))) for (const entry of t.bibtex[k]) entries.add(entry);
      }
      return `${[this.data.bibtex, ...[...entries].sort()].join("\n\n")}\n`;
    }

    // A state from the text after the hash sign; what does not fit these cells is left out.
    parse(hash) {
      const given = new URLSearchParams(hash), state = { q: given.get("q") || "", facets: {}, sort: "", down: false, columns: [...this.usual], page: 1 };
      for (const f of FACETS) {
        if (given.has(f) && this.data.text[f].values.includes(given.get(f))) state.facets[f] = given.get(f);
      }
      const [, name, way] = /^(.*):(up|down)$/.exec(given.get("sort") || "") || [];
      if (this.columns.includes(name)) [state.sort, state.down] = [name, way === "down"];
      const listed = (given.get("columns") || "").split(",");
      if (given.has("columns")) state.columns = this.columns.filter((c) => listed.includes(c));
      if (!state.columns.length) state.columns = [...this.usual];
      if (/^[1-9][0-9]{0,6}$/.test(given.get("page") || "")) state.page = Number(given.get("page"));
      return state;
    }

    format(state) {
      const given = new URLSearchParams();
      if (state.q) given.set("q", state.q);
      for (const f of FACETS) if (f in state.facets) given.set(f, state.facets[f]);
      if (state.sort) given.set("sort", `${state.sort}:${state.down ? "down" : "up"}`);
      if (state.columns.join() !== this.usual.join()) given.set("columns", state.columns.join(","));
      if (state.page > 1) given.set("page", String(state.page));
      return given.toString();
    }
  }

  return { Cells, FACETS, IDENTITY, PER_PAGE, percent, quote, span };
})();

if (typeof module !== "undefined") module.exports = cellTable;
else (() => {
  const { Cells, FACETS, IDENTITY, PER_PAGE } = cellTable;
  const board = document.getElementById("board"), $ = (id) => document.getElementById(id);
  if (!board || !$("filters")) return;
  const heads = [...board.tHead.rows[0].cells], off = heads.map((th) => th.hasAttribute("data-off"));
  const selects = [...document.querySelectorAll("select[data-facet]")];
  // `rows` are those of the page as it is shown, `columns` says which are, `focus` is the button that asked for it.
  let cells = null, waiting = [], rows = [], columns = [], taken = false, focus;

  const ready = (then) => (cells ? then() : waiting.push(then));

  function set(node, attributes, ...children) {
    for (const [k, v] of Object.entries(attributes)) if (v !== "" || k.startsWith("data-")) node.setAttribute(k, v);
    node.append(...children);
    return node;
  }
  const element = (name, ...rest) => set(document.createElement(name), ...rest);

  // Fill a row's field, which the library made.
  function fill(td, column, i) {
    const badge = (name, word) => [" ", element("span", { class: `badge ${name}`.trim() }, word)];
    if (column === "cell") {
      const role = cells.word("role", i), named = [element("bdi", {}, cells.word("defense", i)), " against ", element("bdi", {}, cells.word("attack", i))];
      set(td, { scope: "row" }, element("a", { href: `cells/${cells.page(i)}.html` }, ...named), ...(role ? badge(role, role) : []));
    } else if (cells.metrics.has(column)) {
      const f = cells.figure(column, i);
      set(td, { class: f.empty ? "empty" : "", "data-metric": column, "data-order": f.order, title: f.title }, f.text, ...(f.note ? [" ", element("small", {}, f.note)] : []));
    } else {
      const t = cells.data.text[column], k = t.at[i], word = String((t.words || t.values)[k]) || "none";
      const css = { rate: "num", seed: "num", status: "status" }[column] || "";
      set(td, { class: css }, t.hrefs ? element("a", { href: t.hrefs[k] }, element("bdi", {}, word)) : word, ...(t.badges ? t.badges[k].flatMap((b) => badge("", b)) : []));
    }
  }

  // What is chosen, as the library holds it.
  function state() {
    const facets = {}, [by] = table.order();
    for (const f of FACETS) {
      const wanted = table.column(IDENTITY.indexOf(f)).search();
      if (wanted) facets[f] = wanted.slice(1);
    }
    const shown = table.columns().visible().toArray();
    return { q: table.search(), facets, sort: by ? cells.columns[by[0]] : "", down: Boolean(by) && by[1] === "desc", columns: cells.columns.filter((_, k) => shown[k]), page: table.page() + 1 };
  }

  // The library asks for a page of rows, as it would ask a server.
  function answer(request, give) {
    ready(() => {
      const now = state(), { found, counts } = cells.select(now), { status } = cells.data.text;
      focus = $("pager").querySelector(":focus")?.dataset.dtIdx;
      rows = found.slice(request.start, request.start + request.length);
      columns = cells.columns.map((c) => now.columns.includes(c));
      if (!taken && $("static-pages")) $("static-pages").hidden = true;
      taken = true;
      while (board.tBodies.length > 1) board.tBodies[1].remove();
      count(counts);
      legend(now.columns);
      for (const input of $("column-list").querySelectorAll("input")) input.checked = now.columns.includes(input.value);
      $("pager").hidden = found.length <= PER_PAGE;
      const hash = cells.format(now);
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
      give({
        draw: request.draw, recordsTotal: cells.count, recordsFiltered: found.length,
        data: rows.map((i) => ({
          i, DT_RowClass: status.css[status.at[i]],
          DT_RowAttr: { "data-cell": cells.name(i), "data-attack": cells.word("attack", i), "data-defense": cells.word("defense", i) },
        })),
      });
    });
  }

  // The library draws into one body; controls and oracles move to a second one, under a heading of their own.
  function drawn() {
    const [body] = board.tBodies;
    // Before the first choice the library has no rows, and the page's own stand.
    if (!taken) return body.replaceChildren();
    // The library makes its buttons anew, and DataTables 3.1.5 loses the focus on the way.
    if (focus) $("pager").querySelector(`[data-dt-idx="${focus}"]`)?.focus();
    const first = rows.findIndex((i) => i >= cells.data.contestants);
    if (first < 0) return;
    const heading = element("th", { colspan: String(columns.filter(Boolean).length), scope: "rowgroup" }, element("span", {}, "Controls and oracles: not contestants"));
    board.append(element("tbody", { class: "controls" }, element("tr", { class: "group" }, heading), ...[...body.rows].slice(first)));
  }

  function count(counts) {
    for (const select of selects) {
      const f = select.dataset.facet, { values } = cells.data.text[f], found = counts[FACETS.indexOf(f)];
      for (const option of select.options) {
        const k = values.indexOf(option.value.slice(1)), text = `${values[k] || "none"} (${found[k]})`;
        if (option.value && option.textContent !== text) option.textContent = text;
      }
    }
  }

  // The words in the empty fields of the page.
  function legend(shown) {
    const words = new Set();
    for (const c of shown) if (cells.metrics.has(c)) for (const i of rows) { const why = cells.open(c).why[i]; if (why >= 0) words.add(cells.data.reasons[why][0]); }
    $("words").replaceChildren(...[...(words.size ? words : ["none"])].sort().map((w) => element("div", {}, element("dt", {}, w), element("dd", {}, cells.data.meanings[w] || "as the method or the engine worded it"))));
  }

  // Search and facets as they stand in their fields.
  function narrow() {
    table.search($("search").value);
    for (const select of selects) table.column(IDENTITY.indexOf(select.dataset.facet)).search(select.value);
    table.draw();
  }

  function show(wanted) {
    const which = (is) => cells.columns.flatMap((c, k) => (wanted.includes(c) === is ? [k] : []));
    table.columns(which(true)).visible(true, false);
    table.columns(which(false)).visible(false, false);
  }

  // Show what the address says.
  function follow() {
    const wanted = cells.parse(location.hash.slice(1));
    $("search").value = wanted.q;
    for (const select of selects) select.value = select.dataset.facet in wanted.facets ? `=${wanted.facets[select.dataset.facet]}` : "";
    table.order(wanted.sort ? [[cells.columns.indexOf(wanted.sort), wanted.down ? "desc" : "asc"]] : []);
    show(wanted.columns);
    narrow();
    // How many pages there are is known when the first is drawn.
    if (wanted.page > 1) table.page(Math.min(wanted.page, table.page.info().pages || 1) - 1).draw("page");
  }

  // Values of the facets and names of the columns, once they are known.
  function offer() {
    for (const select of selects) {
      const { values, rank } = cells.data.text[select.dataset.facet];
      for (const k of [...values.keys()].sort((a, b) => rank[a] - rank[b])) select.add(new Option("", `=${values[k]}`));
    }
    count(cells.select(state()).counts);
    cells.columns.forEach((c, k) => {
      const input = element("input", { type: "checkbox", value: c });
      input.checked = !off[k];
      input.addEventListener("change", () => choose(() => {
        const on = [...$("column-list").querySelectorAll("input:checked")].map((x) => x.value);
        return on.length ? on : [c];
      }));
      $("column-list").append(element("label", {}, input, ` ${heads[k].querySelector(".dt-column-title").textContent.trim()}`));
    });
  }

  const choose = (wanted) => ready(() => { show(wanted()); table.draw("page"); });

  // What the first sort and the first search need is worked out while the reader looks, a column at a time.
  function prepare() {
    const later = window.requestIdleCallback || ((f) => setTimeout(f, 20));
    const steps = [...cells.usual.map((c) => () => cells.ranked(c)), () => cells.words()];
    const step = () => { steps.shift()(); if (steps.length) later(step); };
    later(step);
  }

  function save(name, kind, text) {
    const made = element("a", { href: URL.createObjectURL(new Blob([text], { type: `${kind};charset=utf-8` })), download: name });
    made.click();
    setTimeout(() => URL.revokeObjectURL(made.href), 1000);
  }

  // The page as it was made shows every column; those that are hidden at first are hidden here.
  for (const row of board.querySelectorAll("tbody tr")) if (row.cells.length === off.length) off.forEach((is, k) => { if (is) row.cells[k].hidden = true; });
  $("hidden-columns").hidden = !off.includes(true);
  // A body of its own, so that the library leaves the page's rows alone until it has some.
  board.tHead.after(document.createElement("tbody"));
  DataTable.ext.errMode = "throw";
  const table = new DataTable(board, {
    serverSide: true, ajax: answer, deferLoading: Number(board.dataset.rows), drawCallback: drawn,
    pageLength: PER_PAGE, order: [], orderMulti: false, orderClasses: false, autoWidth: false, typeDetect: false,
    columns: heads.map((th, k) => ({
      data: null, defaultContent: "", cellType: k ? "td" : "th", visible: !off[k], ariaTitle: th.textContent.trim(),
      // Figures start with the largest, words with the first.
      orderSequence: th.classList.contains("num") ? ["desc", "asc"] : ["asc", "desc"],
      createdCell: (td, _, row) => { if (columns[k]) fill(td, cells.columns[k], row.i); },
    })),
    layout: { topStart: "info", topEnd: null, bottomStart: { paging: { firstLast: false, buttons: 5 } }, bottomEnd: null },
    infoCallback: (_, start, end, all, total) => `${total} of ${all} cells${taken && total > PER_PAGE ? `, here ${start} to ${end}` : ""}`,
    language: {
      zeroRecords: "No cell fits these choices.", emptyTable: "No cells.",
      paginate: { previous: "Previous", next: "Next" },
      aria: { orderable: ": sort", orderableReverse: ": sort the other way", orderableRemove: ": sort the other way", paginate: { number: "Page " } },
    },
  });
  // Within the table's own frame they would scroll sideways with it.
  $("shown").append(board.parentElement.closest(".scroll").querySelector(".dt-info"));
  $("pager").append(board.closest(".scroll").querySelector(".dt-paging"));

  $("search").addEventListener("input", DataTable.util.debounce(narrow, 60));
  for (const select of selects) select.addEventListener("change", narrow);
  $("clear").addEventListener("click", () => {
    for (const field of [$("search"), ...selects]) field.value = "";
    table.order([]);
    narrow();
  });
  $("columns-usual").addEventListener("click", () => choose(() => cells.usual));
  $("columns-all").addEventListener("click", () => choose(() => cells.columns));
  $("columns-main").addEventListener("click", () => choose(() => cells.data.main));
  $("csv").addEventListener("click", () => ready(() => save("sleeperbench.csv", "text/csv", cells.csv(cells.select(state()).found, cells.filed(state().columns)))));
  $("bibtex").addEventListener("click", () => ready(() => save("sleeperbench.bib", "application/x-bibtex", cells.bibtex(cells.select(state()).found))));
  $("pager").addEventListener("click", () => board.scrollIntoView());
  // A link in a heading leads to its metric; the rest of the heading sorts, by the space bar too.
  for (const a of board.tHead.querySelectorAll("a")) for (const kind of ["click", "keypress"]) a.addEventListener(kind, (e) => e.stopPropagation());
  board.tHead.addEventListener("keydown", (e) => {
    if (e.key !== " " || e.target.getAttribute("role") !== "button") return;
    e.preventDefault();
    e.target.click();
  });
  window.addEventListener("hashchange", () => ready(follow));
  $("filters").hidden = false;

  // The cells come as a script of their own, since a page opened from disk may not read files.
  const script = element("script", { src: board.dataset.source });
  script.addEventListener("load", () => {
    cells = new Cells(window.sleeperbenchCells);
    offer();
    if (cells.format(cells.parse(location.hash.slice(1)))) follow();
    for (const then of waiting) then();
    waiting = [];
    board.dataset.ready = "true";
    prepare();
  });
  script.addEventListener("error", () => { $("shown").textContent = "The cells could not be loaded: search and filters do not work here."; });
  document.head.append(script);
})();
