"use strict";
// Sorting and copying are extras: without this script the page says the same.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const label = head.querySelector(".label");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label.textContent;
    label.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const up = before ? before !== "ascending" : !numeric;
      const key = (row) => row.cells[index].dataset.sort;
      const rows = [...body.rows].sort((a, b) => {
        const [p, q] = [key(a), key(b)];
        if (!numeric) return up ? p.localeCompare(q) : q.localeCompare(p);
        const [x, y] = [p === "" ? NaN : Number(p), q === "" ? NaN : Number(q)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
for (const box of document.querySelectorAll(".copyable")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(box.querySelector("pre").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy by hand";
    }
    setTimeout(() => (button.textContent = "Copy"), 1800);
  });
  box.append(button);
}
// On paper nothing can be unfolded: open what says how the run was made.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.code")) fold.open = true;
});
