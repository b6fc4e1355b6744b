// What a reader who cannot see the page, or use a mouse, would miss.
() => {
  const bad = [];
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  ids.filter((id, i) => ids.indexOf(id) !== i).forEach((id) => bad.push(`two elements have the id ${id}`));
  document.querySelectorAll("[aria-labelledby]").forEach((node) => {
    const label = document.getElementById(node.getAttribute("aria-labelledby"));
    if (!label || !label.textContent.trim()) bad.push(`no label ${node.getAttribute("aria-labelledby")}`);
  });
  document.querySelectorAll("a[href^='#']").forEach((node) => {
    if (!document.getElementById(node.hash.slice(1))) bad.push(`${node.hash} leads nowhere`);
  });
  document.querySelectorAll("input, select, textarea").forEach((node) => {
    if (![...node.labels].some((label) => label.textContent.trim())) bad.push(`${node.id} has no label`);
  });
  document.querySelectorAll("button, a, summary, th, figcaption").forEach((node) => {
    if (!node.textContent.trim()) bad.push(`an empty ${node.tagName}`);
  });
  const named = (node) => node.getAttribute("role") === "img" && node.getAttribute("aria-label");
  document.querySelectorAll("svg, img").forEach((node) => {
    const around = node.closest("[role=img]");
    const silent = node.getAttribute("aria-hidden") === "true";
    if (!named(node) && !(around && named(around)) && !silent) bad.push("an image without a name");
  });
  document.querySelectorAll("figure.plot").forEach((node) => {
    if (!named(node.querySelector("[role=img]"))) bad.push(`${node.id} has no name`);
  });
  document.querySelectorAll(".scroll, .wide .paper").forEach((node) => {
    const name = node.getAttribute("aria-label") || node.getAttribute("aria-labelledby");
    const reached = node.tabIndex === 0 && node.getAttribute("role") === "region";
    if (!reached || !name) bad.push("a box that scrolls, but not by keyboard");
  });
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((node) => Number(node.tagName[1]));
  if (levels[0] !== 1 || levels.filter((level) => level === 1).length !== 1) bad.push("not one h1 at the beginning");
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) bad.push("a level of headings is left out"); });
  for (const tag of ["header", "nav[aria-label]", "main", "footer", "title"]) {
    if (document.querySelectorAll(tag).length !== 1) bad.push(`not one ${tag}`);
  }
  if (!document.documentElement.lang) bad.push("no language");
  return bad;
}
