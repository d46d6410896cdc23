"use strict";
// Draws each chart in its place, in the colours of the page's theme, and again when the theme changes.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("chart-specs");
  const columns = read("head-columns");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let drawn = [];

  // A row a head from the columns: its place follows from its position.
  const heads = columns.scores[Object.keys(columns.scores)[0]].map((_, position) => {
    const [layer, index] = [Math.floor(position / columns.n_heads), position % columns.n_heads];
    return { head: `${layer}-${index}`, layer, index };
  });
  const byName = new Map(heads.map((row) => [row.head, row]));
  for (const [name, values] of Object.entries(columns.scores)) {
    values.forEach((value, position) => { heads[position][name] = value; });
  }
  columns.best_first.forEach((head, position) => { byName.get(head).rank = position + 1; });
  const marks = Object.keys(columns).filter((name) => Array.isArray(columns[name]) && name !== "best_first");
  for (const mark of marks) {
    columns[mark].forEach((head) => { byName.get(head)[mark] = true; });
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A string such as "--attack" in a specification stands for the page's custom property of that name.
  const resolved = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(resolved);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, key === "values" ? inner : resolved(inner)]));
  };

  const config = () => {
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 };
    const soft = { labelColor: colour("--ink-soft"), titleColor: colour("--ink-soft") };
    return {
      background: "transparent", font, view: { stroke: null }, padding: 2,
      axis: {
        ...text, ...soft, gridColor: colour("--grid"), domainColor: colour("--line"), tickColor: colour("--line"),
        titlePadding: 8, labelPadding: 5,
      },
      legend: { ...text, labelColor: colour("--ink"), titleColor: colour("--ink-soft"), rowPadding: 3, offset: 10 },
      text: { font },
    };
  };

  const draw = async (place, spec) => {
    const full = { ...resolved(spec), datasets: { ...(spec.datasets ?? {}), heads } };
    const options = {
      mode: "vega-lite", renderer: "svg", actions: false, config: config(),
      // Interprets expressions instead of compiling them, so that the page's policy can forbid eval.
      ast: true, tooltip: { theme: "none" },
    };
    try {
      const result = await window.vegaEmbed(place, full, options);
      result.view.addEventListener("click", (_, item) => {
        if (item?.datum?.head) document.dispatchEvent(new CustomEvent("head-chosen", { detail: item.datum.head }));
      });
      return result;
    } catch (error) {
      place.textContent = `This figure could not be drawn (${error.message}); its numbers are in the tables.`;
      console.error(error);
      return null;
    }
  };

  const drawAll = async () => {
    drawn.forEach((result) => result && result.finalize());
    drawn = [];
    for (const place of document.querySelectorAll("[data-chart]")) {
      drawn.push(await draw(place, specs[place.dataset.chart]));
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  };

  dark.addEventListener("change", drawAll);
  drawAll();
})();
