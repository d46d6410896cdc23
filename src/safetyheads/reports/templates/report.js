"use strict";
// Draws each chart in its place, in the colours of the page's theme and as wide as its place, and again when these change.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("chart-specs");
  const columns = read("head-columns");
  const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
  const MOST_COLUMNS = 3;
  const GAP = 20;
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

  // A string such as "--attack" in a specification stands for the page's custom property of that name; names of what was
  // measured, which may look like one, stand under these keys only.
  const NAMES = new Set(["datasets", "domain", "sort", "values", "title", "description"]);
  const resolved = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(resolved);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, NAMES.has(key) ? inner : resolved(inner)]));
  };

  // The longest name of a series: legends have as many columns as there is room for it.
  const longestName = (value) => {
    if (value === null || typeof value !== "object") return 0;
    const own = value.legend && Array.isArray(value.scale?.domain) ? value.scale.domain : [];
    return Math.max(0, ...own.map((name) => String(name).length), ...Object.values(value).map(longestName));
  };

  // Titles below the plots, in as many lines as the room beside the labels takes in the page's own font.
  const pen = document.createElement("canvas").getContext("2d");
  const wrapTitles = (layers, panel) => {
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const labels = Math.max(40, ...layers.map(({ encoding }) => encoding.y?.axis?.labelLimit ?? 0));
    for (const { x } of layers.map(({ encoding }) => encoding).filter(({ x }) => x?.title)) {
      const [first, ...words] = [x.title].flat().join(" ").split(" ");
      x.title = [first];
      for (const word of words) {
        const longer = `${x.title.at(-1)} ${word}`;
        if (pen.measureText(longer).width > panel - labels - 30) x.title.push(word);
        else x.title[x.title.length - 1] = longer;
      }
    }
  };

  const config = (spec, width, panel, excess) => {
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 };
    const soft = { labelColor: colour("--ink-soft"), titleColor: colour("--ink-soft") };
    const { datasets, ...look } = spec;
    const columnsOfLegend = Math.max(1, Math.floor((width - 20) / (34 + 7 * longestName(look))));
    return {
      background: colour("--paper"), font, view: { stroke: null }, padding: 2,
      axis: {
        ...text, ...soft, gridColor: colour("--grid"), domainColor: colour("--line"), tickColor: colour("--line"),
        titlePadding: 8, labelPadding: 5,
      },
      axisX: { labelBound: true },
      legend: {
        ...text, labelColor: colour("--ink"), titleColor: colour("--ink-soft"), rowPadding: 3, columnPadding: 14, offset: 10,
        symbolSize: 70, columns: columnsOfLegend, labelLimit: width - 60 - excess, gradientStrokeColor: colour("--line"),
      },
      header: { labelColor: colour("--ink"), labelFont: font, labelLimit: panel },
      facet: { spacing: GAP },
      text: { font },
    };
  };

  const draw = async (place, spec, excess = 0) => {
    const { panels, least, most, square } = spec.usermeta;
    // A figure by itself may be narrower than its place; panels share it.
    place.classList.toggle("panels", panels > 1);
    place.style.maxWidth = panels < 2 && most ? `${most}px` : "";
    const width = place.clientWidth;
    const across = Math.max(1, Math.min(panels, panels === 4 ? 2 : MOST_COLUMNS, Math.floor((width + GAP) / (least + GAP))));
    const full = { ...resolved(spec), datasets: { ...(spec.datasets ?? {}), heads }, ...(panels > 1 ? { columns: across } : {}) };
    const options = {
      mode: "vega-lite", renderer: "svg", actions: false, config: config(spec, width, width / across - 70, excess),
      // Interprets expressions instead of compiling them, so that the page's policy can forbid eval.
      ast: true, tooltip: { theme: "none" },
    };
    if (square && panels < 2) {
      // Tiles stay square: as large as the figure wants them, or as there is room for.
      const [layers, index, largest] = square;
      const cell = Math.max(3, Math.min(largest, Math.floor((width - 64) / index)));
      Object.assign(full, { width: cell * index, height: cell * layers });
    }
    wrapTitles((full.spec ?? full).layer, square && panels < 2 ? Math.max(full.width, 240) : width / across);
    try {
      const result = await window.vegaEmbed(place, full, options);
      if (panels > 1) {
        // What axes and labels take is known only once they are drawn.
        const spare = width - Number(place.querySelector("svg").getAttribute("width"));
        const inner = result.view.signal("child_width") + Math.floor(spare / across);
        const panel = Math.min(inner, square ? square[1] * square[2] : most ?? inner);
        if (square) result.view.signal("child_height", panel * square[0] / square[1]);
        await result.view.signal("child_width", panel).resize().runAsync();
      }
      // How far a legend of long names begins to the right is known only now, too.
      const over = Number(place.querySelector("svg").getAttribute("width")) - width;
      if (over > 1 && !excess) {
        result.finalize();
        return await draw(place, spec, over);
      }
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
    for (const place of places) {
      drawn.push(await draw(place, specs[place.dataset.chart]));
    }
    document.documentElement.dataset.drawn = `${dark.matches ? "dark" : "light"} ${window.innerWidth}`;
  };

  const save = (name, blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const bar = (place, actions) => {
    const line = document.createElement("p");
    line.className = "save";
    for (const [words, label, action] of actions) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = words;
      button.setAttribute("aria-label", label);
      button.addEventListener("click", action);
      line.append(button);
    }
    place.after(line);
  };
  const places = [...document.querySelectorAll("[data-chart]")];
  places.forEach((place, position) => {
    const name = place.dataset.chart;
    bar(place, [
      ["SVG", `Save ${name} as SVG`, async () => save(`${name}.svg`, new Blob([await drawn[position].view.toSVG()], { type: "image/svg+xml" }))],
      ["PNG", `Save ${name} as PNG`, async () => (await drawn[position].view.toCanvas(2)).toBlob((blob) => save(`${name}.png`, blob))],
    ]);
  });
  // A text that a spreadsheet would take for a formula is kept a text.
  const csvCell = (cell) => {
    const parts = [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean);
    const text = parts.join(" ").replace(/\s+/g, " ").replaceAll("−", "-");
    return `"${(/^[=@]|^[+-](?![\d.])/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  };
  for (const frame of document.querySelectorAll(".scroll")) {
    const name = (frame.getAttribute("aria-label") ?? "table").replace(/[^\p{L}\p{N}]+/gu, "-");
    bar(frame, [["CSV", `Save the table as CSV`, () => {
      const rows = [...frame.querySelectorAll("tr")].map((row) => [...row.cells].map(csvCell).join(","));
      save(`${name}.csv`, new Blob([`${rows.join("\r\n")}\r\n`], { type: "text/csv" }));
    }]]);
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(text);
      try { await navigator.clipboard.writeText(text.textContent); } catch { document.execCommand("copy"); }
      button.textContent = "Copied";
    });
  }

  let width = window.innerWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 100);
  });
  dark.addEventListener("change", drawAll);
  drawAll();
})();
