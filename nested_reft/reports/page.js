"use strict";
// Shows the samples that the filters ask for. Whatever a model wrote becomes text nodes and nothing else.
(() => {
  const PAGE = 60;
  const VERDICTS = ["right", "wrong", "unscored", "unknown"];
  const byId = (id) => document.getElementById(id);
  const { runs, samples } = JSON.parse(byId("data").textContent);
  const fields = ["run", "from", "to", "source", "verdict", "text"];
  const inputs = new Map(fields.map((name) => [name, byId(`filter-${name}`)]).filter(([, input]) => input));
  let shown = PAGE;

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function card(sample) {
    const made = element("article", `sample ${sample.verdict}`);
    const source = sample.source === null ? "" : `${sample.source}, `;
    made.append(element("h4", "", `${source}${sample.verdict}`));
    for (const [what, text] of sample.texts) {
      made.append(element("p", "what", what), element("pre", "", text));
    }
    made.append(element("p", "facts", sample.facts.map(([name, value]) => `${name} ${value}`).join("; ")));
    return made;
  }

  function group(sample) {
    const run = runs.length > 1 ? `${runs[sample.run]}, ` : "";
    const version = sample.version === null ? "" : `, policy version ${sample.version}`;
    return `${run}step ${sample.step}${version}`;
  }

  function wanted() {
    const asked = Object.fromEntries(fields.map((name) => [name, inputs.get(name)?.value ?? ""]));
    const words = asked.text.toLowerCase();
    return samples.filter((sample) =>
      (asked.run === "" || sample.run === Number(asked.run)) &&
      (asked.from === "" || sample.step >= Number(asked.from)) &&
      (asked.to === "" || sample.step <= Number(asked.to)) &&
      (asked.source === "" || sample.source === asked.source) &&
      (asked.verdict === "" || sample.verdict === asked.verdict) &&
      (words === "" || sample.texts.some(([, text]) => text.toLowerCase().includes(words))));
  }

  function show() {
    const found = wanted();
    const list = byId("list");
    list.replaceChildren();
    let title = null;
    let cards = null;
    for (const sample of found.slice(0, shown)) {
      if (group(sample) !== title) {
        title = group(sample);
        cards = element("div", "samples");
        list.append(element("h3", "", title), cards);
      }
      cards.append(card(sample));
    }
    byId("count").textContent = `${found.length} of ${samples.length} samples fit.`;
    byId("more").hidden = found.length <= shown;
  }

  // The filters stand behind the # of the address, so that a selection can be passed on: #wrong, #verdict=wrong&from=10.
  function readAddress() {
    const hash = location.hash.slice(1);
    const asked = VERDICTS.includes(hash) ? new URLSearchParams({ verdict: hash }) : new URLSearchParams(hash);
    const isFilter = [...asked.keys()].some((name) => inputs.has(name) || name === "step");
    if (!isFilter) return;
    for (const [name, input] of inputs) input.value = asked.get(name) ?? "";
    if (asked.has("step")) for (const name of ["from", "to"]) inputs.get(name).value = asked.get("step");
    shown = PAGE;
    show();
  }

  function writeAddress() {
    const asked = new URLSearchParams([...inputs].map(([name, input]) => [name, input.value]).filter(([, value]) => value));
    history.replaceState(null, "", `#${asked.toString() || "samples"}`);
  }

  for (const input of inputs.values()) {
    input.addEventListener("input", () => {
      shown = PAGE;
      show();
      writeAddress();
    });
  }
  byId("more").addEventListener("click", () => {
    shown += PAGE;
    show();
  });
  window.addEventListener("hashchange", readAddress);
  byId("filters").hidden = false;
  show();
  readAddress();
})();
