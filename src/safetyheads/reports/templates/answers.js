"use strict";
// Shows answers side by side: the unablated ones, and those of a group whose state or text is another.
(() => {
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const at = (id) => document.getElementById(`answers-${id}`);
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };
  const [groups, sets, judges, labels, categories] = ["group", "set", "judge", "label", "category"].map(at);
  const fill = (select, values, named = (value) => value) =>
    select.replaceChildren(...values.map((value) => element("option", named(value), { value })));
  const named = (group) => group.split(",").join(", ") || "none (nothing ablated)";
  fill(groups, data.groups, named);
  fill(sets, data.sets, (name) => name.replace("_", " "));
  fill(judges, data.judges);
  fill(labels, ["", ...data.labels], (label) => label || "any");
  const fillCategories = () => {
    const known = [...new Set(data.categories[sets.value].filter((name) => name !== null))].sort();
    fill(categories, ["", ...known], (name) => name || "all");
    categories.parentElement.hidden = !known.length;
  };

  const answer = (number, text) => {
    const state = data.states[number];
    const verdicts = data.judges.map((_, i) => ({ label: data.labels[state[2 * i]], reason: data.reasons[state[2 * i + 1]] }));
    const [changed, complete] = state.slice(2 * data.judges.length).map(Boolean);
    return { verdicts, changed, complete, text };
  };
  const rowsOf = (name, group) => {
    const others = data.others[name][group];
    if (others === undefined) return [];
    const states = [...data.unablated[name]];
    others.forEach(([position, number]) => { states[position] = number; });
    const text = (of, position) => data.texts?.[of]?.[name]?.[position];
    return data.places[name].map(([prompt, seed], position) => ({
      prompt, seed, category: data.categories[name][position], query: data.queries?.[name]?.[position],
      before: answer(data.unablated[name][position], text("", position)),
      after: answer(states[position], text(group, position) ?? (states[position] === data.unablated[name][position] ? text("", position) : undefined)),
    }));
  };

  const show = () => {
    const judge = judges.selectedIndex;
    const texts = at("texts")?.checked ?? false;
    const wanted = at("search").value.trim().toLowerCase();
    const said = (row) => [row.prompt, row.category, row.before.verdicts[judge].reason, row.after.verdicts[judge].reason,
      ...(texts ? [row.query, row.before.text, row.after.text] : [])].join("\n").toLowerCase();
    const all = rowsOf(sets.value, groups.value);
    const flips = (row) => row.before.verdicts[judge].label !== row.after.verdicts[judge].label;
    const rows = all.filter((row) => (!at("flips").checked || flips(row))
      && (!labels.value || row.after.verdicts[judge].label === labels.value)
      && (!categories.value || row.category === categories.value)
      && (!wanted || said(row).includes(wanted)));
    const seeds = new Set(all.map((row) => row.seed)).size > 1;
    const counts = data.judges.map((name, i) => {
      const complied = all.filter((row) => row.after.verdicts[i].label === "complied").length;
      const unscored = all.filter((row) => row.after.verdicts[i].label === "unscored").length;
      return `${name}: ${complied} of ${all.length - unscored} complied` + (unscored ? `, ${unscored} unscored` : "");
    });
    // Complying is a fault where the prompt is harmful, and the point where it is benign.
    const tones = sets.value.startsWith("harmful") ? { complied: "yes", refused: "less" } : { refused: "less" };
    at("summary").textContent = all.length
      ? `${named(groups.value)}, ${sets.value.replace("_", " ")} prompts: ${rows.length} of ${all.length} answers shown, `
        + `${all.filter(flips).length} flip, ${all.filter((row) => row.after.changed).length} changed. ${counts.join("; ")}.`
      : `No ${sets.value} answers of this group are in the page.`;
    at("column").textContent = groups.value ? `${named(groups.value)} ablated` : "Nothing ablated";
    const cell = ({ verdicts, complete, text }) => {
      const made = element("td", "", { class: "text" });
      const { label, reason } = verdicts[judge];
      const cut = complete ? "" : " (cut where every judge was final)";
      made.append(element("span", label, { class: tones[label] ?? "" }), element("span", reason + cut, { class: "of" }));
      if (texts && text !== undefined) made.append(element("pre", text));
      return made;
    };
    at("rows").replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      const prompt = element("th", `${row.prompt}${seeds ? `, seed ${row.seed}` : ""}`, { scope: "row" });
      if (row.category) prompt.append(element("span", row.category, { class: "of own-line" }));
      if (texts && row.query !== undefined) prompt.append(element("p", row.query));
      line.append(prompt, cell(row.before), cell(row.after));
      return line;
    }));
  };

  sets.addEventListener("change", fillCategories);
  at("choice").addEventListener("change", show);
  at("choice").addEventListener("input", show);
  at("choice").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("head-chosen", (event) => {
    if (!data.groups.includes(event.detail)) return;
    groups.value = event.detail;
    show();
    document.getElementById("answers").scrollIntoView({ block: "start" });
    groups.focus({ preventScroll: true });
  });
  groups.value = data.groups[Math.min(1, data.groups.length - 1)];
  fillCategories();
  show();
})();
