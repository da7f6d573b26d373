// The reader's choice of light or dark, set before anything is drawn. Without it the system's choice holds.
"use strict";
(() => {
  let choice = null;
  try { choice = localStorage.getItem("sleeperbench-theme"); } catch { /* storage may be forbidden: the choice then lasts for a page */ }
  if (choice === "light" || choice === "dark") document.documentElement.dataset.theme = choice;
})();
