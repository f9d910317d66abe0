"use strict";

// Which images are shown: by what was found, and by words in the name or the caption.
const cards = [...document.querySelectorAll(".sheet article")];
const texts = cards.map((card) => [...card.querySelectorAll("h3, .caption")].map((e) => e.textContent).join(" ").toLowerCase());
const filter = document.getElementById("filter"), search = document.getElementById("search");
const count = document.getElementById("count");

const matches = (checks, wanted) =>
  wanted === "" || (wanted === "any" ? checks !== "" : wanted === "none" ? checks === "" : checks.split(" ").includes(wanted));

const update = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  cards.forEach((card, i) => {
    const visible = matches(card.dataset.checks, filter.value) && words.every((word) => texts[i].includes(word));
    card.hidden = !visible;
    shown += visible;
  });
  count.textContent = shown === cards.length ? cards.length + " images" : shown + " of " + cards.length + " images";
};
filter.addEventListener("change", update);
search.addEventListener("input", update);

// A command is copied; where the browser does not allow that for files, it is selected.
document.addEventListener("click", async (event) => {
  if (!event.target.matches("[data-copy]")) return;
  const command = event.target.previousElementSibling;
  try {
    await navigator.clipboard.writeText(command.textContent);
    event.target.textContent = "copied";
  } catch {
    window.getSelection().selectAllChildren(command);
  }
});
