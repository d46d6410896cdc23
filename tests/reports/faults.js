// What is wrong with a page as it is shown: faint, missing, cut or overlapping parts.
() => {
  const channels = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faults = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const hidden = element.closest("script, style, noscript, .skip, .mark-text") || !element.getClientRects().length;
    if (!node.data.trim() || hidden) continue;
    const style = getComputedStyle(element);
    const ink = channels(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(`faint: ${node.data.trim().slice(0, 40)}`);
  }
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const shown = (text) => text.textContent.trim() && getComputedStyle(text).opacity !== "0";
  for (const place of document.querySelectorAll("[data-chart]")) {
    const name = place.dataset.chart;
    const box = place.getBoundingClientRect();
    const drawn = place.querySelector("svg .mark-symbol path, svg .mark-rect path, svg .mark-line path");
    if (!drawn) faults.push(`not drawn: ${name}`);
    const svg = place.querySelector("svg");
    const scaled = svg && Number(svg.getAttribute("width")) > svg.getBoundingClientRect().width + 2;
    if (scaled) faults.push(`drawn too wide: ${name}`);
    for (const text of [...place.querySelectorAll("svg text")].filter(shown)) {
      const { left, right } = text.getBoundingClientRect();
      if (left < box.left - 2 || right > box.right + 2) faults.push(`outside ${name}: ${text.textContent}`);
    }
    for (const axis of place.querySelectorAll(".role-axis-label, .role-legend-label")) {
      const texts = [...axis.querySelectorAll("text")].filter(shown);
      const labels = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
      labels.forEach(([one, a], at) => labels.slice(at + 1).forEach(([other, b]) => {
        if (meet(a, b)) faults.push(`overlap in ${name}: ${one}, ${other}`);
      }));
    }
  }
  if (document.documentElement.scrollWidth > window.innerWidth) faults.push("wider than the window");
  if (seen < 30) faults.push(`only ${seen} texts`);
  return faults;
}
