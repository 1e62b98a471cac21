"use strict";

// A click on a column's head sorts by it: numbers the largest first, then the other way; what is missing last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const numbers = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numbers;
    const value = (row) => row.cells[column].dataset.value || (numbers ? "" : row.cells[column].textContent);
    const order = (a, b) => (numbers ? a - b : a.localeCompare(b, undefined, { numeric: true })) * (down ? -1 : 1);
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      return a === "" || b === "" ? (a === "") - (b === "") : order(a, b);
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}

for (const box of document.querySelectorAll("[data-curve]")) {
  const show = () => {
    for (const part of document.querySelectorAll(`[id^="${box.dataset.curve}"]`)) {
      part.style.display = box.checked ? "" : "none";
    }
  };
  box.addEventListener("change", show);
  show();
}
