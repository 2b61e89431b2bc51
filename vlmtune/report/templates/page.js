"use strict";
// Theme, charts (zoom, values) and the filters of the gallery. All of it works on what the page
// already shows; without this script the page is whole, only still.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // --- theme: the system's, until the button says otherwise
  const button = document.getElementById("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colors`);
  };
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("vlmtune-theme", value);
      return localStorage.getItem("vlmtune-theme");
    } catch {
      return null; // a page from a file may have no storage
    }
  };
  const theme = remembered();
  if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered(root.dataset.theme);
    nameTheme();
  });
  nameTheme();

  // --- numbers, as figures.py writes them
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9 || size < 1e-3) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  };
  const write = (value, unit) => {
    if (unit === "share") return `${Number((100 * value).toPrecision(4))}\u00a0%`;
    if (unit === "bytes") return `${Number((value / 1e9).toPrecision(3))} GB`;
    return short(value);
  };
  const tickLabels = (values, unit) => {
    const [size, ending] = { share: [0.01, "\u00a0%"], bytes: [1e9, " GB"] }[unit] ?? [1, ""];
    const shown = values.map((value) => value / size);
    const close = shown.length > 1 ? Math.abs(shown[1] - shown[0]) / 100 : 0;
    return shown.map((value) => {
      if (Math.abs(value) <= close) return `0${ending}`;
      let digits = 1;
      while (digits < 17 && Math.abs(Number(value.toPrecision(digits)) - value) > close) digits++;
      const rounded = Number(value.toPrecision(digits));
      const isPlain = Math.abs(rounded) >= 1e-3 && Math.abs(rounded) < 1e6;
      return (isPlain ? rounded.toLocaleString("en", { maximumFractionDigits: 17 })
        : rounded.toExponential().replace("e+", "e")) + ending;
    });
  };
  const niceTicks = (low, high, wanted, smallest) => {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(smallest, [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999999) * power);
    const ticks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) ticks.push(n * step);
    return ticks;
  };
  const svgElement = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // --- charts: all share one view (a stretch of steps) and one cursor (a step)
  const charts = JSON.parse(document.getElementById("chart-data").textContent).map((data) => {
    const figure = document.getElementById(data.id);
    const find = (selector) => figure.querySelector(selector);
    const chart = { ...data, figure, plot: find(".plot"), box: find(".lines"), cursor: find(".cursor"),
      chosen: find(".chosen"), reset: find(".reset"), grid: find(".grid"), xAxis: find(".x-axis"),
      yAxis: find(".y-axis"), outputs: [...figure.querySelectorAll("output")],
      title: find("h3").textContent };
    chart.names = [...figure.querySelectorAll("li")].map((li) => li.childNodes[1].textContent.trim());
    chart.still = [chart.xAxis, chart.yAxis, chart.grid].map((part) => [...part.children]);
    chart.dense = data.lines.reduce((a, b) => (b.length > a.length ? b : a));
    return chart;
  });
  const full = charts.length ? charts[0].x : [0, 0];
  let view = full;

  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  const zoomed = () => view !== full;

  const visibleRange = (chart) => {
    if (!zoomed()) return chart.y;
    const values = chart.lines.flat().filter(([x]) => x >= view[0] && x <= view[1]).map(([, y]) => y);
    if (!values.length) return chart.y;
    const low = Math.min(...values), high = Math.max(...values);
    const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [low - margin, high + margin];
  };

  const draw = (chart) => {
    const [x0, x1] = view, [y0, y1] = visibleRange(chart), [X0, X1] = chart.x, [Y0, Y1] = chart.y;
    chart.reset.hidden = !zoomed();
    const across = 1000 / (X1 - X0 || 1), up = 1000 / (Y1 - Y0);
    const box = zoomed() ? [(x0 - X0) * across, (Y1 - y1) * up, (x1 - x0) * across, (y1 - y0) * up] : [0, 0, 1000, 1000];
    chart.plot.classList.toggle("zoomed", zoomed());
    chart.box.setAttribute("viewBox", box.join(" "));
    if (!zoomed()) {
      [chart.xAxis, chart.yAxis, chart.grid].forEach((part, i) => part.replaceChildren(...chart.still[i]));
      return;
    }
    const below = (y) => `${(100 * (y1 - y)) / (y1 - y0)}%`;
    const rows = niceTicks(y0, y1, 4, 0), labels = tickLabels(rows, chart.unit);
    chart.grid.replaceChildren(...rows.map((y) => svgElement("line", { x1: 0, x2: "100%", y1: below(y), y2: below(y) })));
    chart.yAxis.replaceChildren(...rows.map((y, i) =>
      svgElement("text", { x: "100%", y: below(y), dy: "0.32em", "text-anchor": "end" }, labels[i])));
    chart.xAxis.replaceChildren(...niceTicks(x0, x1, 5, 1).map((x) =>
      svgElement("text", { x: `${(100 * (x - x0)) / (x1 - x0)}%`, y: 14, "text-anchor": "middle" }, String(x))));
  };

  const zoomTo = (low, high) => {
    const [from, to] = [Math.max(full[0], low), Math.min(full[1], high)];
    const width = full[1] - full[0];
    if (to - from < Math.max(1, width / 500) && to - from < width) return; // no closer than a step
    view = to - from >= width ? full : [from, to];
    charts.forEach(draw);
    point(null);
  };
  const zoomBy = (factor, around) => zoomTo(around - (around - view[0]) * factor, around + (view[1] - around) * factor);

  const describe = (chart, step) => chart.lines.map((points, i) => {
    const [x, y] = step === null ? points[points.length - 1] : nearest(points, step);
    const text = write(y, chart.unit);
    return step !== null && x !== step ? `${text} (step ${x})` : text;
  });

  const point = (step) => {
    const left = `${(100 * (step - view[0])) / (view[1] - view[0] || 1)}%`;
    for (const chart of charts) {
      const inside = step !== null && step >= view[0] && step <= view[1];
      chart.cursor.setAttribute("visibility", inside ? "visible" : "hidden");
      if (inside) ["x1", "x2"].forEach((name) => chart.cursor.setAttribute(name, left));
      describe(chart, step).forEach((text, i) => { chart.outputs[i].textContent = text; });
    }
  };

  const stepAt = (chart, event) => {
    const { left, width } = chart.plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
    return view[0] + share * (view[1] - view[0]);
  };

  const listen = (chart) => {
    const { plot } = chart;
    let from = null, cursor = null;
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-roledescription", "chart");
    plot.setAttribute("aria-label", `${chart.title} over steps ${full[0]} to ${full[1]}. ` +
      "Left and right arrow read values, plus and minus zoom, 0 resets.");
    plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = stepAt(chart, event);
      if (event.pointerType === "mouse") plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      const at = stepAt(chart, event);
      cursor = nearest(chart.dense, at)[0];
      point(cursor);
      if (from === null) return;
      const [a, b] = [from, at].sort((p, q) => p - q).map((x) => (100 * (x - view[0])) / (view[1] - view[0]));
      chart.chosen.setAttribute("x", `${a}%`);
      chart.chosen.setAttribute("width", `${b - a}%`);
      chart.chosen.setAttribute("visibility", "visible");
    });
    const end = (event) => {
      chart.chosen.setAttribute("visibility", "hidden");
      const [a, b] = [from, stepAt(chart, event)].sort((p, q) => p - q);
      const isDrag = from !== null && b - a > (view[1] - view[0]) * 0.02;
      from = null;
      if (isDrag && event.type === "pointerup") zoomTo(a, b);
    };
    plot.addEventListener("pointerup", end);
    plot.addEventListener("pointercancel", end);
    plot.addEventListener("pointerleave", () => { if (from === null) point(null); });
    plot.addEventListener("dblclick", () => zoomTo(...full));
    plot.addEventListener("blur", () => point(null));
    plot.addEventListener("wheel", (event) => {
      if (document.activeElement !== plot) return; // else the page could not be scrolled past it
      event.preventDefault();
      zoomBy(event.deltaY < 0 ? 0.8 : 1.25, stepAt(chart, event));
    }, { passive: false });
    plot.addEventListener("keydown", (event) => {
      const middle = cursor ?? (view[0] + view[1]) / 2;
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (move) {
        const seen = chart.dense.filter(([x]) => x >= view[0] && x <= view[1]);
        if (!seen.length) return;
        const at = cursor === null ? -1 : seen.indexOf(nearest(seen, cursor));
        const next = cursor === null ? (move > 0 ? 0 : seen.length - 1) : at + move;
        cursor = seen[Math.min(seen.length - 1, Math.max(0, next))][0];
        point(cursor);
        document.getElementById("readout").textContent = `step ${cursor}: ` +
          describe(chart, cursor).map((text, i) => `${chart.names[i]} ${text}`).join(", ");
      } else if (event.key === "+" || event.key === "=") zoomBy(0.6, middle);
      else if (event.key === "-") zoomBy(1 / 0.6, middle);
      else if (event.key === "0" || event.key === "Escape") zoomTo(...full);
      else return;
      event.preventDefault();
    });
    chart.reset.addEventListener("click", () => { zoomTo(...full); plot.focus(); });
  };
  charts.forEach(listen);

  // --- gallery
  const form = document.querySelector(".filters");
  if (!form) return;
  const cards = [...document.querySelectorAll(".card")];
  const words = cards.map((card) => card.textContent.toLowerCase());
  const slice = document.getElementById("slice"), search = document.getElementById("search");
  const buttons = [...form.querySelectorAll("[data-outcomes]")];
  const more = document.getElementById("more"), PAGE = 24;
  let limit = PAGE;
  const filter = () => {
    const outcomes = buttons.find((b) => b.getAttribute("aria-pressed") === "true").dataset.outcomes;
    const text = search.value.trim().toLowerCase();
    const fit = cards.filter((card, i) =>
      (!outcomes || outcomes.split(" ").includes(card.dataset.outcome)) &&
      (!slice || !slice.value || card.dataset.slice === slice.value) && words[i].includes(text));
    const shown = new Set(fit.slice(0, limit));
    cards.forEach((card) => { card.hidden = !shown.has(card); });
    more.hidden = fit.length <= limit;
    more.textContent = `Show ${Math.min(PAGE, fit.length - limit)} more`;
    document.getElementById("num-shown").textContent = `${fit.length} of ${cards.length} match`;
    return fit;
  };
  const refilter = () => {
    limit = PAGE;
    filter();
  };
  for (const chosen of buttons) {
    chosen.addEventListener("click", () => {
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === chosen)));
      refilter();
    });
  }
  more.addEventListener("click", () => {
    limit += PAGE;
    const first = filter()[limit - PAGE];
    first.tabIndex = -1;
    first.focus({ preventScroll: true });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  if (slice) slice.addEventListener("change", refilter);
  search.addEventListener("input", refilter);
  refilter();
})();
