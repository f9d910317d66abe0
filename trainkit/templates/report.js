"use strict";

// Samples: a slider over steps; holding an image shows the first step for comparison.
for (const gallery of document.querySelectorAll("[data-gallery]")) {
  const steps = [...gallery.querySelectorAll("[data-step]")];
  const slider = gallery.querySelector("input"), label = gallery.querySelector("output");
  const show = (k, name) => {
    steps.forEach((group, i) => { group.hidden = i !== k; });
    label.textContent = name || "step " + steps[k].dataset.step;
  };
  const current = () => show(Number(slider.value));
  slider.addEventListener("input", current);
  gallery.addEventListener("pointerdown", (event) => {
    if (event.target.tagName !== "IMG") return;
    event.preventDefault();
    show(0, "first: " + steps[0].dataset.step);
  });
  for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, current);
  current();
}

// Charts: the value under the pointer.
for (const chart of document.querySelectorAll("[data-points]")) {
  const points = JSON.parse(chart.dataset.points), svg = chart.querySelector("svg");
  const hair = chart.querySelector(".hair"), dot = chart.querySelector(".dot"), read = chart.querySelector(".read");
  const resting = read.textContent, width = svg.viewBox.baseVal.width;
  chart.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * width / box.width;
    const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    hair.setAttribute("x1", near[0]);
    hair.setAttribute("x2", near[0]);
    dot.setAttribute("cx", near[0]);
    dot.setAttribute("cy", near[1]);
    read.textContent = near[2];
    chart.classList.add("on");
  });
  chart.addEventListener("pointerleave", () => {
    chart.classList.remove("on");
    read.textContent = resting;
  });
}
