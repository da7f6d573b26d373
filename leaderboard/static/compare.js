// Defenses that the reader chooses, held against each other on the same attacked models. The page shows all pairs of small
// boards and a diagram of every board without it. What is chosen lives in the URL's hash. Text enters the page as text alone.
"use strict";

// What can be worked out without a page.
const pairing = (() => {
  const SAME = 1e-9;

  // Mean over seeds per attack setting of the models that all of `chosen` have a score on: [setting, [mean of each]].
  function bySetting(group, chosen) {
    const sums = new Map();
    group.units.forEach(([setting], u) => {
      const scores = chosen.map((d) => group.scores[d][u]);
      if (scores.some((s) => s === null)) return;
      const at = sums.get(setting) || { n: 0, of: chosen.map(() => 0) };
      at.n += 1;
      scores.forEach((s, i) => { at.of[i] += s; });
      sums.set(setting, at);
    });
    return [...sums].sort((a, b) => a[0] - b[0]).map(([setting, at]) => [setting, at.of.map((s) => s / at.n)]);
  }

  // Ranks by mean score, 1 the best, ties shared, averaged over settings.
  function averageRanks(lines, count) {
    const ranks = Array(count).fill(0);
    for (const [, means] of lines) {
      means.forEach((m, i) => {
        const above = means.filter((x) => x > m + SAME).length, level = means.filter((x) => Math.abs(x - m) <= SAME).length;
        ranks[i] += (above + (level + 1) / 2) / lines.length;
      });
    }
    return ranks;
  }

  // Nemenyi's critical difference; `q` is the 95 % point of the range of k standard normal figures.
  const critical = (q, k, n) => (q / Math.SQRT2) * Math.sqrt((k * (k + 1)) / (6 * n));

  // Place of a pair i < j among all pairs of n defenses, in the order in which they are packed.
  const place = (i, j, n) => (i * (2 * n - i - 1)) / 2 + (j - i - 1);

  // Difference of defense a minus b with its interval, or null.
  function pair(group, a, b) {
    const [i, j] = a < b ? [a, b] : [b, a], found = group.pairs[place(i, j, group.names.length)];
    if (!found || !found.length) return null;
    const [value, low, high, kind] = found;
    return a < b ? { value, low, high, kind } : { value: -value, low: -high, high: -low, kind };
  }

  function parse(data, hash) {
    const given = new URLSearchParams(hash), at = Number(given.get("board") || 0);
    const group = Number.isInteger(at) && at >= 0 && at < data.groups.length ? at : 0;
    const names = data.groups.length ? data.groups[group].names : [];
    const listed = given.getAll("defense").map((n) => names.indexOf(n)).filter((i) => i >= 0);
    return { group, chosen: [...new Set(listed)].slice(0, data.most) };
  }

  function format(data, state) {
    const given = new URLSearchParams();
    if (state.group) given.set("board", String(state.group));
    for (const d of state.chosen) given.append("defense", data.groups[state.group].names[d]);
    return given.toString();
  }

  // Of every model that both have a score on: 1 won, -1 lost, 0 even; a failure loses a tie against what is none.
  function duels(group, a, b) {
    const found = [];
    group.units.forEach((_, u) => {
      const x = group.scores[a][u], y = group.scores[b][u];
      if (x === null || y === null) return;
      found.push(Math.abs(x - y) > SAME ? Math.sign(x - y) : group.lost[b].includes(u) - group.lost[a].includes(u));
    });
    return found;
  }

  const points = (x) => `${(100 * x).toFixed(1)} points`;
  const percent = (x) => `${(100 * x).toFixed(1)} %`;
  const span = (p) => (p.kind === "single" ? "1 model" : `${p.kind === "range" ? "range " : ""}${(100 * p.low).toFixed(1)} to ${(100 * p.high).toFixed(1)}`);

  return { averageRanks, bySetting, critical, duels, format, pair, parse, percent, place, points, span };
})();

