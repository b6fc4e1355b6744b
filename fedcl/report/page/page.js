"use strict";
(() => {
  const root = document.documentElement;
  const make = (tag, attributes, text) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Colours: those of the system until the reader says otherwise.
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameTheme = () => { theme.textContent = isDark() ? "Light colours" : "Dark colours"; };
  theme.hidden = false;
  nameTheme();
  system.addEventListener("change", nameTheme);
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("fedcl-theme", root.dataset.theme); } catch (_) { /* a file may have no storage */ }
    nameTheme();
  });

  // Paper is light and shows everything.
  let before = null;
  addEventListener("beforeprint", () => {
    before = { theme: root.dataset.theme, closed: [...document.querySelectorAll("details:not([open])")] };
    root.dataset.theme = "light";
    before.closed.forEach((node) => { node.open = true; });
  });
  addEventListener("afterprint", () => {
    if (!before) return;
    if (before.theme) root.dataset.theme = before.theme; else delete root.dataset.theme;
    before.closed.forEach((node) => { node.open = false; });
    before = null;
  });

  // Sorting: undefined cells stay last in both directions.
  const collator = new Intl.Collator("en", { numeric: true });
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent;
    if (text === "") return null;
    const value = Number(text.replace(/\u202f/g, ""));
    return Number.isNaN(value) ? text : value;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
  const sort = (table, head) => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    table.querySelectorAll("thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [keyOf(row, head.cellIndex), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    if (table.tBodies[0].rows.length < 2) return;
    table.querySelectorAll("thead th").forEach((head) => {
      const button = make("button", { type: "button", title: "Sort by this column" }, head.textContent);
      button.addEventListener("click", () => sort(table, head));
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
    });
  });

  // Choosing a class or a client.
  const data = JSON.parse(document.getElementById("data").textContent);
  const dashes = ["", "7 4", "9 3 2 3", "2 3"];
  const told = (value) => (value === null || value === undefined ? "–" : value.toFixed(1));
  const shapes = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.5-3.5h7v7h-7z", "M0-4.5L4.5 3.5h-9z", "M0-5L5 0L0 5L-5 0z"];
  const mark = (index, x, y) => draw("path", { class: "mark", d: shapes[index % 4], stroke: "none", transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  const path = (values, x, y) => {
    let pen = false;
    return values.map((value, task) => {
      if (value === null) { pen = false; return ""; }
      const step = `${pen ? "L" : "M"}${x(task).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
      return step;
    }).join("");
  };
  const chart = (place, found, item, label) => {
    const width = Math.max(280, Math.min(960, place.clientWidth - 18));
    const height = Math.round(Math.max(220, Math.min(340, width * 0.5)));
    const [left, right, top, bottom] = [44, 12, 12, 42];
    const last = Math.max(1, found.tasks - 1);
    const inner = width - left - right - 16;
    const x = (task) => left + 8 + (inner * task) / last;
    const y = (value) => top + (height - top - bottom) * (1 - value / 100);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (let tick = 0; tick <= 100; tick += 20) {
      svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
      svg.append(draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    const every = Math.ceil(found.tasks / Math.max(2, Math.floor(inner / 30)));
    for (let task = 0; task < found.tasks; task += every) {
      svg.append(draw("text", { x: x(task), y: height - bottom + 18, "text-anchor": "middle" }, String(task + 1)));
    }
    svg.append(draw("text", { x: left + 8 + inner / 2, y: height - 6, "text-anchor": "middle" }, "Tasks learned"));
    const side = draw("text", { transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "Accuracy (%)");
    svg.append(side);
    if (found.band) {
      const there = found.band.low.map((value, task) => (value === null ? -1 : task)).filter((task) => task >= 0);
      const points = [...there.map((t) => [x(t), y(found.band.high[t])]), ...there.reverse().map((t) => [x(t), y(found.band.low[t])])];
      svg.append(draw("polygon", { class: "band", points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" ") }));
      svg.append(draw("path", { class: "mean", d: path(found.band.mean, x, y), fill: "none", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
    }
    found.lines.forEach((line, index) => {
      const colour = `var(--c${index % 7})`;
      const values = line.values[item];
      const group = draw("g", { class: "line", style: `stroke:${colour};fill:${colour}` });
      group.append(draw("path", { d: path(values, x, y), fill: "none", "stroke-width": 2.2, "stroke-dasharray": dashes[index % 4] }));
      values.forEach((value, task) => {
        if (value === null) return;
        const [cx, cy] = [x(task), y(value)];
        group.append(mark(index, cx, cy));
      });
      svg.append(group);
    });
    return svg;
  };
  const legend = (found, name) => {
    const list = make("ul", { class: "legend" });
    found.lines.forEach((line, index) => {
      const entry = make("li");
      const sample = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true", focusable: "false" });
      sample.append(draw("path", { d: "M0 5H30", style: `stroke:var(--c${index % 7})`, "stroke-width": 2.2, "stroke-dasharray": dashes[index % 4] }));
      const sign = mark(index, 15, 5);
      sign.setAttribute("style", `fill:var(--c${index % 7})`);
      sample.append(sign);
      entry.append(sample, found.band || found.lines.length === 1 ? name : line.label);
      list.append(entry);
    });
    if (found.band) {
      const entry = make("li");
      const sample = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true", focusable: "false" });
      sample.append(draw("rect", { class: "band", x: 0, y: 0, width: 30, height: 10 }), draw("path", { class: "mean", d: "M0 5H30", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
      entry.append(sample, `mean and range of all ${found.items.length}`);
      list.append(entry);
    }
    return list;
  };
  const choosers = {};
  document.querySelectorAll("[data-chooser]").forEach((place) => {
    const found = data[place.dataset.chooser];
    const select = place.querySelector("select");
    const box = place.querySelector(".chart");
    const table = place.querySelector("table");
    place.hidden = false;
    const show = () => {
      const item = Number(select.value);
      const name = `${found.noun[0].toUpperCase()}${found.noun.slice(1)} ${found.items[item]}`;
      const columns = found.lines.map((line) => [found.lines.length > 1 ? line.label : `${name} (%)`, line.values[item]]);
      if (found.band) columns.push([`Mean of all (%)`, found.band.mean], ["Lowest (%)", found.band.low], ["Highest (%)", found.band.high]);
      const said = columns.slice(0, found.lines.length).map(([label, values]) => {
        const points = values.map((value, task) => (value === null ? null : `${told(value)} after ${task + 1}`)).filter(Boolean);
        return `${label}: ${points.join(", ") || "undefined"}`;
      });
      place.querySelector(".caption").textContent = `${name}: accuracy (%) after each task`;
      const head = make("tr");
      head.append(make("th", { scope: "col" }, "After task"), ...columns.map(([label]) => make("th", { scope: "col", class: "n" }, label)));
      table.tHead.replaceChildren(head);
      table.tBodies[0].replaceChildren(...Array.from({ length: found.tasks }, (_, task) => {
        const row = make("tr");
        row.append(make("th", { scope: "row" }, String(task + 1)), ...columns.map(([, values]) => make("td", { class: "n" }, told(values[task]))));
        return row;
      }));
      box.replaceChildren(chart(box, found, item, `Accuracy over tasks. ${said.join(". ")}.`), legend(found, name));
    };
    choosers[place.dataset.chooser] = (item) => {
      select.value = String(item);
      show();
      place.scrollIntoView({ block: "nearest" });
      select.focus({ preventScroll: true });
    };
    select.addEventListener("change", show);
    let width = 0;
    new ResizeObserver(() => {
      if (box.clientWidth === width) return;
      width = box.clientWidth;
      show();
    }).observe(box);
    show();
  });
  document.querySelectorAll("[data-pick]").forEach((place) => {
    const button = make("button", { type: "button", title: "Show it over tasks" }, place.textContent);
    button.addEventListener("click", () => choosers[place.dataset.pick](place.dataset.item));
    place.replaceWith(button);
  });

  // Finding a setting.
  const find = document.getElementById("find");
  if (find) {
    const only = document.getElementById("only-changed");
    const sections = [...document.querySelectorAll("details.settings")];
    sections.forEach((section) => { section.dataset.open = section.open ? "1" : ""; });
    document.querySelector(".filters").hidden = false;
    const filter = () => {
      const wanted = find.value.trim().toLowerCase();
      let count = 0;
      sections.forEach((section) => {
        let here = 0;
        section.querySelectorAll("tbody tr").forEach((row) => {
          const fits = row.textContent.toLowerCase().includes(wanted) && (!only.checked || row.classList.contains("changed"));
          row.hidden = !fits;
          here += fits;
        });
        section.hidden = here === 0;
        section.open = wanted || only.checked ? here > 0 : section.dataset.open === "1";
        count += here;
      });
      document.getElementById("found").textContent = wanted || only.checked ? `${count} setting${count === 1 ? "" : "s"}` : "";
    };
    find.addEventListener("input", filter);
    only.addEventListener("change", filter);
  }
})();
