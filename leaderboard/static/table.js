// The table of all cells: search, facets, sort, columns, CSV and BibTeX, over all rows of the board and not one page.
// The pages show every row without it. What is chosen lives in the URL's hash. Text enters the page as text alone.
"use strict";

// What can be worked out without a page.
const cellTable = (() => {
  const PER_PAGE = 30;
  const FACETS = ["dataset", "arch", "attack", "rate", "defense", "access", "status"];
  const IDENTITY = ["cell", "dataset", "arch", "attack", "rate", "defense", "access", "seed", "status"];
  const MAIN = ["c_acc", "asr", "asr_attacked", "o_asr", "p_asr", "der", "p_asr_net", "bec", "p_der", "det_score", "verdict", "input_tpr_fpr1", "reasr_net"];

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
      this.ranks = new Map();
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

    // Numbers to sort a column by; NaN comes last.
    keys(column) {
      if (this.metrics.has(column)) return this.open(column).value;
      if (this.ranks.has(column)) return this.ranks.get(column);
      const keys = new Float64Array(this.count);
      if (column === "cell") {
        // As it reads: by defense, then by attack.
        const defense = this.keys("defense"), attack = this.keys("attack");
        for (let i = 0; i < keys.length; i++) keys[i] = defense[i] * this.count + attack[i];
      } else {
        const t = this.data.text[column];
        const number = (v) => (v === null ? NaN : Number(v));
        let rank = t.sort.map(number);
        if (t.sort.some((v) => typeof v === "string")) {
          const order = [...t.sort.keys()].sort((a, b) => (t.sort[a] < t.sort[b] ? -1 : t.sort[a] > t.sort[b] ? 1 : 0));
          rank = [];
          order.forEach((i, r) => { rank[i] = r && t.sort[order[r - 1]] === t.sort[i] ? rank[order[r - 1]] : r; });
        }
        for (let i = 0; i < keys.length; i++) keys[i] = rank[t.at[i]];
      }
      this.ranks.set(column, keys);
      return keys;
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

    // The rows that a state shows, in its order, and per facet how many rows each of its values would show.
    select(state) {
      const n = this.count, wanted = state.q.toLowerCase().split(/\s+/).filter(Boolean);
      const words = wanted.length ? this.words() : null;
      const at = FACETS.map((f) => this.places(f));
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
      return { found: state.sort ? this.sorted(found, state.sort, state.down) : found, counts };
    }

    // The index of each row's word, in an array that is quick to read.
    places(column) {
      const name = `at ${column}`;
      if (!this.opened.has(name)) this.opened.set(name, new Int32Array(this.data.text[column].at));
      return this.opened.get(name);
    }

    // Ranks of a column's values, -1 for an empty field; equal values share one.
    ranked(column) {
      const name = `rank ${column}`;
      if (!this.opened.has(name)) {
        const keys = this.keys(column), values = keys.slice().sort();
        let size = 0, filled = values.length;
        // NaN sorts last
        while (filled && values[filled - 1] !== values[filled - 1]) filled--;
        for (let i = 0; i < filled; i++) if (!i || values[i] !== values[i - 1]) values[size++] = values[i];
        const rank = new Int32Array(keys.length).fill(-1);
        for (let i = 0; i < keys.length; i++) {
          if (keys[i] !== keys[i]) continue;
          let low = 0, high = size - 1;
          while (low < high) {
            const mid = (low + high) >> 1;
            if (values[mid] < keys[i]) low = mid + 1;
            else high = mid;
          }
          rank[i] = low;
        }
        this.opened.set(name, { rank, size });
      }
      return this.opened.get(name);
    }

    // 1 where a row's figures are no success: the attack did not implant, or the defense failed or ruined the model.
    voids() {
      if (!this.opened.has("voids")) {
        const { css, at } = this.data.text.status;
        const is = css.map((names) => /\b(weak|lost)\b/.test(names));
        const found = new Uint8Array(this.count);
        for (let i = 0; i < found.length; i++) if (is[at[i]]) found[i] = 1;
        this.opened.set("voids", found);
      }
      return this.opened.get("voids");
    }

    // Rows, given in their first order, by rank: contestants before controls and oracles; figures that are no success
    // after those that count, and empty fields last, in either direction.
    sorted(rows, column, down) {
      const { rank, size } = this.ranked(column), first = this.data.contestants, width = 2 * size + 1;
      const voids = this.metrics.has(column) ? this.voids() : new Uint8Array(this.count);
      const place = (i) => (i < first ? 0 : width) + (rank[i] < 0 ? 2 * size : voids[i] * size + (down ? size - 1 - rank[i] : rank[i]));
      const start = new Int32Array(2 * width + 1), order = new Array(rows.length);
      for (const i of rows) start[place(i) + 1]++;
      for (let k = 1; k < start.length; k++) start[k] += start[k - 1];
      for (const i of rows) order[start[place(i)]++] = i;
      return order;
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
      if (column === "rate") return t.sort[k] === null ? "" : String(t.sort[k]);
      return column === "status" ? t.sort[k] : String(t.values[k]);
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

  return { Cells, FACETS, IDENTITY, MAIN, PER_PAGE, percent, quote, span };
})();

if (typeof module !== "undefined") module.exports = cellTable;
else (() => {
  const { Cells, FACETS, MAIN, PER_PAGE } = cellTable;
  const table = document.getElementById("board"), box = document.getElementById("filters");
  if (!table || !box) return;
  const $ = (id) => document.getElementById(id);
  let cells = null, state = null, found = [], taken = false, waiting = null, timer = 0;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) if (v !== "" || k.startsWith("data-")) made.setAttribute(k, v);
    made.append(...children);
    return made;
  }

  const link = (column, i) => {
    const t = cells.data.text[column], k = t.at[i];
    return element("a", { href: t.hrefs[k] }, element("bdi", {}, t.values[k]));
  };

  function field(column, i) {
    const t = cells.data.text;
    if (column === "cell") {
      const named = [element("bdi", {}, cells.word("defense", i)), " against ", element("bdi", {}, cells.word("attack", i))];
      const role = cells.word("role", i);
      return element("th", { scope: "row" }, element("a", { href: `cells/${cells.page(i)}.html` }, ...named), ...(role ? [" ", element("span", { class: `badge ${role}` }, role)] : []));
    }
    if (column === "dataset" || column === "attack" || column === "defense") return element("td", {}, link(column, i));
    if (column === "status") {
      const k = t.status.at[i], badges = t.status.badges[k].flatMap((b) => [" ", element("span", { class: "badge" }, b)]);
      return element("td", { class: "status", "data-order": t.status.sort[k] }, t.status.words[k], ...badges);
    }
    if (column === "rate" || column === "seed") {
      const raw = t[column].sort[t[column].at[i]];
      return element("td", { class: "num", "data-order": raw === null ? "" : String(raw) }, String(cells.word(column, i)));
    }
    if (!cells.metrics.has(column)) return element("td", {}, String(cells.word(column, i)) || "none");
    const f = cells.figure(column, i);
    const td = element("td", { class: f.empty ? "empty" : "", "data-metric": column, "data-order": f.order, title: f.title }, f.text);
    if (f.note) td.append(" ", element("small", {}, f.note));
    return td;
  }

  function row(i) {
    const status = cells.data.text.status;
    const made = element("tr", { "data-cell": cells.name(i), "data-attack": cells.word("attack", i), "data-defense": cells.word("defense", i) });
    const css = status.css[status.at[i]];
    if (css) made.className = css;
    for (const c of state.columns) made.append(field(c, i));
    return made;
  }

  function legend(rows) {
    const words = new Set();
    for (const c of state.columns) if (cells.metrics.has(c)) for (const i of rows) { const why = cells.open(c).why[i]; if (why >= 0) words.add(cells.data.reasons[why][0]); }
    $("words").replaceChildren(...[...words].sort().map((w) => element("div", {}, element("dt", {}, w), element("dd", {}, cells.data.meanings[w] || "as the method or the engine worded it"))));
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    state.page = Math.min(state.page, pages);
    const rows = found.slice((state.page - 1) * PER_PAGE, state.page * PER_PAGE);
    const first = cells.data.contestants;
    const contestants = rows.filter((i) => i < first), others = rows.filter((i) => i >= first);
    const bodies = [];
    if (contestants.length) bodies.push(element("tbody", {}, ...contestants.map(row)));
    if (others.length) {
      const words = element("span", {}, "Controls and oracles: not contestants");
      const group = element("tr", { class: "group" }, element("th", { colspan: String(state.columns.length), scope: "rowgroup" }, words));
      bodies.push(element("tbody", { class: "controls" }, group, ...others.map(row)));
    }
    if (!rows.length) bodies.push(element("tbody", {}, element("tr", {}, element("td", { colspan: String(state.columns.length) }, "No cell fits these choices."))));
    for (const body of [...table.tBodies]) body.remove();
    table.append(...bodies);
    legend(rows);
    if (!taken && $("static-pages")) $("static-pages").hidden = true;
    taken = true;
    $("pager").hidden = pages < 2;
    $("page-now").textContent = `Page ${state.page} of ${pages}`;
    $("page-back").disabled = state.page <= 1;
    $("page-on").disabled = state.page >= pages;
  }

  function choose() {
    const { found: rows, counts } = cells.select(state);
    found = rows;
    for (const select of box.querySelectorAll("select[data-facet]")) {
      const f = select.dataset.facet, t = cells.data.text[f], count = counts[FACETS.indexOf(f)];
      for (const option of select.options) {
        const k = t.values.indexOf(option.value.slice(1));
        const text = `${t.values[k] || "none"} (${count[k]})`;
        if (option.value && option.textContent !== text) option.textContent = text;
      }
      select.value = f in state.facets ? `=${state.facets[f]}` : "";
    }
  }

  // What is chosen, drawn; rows are chosen again unless only the page or the columns changed.
  function show(same = false) {
    if (!same) choose();
    if ($("search").value !== state.q) $("search").value = state.q;
    for (const input of $("column-list").querySelectorAll("input")) input.checked = state.columns.includes(input.value);
    [...table.tHead.rows[0].cells].forEach((th, k) => { th.hidden = !state.columns.includes(cells.columns[k]); });
    window.sleeperbench.mark(table, cells.columns.indexOf(state.sort), state.down);
    $("shown").textContent = `${found.length} of ${cells.count} cells`;
    draw();
  }

  function change(how) {
    ready(() => {
      // What is being typed counts already, though its own turn has not come.
      const given = { ...(timer ? { q: $("search").value } : {}), ...how(state) };
      clearTimeout(timer);
      timer = 0;
      Object.assign(state, { page: 1 }, given);
      show(taken && !["q", "facets", "sort"].some((k) => k in given));
      const text = cells.format(state);
      history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    });
  }

  function save(name, kind, text) {
    const made = document.createElement("a");
    made.href = URL.createObjectURL(new Blob([text], { type: `${kind};charset=utf-8` }));
    made.download = name;
    made.click();
    setTimeout(() => URL.revokeObjectURL(made.href), 1000);
  }

  function fill() {
    for (const select of box.querySelectorAll("select[data-facet]")) {
      const t = cells.data.text[select.dataset.facet];
      const order = [...t.values.keys()].sort((a, b) => (t.sort[a] < t.sort[b] ? -1 : t.sort[a] > t.sort[b] ? 1 : 0));
      for (const k of order) {
        const option = new Option(t.values[k] || "none");
        option.value = `=${t.values[k]}`;
        select.add(option);
      }
    }
    [...table.tHead.rows[0].cells].forEach((th, k) => {
      const input = element("input", { type: "checkbox", value: cells.columns[k] });
      input.addEventListener("change", () => change((s) => {
        const on = [...$("column-list").querySelectorAll("input")].filter((x) => x.checked).map((x) => x.value);
        return { columns: on.length ? on : s.columns, page: s.page };
      }));
      // The words of the heading without its button for sorting.
      const words = [...th.childNodes].filter((x) => x.nodeName !== "BUTTON").map((x) => x.textContent).join("").trim();
      $("column-list").append(element("label", {}, input, ` ${words}`));
    });
  }

  // What the first sort and the first search need is worked out while the reader looks, a column at a time.
  function prepare() {
    const later = window.requestIdleCallback || ((f) => setTimeout(f, 20));
    const steps = [...cells.usual.map((c) => () => cells.ranked(c)), () => cells.words()];
    const step = () => { steps.shift()(); if (steps.length) later(step); };
    later(step);
  }

  // The page as it was made shows every column; those that are hidden at first are hidden here.
  function hideOff() {
    const heads = [...table.tHead.rows[0].cells], off = heads.map((th) => th.hasAttribute("data-off"));
    heads.forEach((th, k) => { th.hidden = off[k]; });
    for (const body of table.tBodies) for (const row of body.rows) if (row.cells.length === off.length) off.forEach((is, k) => { if (is) row.cells[k].hidden = true; });
    $("hidden-columns").hidden = !off.includes(true);
  }

  // The cells come as a script of their own, since a page opened from disk may not read files.
  function ready(then) {
    if (cells) return then();
    if (waiting) return waiting.push(then);
    waiting = [then];
    const script = document.createElement("script");
    script.src = table.dataset.source;
    script.addEventListener("load", () => {
      cells = new Cells(window.sleeperbenchCells);
      fill();
      state = cells.parse(location.hash.slice(1));
      if (cells.format(state)) show();
      else choose();
      table.dataset.ready = "true";
      for (const f of waiting) f();
      prepare();
    });
    script.addEventListener("error", () => { $("shown").textContent = "The cells could not be loaded: search and filters do not work here."; });
    document.head.append(script);
  }

  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change(() => ({ q: $("search").value })), 60);
  });
  for (const select of box.querySelectorAll("select[data-facet]")) {
    select.addEventListener("change", () => change((s) => {
      const facets = { ...s.facets };
      if (select.value) facets[select.dataset.facet] = select.value.slice(1);
      else delete facets[select.dataset.facet];
      return { facets };
    }));
  }
  window.sleeperbench.headings(table, (k, down) => change(() => ({ sort: cells.columns[k], down })));
  $("clear").addEventListener("click", () => change(() => ({ q: "", facets: {}, sort: "", down: false })));
  $("columns-usual").addEventListener("click", () => change((s) => ({ columns: [...cells.usual], page: s.page })));
  $("columns-all").addEventListener("click", () => change((s) => ({ columns: [...cells.columns], page: s.page })));
  $("columns-main").addEventListener("click", () => change((s) => ({ columns: cells.columns.filter((c) => (cells.metrics.has(c) ? MAIN.includes(c) : !cells.off.has(c))), page: s.page })));
  for (const [id, step] of [["page-back", -1], ["page-on", 1]]) {
    $(id).addEventListener("click", () => {
      change((s) => ({ page: s.page + step }));
      table.scrollIntoView();
    });
  }
  const everything = () => (taken ? found : cells.select(state).found);
  $("csv").addEventListener("click", () => ready(() => save("sleeperbench.csv", "text/csv", cells.csv(everything(), cells.filed(state.columns)))));
  $("bibtex").addEventListener("click", () => ready(() => save("sleeperbench.bib", "application/x-bibtex", cells.bibtex(everything()))));
  window.addEventListener("hashchange", () => ready(() => { state = cells.parse(location.hash.slice(1)); show(); }));
  box.hidden = false;
  hideOff();
  ready(() => {});
})();