if (typeof module !== "undefined") module.exports = pairing;
else (() => {
  const box = document.getElementById("compare");
  if (!box) return;
  const $ = (id) => document.getElementById(id);
  let data = null, state = null;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
    made.append(...children);
    return made;
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, String(v));
    made.append(...children);
    return made;
  }

  const link = (g, d) => element("a", { href: g.hrefs[d] }, element("bdi", {}, g.names[d]));

  function table(id, caption, heads, rows) {
    const head = element("thead", {}, element("tr", {}, ...heads.map(([text, css]) => element("th", css ? { scope: "col", class: css } : { scope: "col" }, text))));
    const made = element("table", { id }, element("caption", { id: `${id}-caption` }, caption), head, element("tbody", {}, ...rows));
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": `${id}-caption` }, made);
  }

  const number = (...children) => element("td", { class: "num" }, ...children);

  function pairs(g, chosen) {
    const rows = [];
    chosen.forEach((a, i) => chosen.slice(i + 1).forEach((b) => {
      const p = pairing.pair(g, a, b);
      const duels = pairing.duels(g, a, b), won = duels.filter((x) => x > 0).length, lost = duels.filter((x) => x < 0).length;
      rows.push(element("tr", {}, element("th", { scope: "row" }, link(g, a)), element("td", {}, link(g, b)),
        number(...(p ? [pairing.points(p.value), " ", element("small", {}, pairing.span(p))] : ["no common model"])),
        number(String(duels.length)), number(String(won)), number(String(lost)), number(String(duels.length - won - lost))));
    }));
    return table("compared", `${g.score} of the first minus the second, in percentage points, with its 95 % t interval over seeds within attacks, or the range with fewer than 3 seeds`,
      [["First"], ["Second"], ["Difference", "num"], ["Attacked models", "num"], ["Won", "num"], ["Lost", "num"], ["Even", "num"]], rows);
  }

  function units(g, chosen) {
    const rows = g.units.map(([setting, seed], u) => {
      const scores = chosen.map((d) => g.scores[d][u]);
      const fields = scores.map((s, i) => {
        const page = g.pages[chosen[i]].slice(12 * u, 12 * u + 12), text = s === null ? "no score" : pairing.percent(s);
        const made = number(page.startsWith("-") ? text : element("a", { href: `cells/${page}.html` }, text));
        if (g.lost[chosen[i]].includes(u)) {
          made.classList.add("lost");
          made.append(" ", element("small", {}, "failed or collapsed"));
        }
        return made;
      });
      const gaps = scores.slice(1).map((s) => number(s === null || scores[0] === null ? "none" : pairing.points(s - scores[0])));
      return element("tr", {}, element("th", { scope: "row" }, element("bdi", {}, g.settings[setting])), number(String(seed)), ...fields, ...gaps);
    });
    const names = chosen.map((d) => [g.names[d], "num"]);
    const gaps = chosen.slice(1).map((d) => [`${g.names[d]} minus ${g.names[chosen[0]]}`, "num"]);
    return table("compared-units", `${g.score} per attack and seed, and its difference to the first that was chosen`, [["Attack"], ["Seed", "num"], ...names, ...gaps], rows);
  }

  function means(g, chosen) {
    const rows = g.metrics.map(([label, page], m) => element("tr", {}, element("th", { scope: "row" }, element("a", { href: page }, label)),
      ...chosen.map((d) => {
        const [text, note] = g.means[d][m];
        return number(text, ...(note ? [" ", element("small", {}, note)] : []));
      })));
    return table("compared-means", "Headline means over attack settings of means over seeds", [["Metric"], ...chosen.map((d) => [g.names[d], "num"])], rows);
  }

  function diagram(g, chosen) {
    const lines = pairing.bySetting(g, chosen), k = chosen.length;
    if (g.unranked || lines.length < 2) return element("p", { class: "note" }, g.unranked || "No diagram: it needs two attack settings that all of them have a score under.");
    const ranks = pairing.averageRanks(lines, k), cd = pairing.critical(data.q[k], k, lines.length);
    const at = (r) => 170 + (300 * (r - 1)) / (k - 1), order = chosen.map((d, i) => ({ d, r: ranks[i] })).sort((a, b) => a.r - b.r || a.d - b.d);
    const half = Math.ceil(k / 2), height = 100 + 17 * half, drawn = [svg("title", { id: "compared-cd-title" }, `Average ranks by ${g.score} over ${lines.length} attack settings`)];
    drawn.push(svg("path", { class: "axis", fill: "none", d: "M170 58H470" }));
    for (let r = 1; r <= k; r++) drawn.push(svg("path", { class: "axis", fill: "none", d: `M${at(r)} 53v5` }), svg("text", { class: "tick", x: at(r), y: 49, "text-anchor": "middle" }, String(r)));
    drawn.push(svg("path", { class: "axis", fill: "none", d: `M170 16v8m0 -4H${at(1 + Math.min(cd, k - 1))}m0 -4v8` }), svg("text", { class: "tick", x: 170, y: 11 }, `critical difference ${cd.toFixed(2)}`));
    let last = -1, bars = 0;
    order.forEach((o, i) => {
      let j = i;
      while (j + 1 < k && order[j + 1].r - o.r <= cd) j++;
      if (j > Math.max(i, last)) {
        drawn.push(svg("path", { class: "clique", fill: "none", d: `M${at(o.r) - 3} ${67 + 6 * bars}H${at(order[j].r) + 3}` }));
        [last, bars] = [j, bars + 1];
      }
    });
    order.forEach((o, i) => {
      const left = i < half, y = 96 + 17 * (left ? i : k - 1 - i), x = left ? 160 : 480;
      drawn.push(svg("a", { href: g.hrefs[o.d] }, svg("title", {}, `${g.names[o.d]}: average rank ${o.r.toFixed(2)} of ${k}`),
        svg("path", { class: "leader", fill: "none", d: `M${at(o.r)} 58V${y - 4}H${x}` }),
        svg("text", { class: "label", x: left ? x - 4 : x + 4, y, "text-anchor": left ? "end" : "start" }, g.names[o.d].length > 22 ? `${g.names[o.d].slice(0, 21)}…` : g.names[o.d])));
    });
    const picture = svg("svg", { class: "chart", viewBox: `0 0 640 ${height}`, role: "group", "aria-labelledby": "compared-cd-title" }, ...drawn);
    const shared = g.units.filter((_, u) => chosen.every((d) => g.scores[d][u] !== null)).length;
    const left = shared < g.units.length ? ` Over the ${shared} of ${g.units.length} attacked models that all of them have a score on.` : "";
    const words = `Critical-difference diagram (Demsar 2006) of the chosen: ranks by the mean over seeds, averaged over ${lines.length} attack settings; a bar joins defenses nearer than Nemenyi's critical difference at 5 %.${left}`;
    return element("figure", {}, element("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "compared-cd-title" }, picture), element("figcaption", {}, words));
  }

  function show() {
    const g = data.groups[state.group], chosen = state.chosen;
    $("compare-group").value = String(state.group);
    const full = chosen.length >= data.most;
    $("compare-names").replaceChildren(...g.names.map((name, d) => {
      const input = element("input", { type: "checkbox", "data-defense": name });
      input.checked = chosen.includes(d);
      input.disabled = full && !input.checked;
      input.addEventListener("change", () => {
        state.chosen = input.checked ? [...chosen, d] : chosen.filter((x) => x !== d);
        store();
        const again = [...$("compare-names").querySelectorAll("input")][d];
        if (again) again.focus();
      });
      return element("label", {}, input, " ", element("bdi", {}, name));
    }));
    $("compare-said").textContent = chosen.length < 2 ? `${chosen.length} chosen; choose at least 2.` : `${chosen.length} chosen${full ? ", which is the most" : ""}.`;
    const parts = chosen.length < 2 ? [] : [element("h2", {}, g.title), pairs(g, chosen), diagram(g, chosen), units(g, chosen), means(g, chosen)];
    $("compare-result").replaceChildren(...parts);
  }

  function store() {
    const hash = pairing.format(data, state);
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname.split("/").pop() || "#");
    show();
  }

  const source = element("script", { src: box.dataset.source });
  source.addEventListener("load", () => {
    data = window.sleeperbenchCompare;
    if (!data || !data.groups.length) return;
    $("compare-group").replaceChildren(...data.groups.map((g, i) => element("option", { value: String(i) }, g.title)));
    $("compare-group").addEventListener("change", () => {
      state = { group: Number($("compare-group").value), chosen: [] };
      store();
    });
    const read = () => {
      state = pairing.parse(data, location.hash.slice(1));
      show();
    };
    window.addEventListener("hashchange", read);
    read();
    box.hidden = false;
  });
  document.head.append(source);
})();
