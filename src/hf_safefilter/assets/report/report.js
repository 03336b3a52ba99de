"use strict";
// Rows are shown with textContent only: nothing in them is ever parsed as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const PAGE = 20;
  const COLUMNS = 3;
  const LONG = 320; // characters of a response shown before it is folded
  const count = data.shown.length;
  const number = (n) => n.toLocaleString("en");
  const element = (tag, attributes = {}, text = null, space = null) => {
    const made = space ? document.createElementNS(space, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== null) made.textContent = text;
    return made;
  };
  const svg = (tag, attributes, text) => element(tag, attributes, text, SVG);

  // Scores exactly as in the dataset: float32, little-endian.
  const decode = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: count }, (_, i) => view.getFloat32(4 * i, true));
  };
  const scores = Object.fromEntries(data.columns.map((name) => [name, decode(data.values[name])]));
  const shorten = (x) => (Number.isNaN(x) ? "–" : String(Number(x.toPrecision(3))));
  const searchable = data.prompts.map((p, i) => (data.shown[i] + " " + p + " " + data.responses[i]).toLowerCase());

  // A page that holds the riskiest rows of a larger set can cut by the score that they were chosen by, no other.
  const truncated = count < data.rows;
  const state = { by: data.by, threshold: 0, sort: data.by, descending: true, page: 0, query: "", which: "all" };
  const finite = () => scores[state.by].filter((x) => !Number.isNaN(x));
  let sorted = []; // scores in the page, highest first
  let low = 0, high = 1; // what the histogram and the slider span

  // What a chart spans, of sorted values: a few extreme rows stand at its edge.
  const span = (values) => {
    const tail = Math.floor(0.002 * values.length);
    return [values[tail], values[values.length - 1 - tail]];
  };

  // The shortest decimal t with below < t <= above, so that the snippet does what the page shows.
  const between = (below, above) => {
    for (let digits = 2; digits < 17; digits += 1) {
      for (const t of [Number(above.toPrecision(digits)), Number(((above + below) / 2).toPrecision(digits))]) {
        if (t > below && t <= above) return t;
      }
    }
    return above;
  };
  const removed = (i) => scores[state.by][i] >= state.threshold;
  const goes = () => sorted.filter((x) => x >= state.threshold).length;

  const setTop = (k) => {
    const n = Math.max(0, Math.min(sorted.length, k));
    if (n === 0) state.threshold = between(sorted[0], sorted[0] + Math.max(1e-6, Math.abs(sorted[0])));
    else if (n === sorted.length) state.threshold = sorted[n - 1];
    else state.threshold = sorted[n - 1] > sorted[n] ? between(sorted[n], sorted[n - 1]) : sorted[n - 1];
  };

  const chooseScore = (name) => {
    state.by = name;
    sorted = Array.from(finite()).sort((a, b) => b - a);
    [low, high] = span(sorted).reverse();
    const constant = sorted[0] === sorted[sorted.length - 1]; // equal rows go or stay together: begin with none
    setTop(constant ? 0 : Math.round(0.1 * data.scored));
  };

  const drawHistogram = () => {
    const width = 800, height = 190, left = 8, right = 8, base = 160;
    const wide = high - low || 1;
    const bins = new Array(60).fill(0);
    const bin = (x) => Math.max(0, Math.min(59, Math.floor(((x - low) / wide) * 60)));
    for (const x of sorted) bins[bin(x)] += 1;
    const tallest = Math.max(...bins);
    const x = (v) => left + ((v - low) / wide) * (width - left - right);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    const title = `Histogram of ${state.by} from ${shorten(sorted[sorted.length - 1])} to ${shorten(sorted[0])}; rows at or over ${state.threshold} would go`;
    picture.append(svg("title", {}, title));
    bins.forEach((n, i) => {
      const middle = low + ((i + 0.5) / 60) * wide;
      const tall = n ? Math.max(1, (n / tallest) * (base - 10)) : 0;
      picture.append(svg("rect", {
        class: middle >= state.threshold ? "removed" : "kept",
        x: x(low + (i / 60) * wide) + 0.5, y: base - tall, width: (width - left - right) / 60 - 1, height: tall,
      }));
    });
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: base, y2: base }));
    for (let i = 0; i <= 4; i += 1) {
      const v = low + (i / 4) * wide;
      const anchor = i === 0 ? "start" : i === 4 ? "end" : "middle";
      const beyond = i === 0 && sorted[sorted.length - 1] < low ? "≤ " : i === 4 && sorted[0] > high ? "≥ " : "";
      picture.append(svg("text", { x: x(v), y: base + 18, "text-anchor": anchor }, beyond + shorten(v)));
    }
    const cut = Math.max(left, Math.min(width - right, x(state.threshold)));
    picture.append(svg("line", { class: "cut", x1: cut, x2: cut, y1: 4, y2: base }));
    $("histogram").replaceChildren(picture);
  };

  const python = (text) => JSON.stringify(text); // a JSON string is a Python string, too
  const showThreshold = (keep = null) => {
    const gone = goes();
    $("threshold").value = high > low ? Math.round(((state.threshold - low) / (high - low)) * 1000) : 0;
    $("threshold").setAttribute("aria-valuetext", `${state.threshold}, ${number(gone)} rows removed`);
    if (keep !== $("share")) $("share").value = Number(((100 * gone) / data.scored).toFixed(2));
    $("counts").textContent =
      `${number(gone)} rows removed, ${number(data.rows - gone)} kept, at ${state.by} ≥ ${state.threshold}` +
      (data.rows > data.scored ? ` (rows without a score stay)` : "");
    const unscored = data.rows > data.scored ? ', unscored="keep"' : "";
    $("snippet").textContent =
      "from hf_safefilter import filter_risky\n\n" +
      `clean = filter_risky(scored, threshold=${state.threshold}, by=${python(state.by)}${unscored})  # ${gone} of ${data.rows} rows removed`;
    drawHistogram();
    if ($("scatter")) drawScatter();
    state.page = state.which === "all" ? state.page : 0;
    showRows();
  };

  const order = () => {
    const rows = [];
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    for (let i = 0; i < count; i += 1) {
      if (state.which === "removed" && !removed(i)) continue;
      if (state.which === "kept" && removed(i)) continue;
      if (words.every((word) => searchable[i].includes(word))) rows.push(i);
    }
    const sign = state.descending ? -1 : 1;
    const key = state.sort === "row" ? (i) => data.shown[i] : (i) => scores[state.sort][i];
    return rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || data.shown[a] - data.shown[b];
      return sign * (x - y) || data.shown[a] - data.shown[b]; // ties in dataset order, as select_risky does
    });
  };

  const textCell = (i) => {
    const cell = element("td", { class: "text" });
    if (data.prompts[i]) cell.append(element("span", { class: "prompt", dir: "auto" }, data.prompts[i]));
    const response = data.responses[i];
    if (response.length <= LONG) cell.append(element("span", { class: "response", dir: "auto" }, response));
    else cell.append(folded(response));
    if (data.heat[i]) cell.append(heat(...data.heat[i]));
    return cell;
  };

  const folded = (response) => {
    const fold = element("details", { class: "long" });
    const summary = element("summary", { dir: "auto" });
    summary.append(element("span", { class: "excerpt" }, response.slice(0, LONG).replace(/\s+/g, " ") + "… "));
    summary.append(element("span", { class: "more" }));
    fold.append(summary);
    fold.append(element("span", { class: "response", dir: "auto" }, response));
    return fold;
  };

  // Tokens shaded by what they add to the row's gradient score; made when it is opened.
  const heat = (tokens, shades) => {
    const fold = element("details", { class: "heat" });
    fold.append(element("summary", {}, "tokens behind the score"));
    fold.addEventListener("toggle", () => {
      if (fold.childElementCount > 1) return;
      const text = element("span", { class: "response", dir: "auto" });
      tokens.forEach((token, t) => {
        if (shades[t] === 0) text.append(document.createTextNode(token));
        else text.append(element("mark", { class: shades[t] > 0 ? `up${shades[t]}` : `down${-shades[t]}` }, token));
      });
      fold.append(text, element("span", { class: "key" }, "darker: a larger share of this row's score; orange raises it, blue lowers it"));
    });
    return fold;
  };

  const showRows = () => {
    const rows = order();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    state.page = Math.max(0, Math.min(pages - 1, state.page));
    const before = columns;
    columns = inTable();
    if (columns !== before) makeHead(); // else what has the focus keeps it
    const body = $("table").tBodies[0];
    body.replaceChildren(...rows.slice(state.page * PAGE, (state.page + 1) * PAGE).map((i) => {
      const line = element("tr", { class: removed(i) ? "removed" : "kept" });
      line.append(element("td", { "data-name": "row" }, String(data.shown[i])));
      for (const name of columns) line.append(element("td", { "data-name": name }, shorten(scores[name][i])));
      line.append(textCell(i));
      return line;
    }));
    $("found").textContent = `${number(rows.length)} of ${number(count)} rows`;
    $("page").textContent = `page ${number(state.page + 1)} of ${number(pages)}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page === pages - 1;
    for (const head of $("table").tHead.querySelectorAll("th[data-sort]")) {
      const mine = head.dataset.sort === state.sort;
      head.setAttribute("aria-sort", mine ? (state.descending ? "descending" : "ascending") : "none");
      head.firstChild.textContent = head.dataset.sort.replace(/^risk_/, "") + (mine ? (state.descending ? " ▼" : " ▲") : "");
    }
    $("sort").value = `${state.sort}/${state.descending ? "down" : "up"}`;
  };

  // A few scores in the table, so that there is room for the text: what is cut by, what is sorted by, then the first ones.
  let columns = [];
  const inTable = () => {
    const needed = [state.by, ...(state.sort === "row" ? [] : [state.sort])];
    if (needed.every((name) => columns.includes(name))) return columns; // no reason to move anything
    const chosen = new Set(Array.from(new Set([...needed, ...data.columns])).slice(0, COLUMNS));
    return data.columns.filter((name) => chosen.has(name));
  };

  const makeHead = () => {
    const line = element("tr");
    for (const name of ["row", ...columns]) {
      const cell = element("th", { scope: "col", "data-sort": name, title: name });
      const button = element("button", { type: "button" }, name);
      button.addEventListener("click", () => {
        state.descending = state.sort === name ? !state.descending : name !== "row";
        state.sort = name;
        state.page = 0;
        showRows();
      });
      cell.append(button);
      line.append(cell);
    }
    line.append(element("th", { scope: "col", class: "text" }, "prompt and response"));
    $("table").tHead.replaceChildren(line);
  };

  const makeSort = () => {
    for (const name of [...data.columns, "row"]) {
      $("sort").append(element("option", { value: `${name}/down` }, `${name}, highest first`));
      $("sort").append(element("option", { value: `${name}/up` }, `${name}, lowest first`));
    }
  };

  const drawScatter = () => {
    const [a, b] = [$("across").value, $("up").value];
    const size = 460, edge = 58;
    const both = [];
    for (let i = 0; i < count; i += 1) if (!Number.isNaN(scores[a][i]) && !Number.isNaN(scores[b][i])) both.push(i);
    const range = (name) => {
      const values = both.map((i) => scores[name][i]).sort((p, q) => p - q);
      const [from, to] = span(values);
      return [from, to - from || 1];
    };
    const [lowA, spanA] = range(a), [lowB, spanB] = range(b);
    const place = (v, from, wide) => Math.max(0, Math.min(1, (v - from) / wide)) * (size - edge - 8);
    const x = (v) => (edge + place(v, lowA, spanA)).toFixed(1);
    const y = (v) => (size - edge - place(v, lowB, spanB)).toFixed(1);
    const picture = svg("svg", { viewBox: `0 0 ${size} ${size}`, role: "img" });
    picture.append(svg("title", {}, `${b} against ${a}, one point a row`));
    picture.append(svg("path", { class: "axis", fill: "none", d: `M${edge} 8V${size - edge}H${size - 8}` }));
    // One path for all points: ten thousand elements would be slow.
    const dots = (rows) => rows.map((i) => `M${x(scores[a][i])} ${y(scores[b][i])}h0`).join("");
    picture.append(svg("path", { class: "dots", d: dots(both.filter((i) => !removed(i))) }));
    picture.append(svg("path", { class: "dots over", d: dots(both.filter(removed)) }));
    if (both.length) {
      picture.append(svg("text", { x: edge, y: size - edge + 18 }, shorten(lowA)));
      picture.append(svg("text", { x: size - 8, y: size - edge + 18, "text-anchor": "end" }, shorten(lowA + spanA)));
      picture.append(svg("text", { x: edge - 5, y: size - edge, "text-anchor": "end" }, shorten(lowB)));
      picture.append(svg("text", { x: edge - 5, y: 18, "text-anchor": "end" }, shorten(lowB + spanB)));
    }
    picture.append(svg("text", { x: (size + edge) / 2, y: size - 8, "text-anchor": "middle" }, a));
    picture.append(svg("text", { transform: `translate(12 ${(size - edge) / 2}) rotate(-90)`, "text-anchor": "middle" }, b));
    $("scatter").replaceChildren(picture);
    const rho = data.correlations[data.columns.indexOf(a)][data.columns.indexOf(b)];
    $("correlation").textContent =
      rho === null ? "No rank correlation: a score is constant." : `Spearman's rank correlation over all rows: ${rho.toFixed(2)}`;
  };

  const drawHistory = () => {
    const checks = data.history.filter((e) => typeof e.eval_refusal_rate === "number");
    const width = 800, height = 220, left = 40, base = 180;
    const last = Math.max(1, ...data.history.map((e) => e.step));
    const x = (s) => left + (s / last) * (width - left - 12);
    const y = (r) => base - r * (base - 12);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    picture.append(svg("title", {}, "Share refused by training step: harmful prompts (solid), harmless look-alikes (dashed)"));
    for (const r of [0, 0.5, 1]) {
      picture.append(svg("line", { class: "axis", x1: left, x2: width - 12, y1: y(r), y2: y(r) }));
      picture.append(svg("text", { x: left - 6, y: y(r) + 4, "text-anchor": "end" }, `${100 * r}%`));
    }
    const curve = (name, extra) => {
      const points = checks.filter((e) => typeof e[name] === "number").map((e) => `${x(e.step)},${y(e[name])}`);
      if (points.length) picture.append(svg("polyline", { class: `curve ${extra}`, points: points.join(" ") }));
    };
    curve("eval_refusal_rate", "");
    curve("eval_refusal_rate_benign", "second");
    picture.append(svg("text", { x: left, y: base + 18 }, "step 0"));
    picture.append(svg("text", { x: width - 12, y: base + 18, "text-anchor": "end" }, `step ${last}`));
    $("history").replaceChildren(picture);
  };

  const start = () => {
    for (const name of truncated ? [data.by] : data.columns) $("score").append(element("option", {}, name));
    makeSort();
    chooseScore(data.by);
    if ($("scatter")) {
      for (const name of data.columns) {
        $("across").append(element("option", {}, name));
        $("up").append(element("option", {}, name));
      }
      $("up").value = data.columns[1];
      for (const id of ["across", "up"]) $(id).addEventListener("change", drawScatter);
    }
    if (data.history) drawHistory();
    $("score").addEventListener("change", (e) => {
      chooseScore(e.target.value);
      showThreshold();
    });
    $("threshold").addEventListener("input", (e) => {
      const wanted = low + (Number(e.target.value) / 1000) * (high - low);
      setTop(sorted.filter((x) => x >= wanted).length);
      showThreshold();
    });
    $("share").addEventListener("input", (e) => {
      const share = Number(e.target.value);
      if (e.target.value === "" || !(share >= 0 && share <= 100)) return;
      setTop(Math.round((share / 100) * data.scored));
      showThreshold(e.target);
    });
    $("search").addEventListener("input", (e) => {
      state.query = e.target.value;
      state.page = 0;
      showRows();
    });
    $("which").addEventListener("change", (e) => {
      state.which = e.target.value;
      state.page = 0;
      showRows();
    });
    $("sort").addEventListener("change", (e) => {
      const cut = e.target.value.lastIndexOf("/");
      state.sort = e.target.value.slice(0, cut);
      state.descending = e.target.value.slice(cut + 1) === "down";
      state.page = 0;
      showRows();
    });
    for (const [id, step] of [["previous", -1], ["next", 1]]) {
      $(id).addEventListener("click", () => {
        state.page += step;
        showRows();
      });
    }
    $("copy").addEventListener("click", () => {
      const range = document.createRange();
      range.selectNodeContents($("snippet"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      const done = () => { $("copy").textContent = "Copied"; };
      // A page from a file may not be allowed to use the clipboard: then the lines are at least selected.
      if (navigator.clipboard) navigator.clipboard.writeText($("snippet").textContent).then(done, () => {});
    });
    showThreshold();
  };
  start();
})();
