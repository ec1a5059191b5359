"use strict";

// The numbers of a table of all pairs, for the heat map above it.
function cells(table) {
  const columns = Array.from(table.tHead.rows[0].cells, (cell) => cell.textContent.trim()).slice(1);
  return Array.from(table.tBodies[0].rows).flatMap((row) => columns.map((column, place) => ({
    row: row.cells[0].textContent.trim(), column, log10: Number.parseFloat(row.cells[place + 1]?.textContent),
  }))).filter((cell) => Number.isFinite(cell.log10));
}

for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  const source = spec.data.find((data) => data.name === "cells");
  if (source) source.values = cells(place.closest("section").querySelector("table.grid"));
  spec.description = place.dataset.label;
  vegaEmbed(place, spec, { mode: "vega", renderer: "svg", actions: false });
}

// Sorting: numbers by size, words by the alphabet, empty cells last.
const words = new Intl.Collator("en", { numeric: true });

function sort(table, column, direction) {
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const missing = (text) => text === "" || text === "–";
  const number = (text) => ({ inf: Infinity, "-inf": -Infinity })[text] ?? Number(text);
  const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, text: key(row), number: number(key(row)) }));
  rows.sort((a, b) => {
    if (missing(a.text) || missing(b.text)) return missing(a.text) - missing(b.text);
    const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
    return direction * (numbers ? Math.sign(a.number - b.number) || 0 : words.compare(a.text, b.text));
  });
  table.tBodies[0].append(...rows.map((each) => each.row));
}

for (const input of document.querySelectorAll(".filter input")) {
  const table = input.closest("section").querySelector("table");
  const output = input.parentElement.querySelector("output");
  const filter = () => {
    const rows = Array.from(table.tBodies[0].rows), wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  input.addEventListener("input", filter);
  filter();
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      sort(table, column, direction);
    });
  });
}
