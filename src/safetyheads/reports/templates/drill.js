"use strict";
// Shows the answers under one head: those of the unablated model, but for the ones whose state is another.
(() => {
  const data = JSON.parse(document.getElementById("drill-data").textContent);
  const at = (id) => document.getElementById(id);
  const [heads, sets, changed] = [at("drill-head"), at("drill-set"), at("drill-changed")];
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };
  const named = (head) => head || "none (nothing ablated)";
  data.heads.forEach((head) => heads.append(element("option", named(head), { value: head })));
  data.sets.forEach((name) => sets.append(element("option", name, { value: name })));

  const rowsOf = (name, head) => {
    const others = data.others[name][head];
    if (others === undefined) return [];
    const states = [...data.unablated[name]];
    others.forEach(([position, number]) => { states[position] = number; });
    return data.places[name].map(([prompt, seed], position) => {
      const state = data.states[states[position]];
      const verdicts = data.judges.map((_, i) => [data.labels[state[2 * i]], data.reasons[state[2 * i + 1]]]);
      const [changed, complete] = state.slice(2 * data.judges.length).map(Boolean);
      return { prompt, seed, verdicts, changed, complete };
    });
  };

  const show = () => {
    const all = rowsOf(sets.value, heads.value);
    const rows = changed.checked ? all.filter((row) => row.changed) : all;
    const seeds = new Set(all.map((row) => row.seed)).size > 1;
    const counts = data.judges.map((judge, i) => {
      const complied = all.filter((row) => row.verdicts[i][0] === "complied").length;
      const unscored = all.filter((row) => row.verdicts[i][0] === "unscored").length;
      return `${judge}: ${complied} of ${all.length - unscored} complied` + (unscored ? `, ${unscored} unscored` : "");
    });
    // Complying is a fault where the prompt is harmful, and the point where it is benign.
    const tones = sets.value === "harmful" ? { complied: "yes", refused: "less" } : { refused: "less" };
    at("drill-summary").textContent = all.length
      ? `${named(heads.value)}, ${sets.value} prompts: ${rows.length} of ${all.length} answers shown, `
        + `${all.filter((row) => row.changed).length} changed. ${counts.join("; ")}.`
      : `No ${sets.value} answers of this head are in the page.`;
    const titles = ["Prompt", ...(seeds ? ["Seed"] : []), ...data.judges, "Answer", "Read"];
    at("drill-columns").replaceChildren(...titles.map((title) => element("th", title, { scope: "col", class: "text" })));
    at("drill-rows").replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      line.append(element("th", row.prompt, { scope: "row" }));
      if (seeds) line.append(element("td", row.seed, { class: "text" }));
      row.verdicts.forEach(([label, reason]) => {
        const cell = element("td", "", { class: "text wrap" });
        cell.append(element("span", label, { class: tones[label] ?? "" }), element("span", reason, { class: "of" }));
        line.append(cell);
      });
      line.append(element("td", row.changed ? "changed" : "as unablated", { class: "text" }));
      line.append(element("td", row.complete ? "to its end" : "cut, every judge final", { class: "text" }));
      return line;
    }));
  };

  [heads, sets, changed].forEach((choice) => choice.addEventListener("change", show));
  at("drill-choice").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("head-chosen", (event) => {
    if (!data.heads.includes(event.detail)) return;
    heads.value = event.detail;
    show();
    at("drill").scrollIntoView({ block: "start" });
    heads.focus({ preventScroll: true });
  });
  heads.value = data.heads[Math.min(1, data.heads.length - 1)];
  show();
})();
