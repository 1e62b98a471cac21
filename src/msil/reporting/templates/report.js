"use strict";

// Tables: each header becomes a button that sorts the rows.

const collator = new Intl.Collator("en", { numeric: true });

function compareValues(a, b, numeric, sign) {
  if (a === "" || b === "") return (a === "") - (b === ""); // missing: last, in both directions
  return sign * (numeric ? Number(a) - Number(b) || 0 : collator.compare(a, b));
}

function sortBy(header, column) {
  const table = header.closest("table");
  const numeric = header.classList.contains("number");
  const first = numeric ? "descending" : "ascending"; // the best number, or the beginning of the alphabet
  const second = numeric ? "ascending" : "descending";
  const direction = header.getAttribute("aria-sort") === first ? second : first;
  const sign = direction === "ascending" ? 1 : -1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const value = (row) => row.cells[column].dataset.sort;
  const rows = [...table.tBodies[0].rows].sort((a, b) => compareValues(value(a), value(b), numeric, sign));
  table.tBodies[0].append(...rows);
  document.getElementById("announcement").textContent = `Sorted by ${header.textContent}, ${direction}.`;
}

for (const table of document.querySelectorAll("table.data")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sortBy(header, column));
    header.replaceChildren(button);
  });
}

// Pictures: each becomes a button that opens it large.

const viewer = document.getElementById("viewer");
const stage = viewer.querySelector(".viewer-stage");
let shown = null; // the button whose picture is in the viewer

function neighbours(button) {
  return [...button.closest("[data-pictures]").querySelectorAll(".picture > button")];
}

function show(button) {
  const all = neighbours(button);
  const { title, label } = button.parentElement.dataset;
  shown = button;
  stage.replaceChildren(button.querySelector("img").cloneNode());
  stage.classList.toggle("card", button.parentElement.classList.contains("chart"));
  document.getElementById("viewer-title").textContent = [title, label].filter(Boolean).join(": ");
  viewer.querySelector(".viewer-count").textContent = `${all.indexOf(button) + 1} of ${all.length}`;
  for (const step of viewer.querySelectorAll("[data-step]")) step.hidden = all.length === 1;
  if (!viewer.open) viewer.showModal();
}

function move(step) {
  const all = neighbours(shown);
  show(all[(all.indexOf(shown) + step + all.length) % all.length]);
}

function moveItem(step) {
  const item = shown.closest(".item");
  if (!item) return;
  const place = [...item.querySelectorAll(".picture > button")].indexOf(shown);
  const items = [...item.parentElement.children];
  const next = items[(items.indexOf(item) + step + items.length) % items.length];
  const pictures = next.querySelectorAll(".picture > button");
  if (pictures.length) show(pictures[Math.min(place, pictures.length - 1)]);
}

for (const image of document.querySelectorAll(".picture > img")) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = "Open large";
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => show(button));
}

const keys = {
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  ArrowUp: () => moveItem(-1),
  ArrowDown: () => moveItem(1),
};

viewer.addEventListener("keydown", (event) => {
  if (!(event.key in keys) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  keys[event.key]();
});
viewer.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && button.dataset.step) move(Number(button.dataset.step));
  else if (button || event.target === viewer || event.target === stage) viewer.close();
});
viewer.addEventListener("close", () => {
  if (viewer.open) return; // the event comes late: another picture may be open already
  stage.replaceChildren();
  shown.focus();
});

// Commands: a button that copies them.

for (const block of document.querySelectorAll(".commands")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block.querySelector("code")); // not allowed: ready for Ctrl+C
      button.textContent = "Selected: press Ctrl+C";
    }
    document.getElementById("announcement").textContent = button.textContent;
  });
  block.querySelector("p").append(button);
}
