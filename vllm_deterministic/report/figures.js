"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const VARIABLE = /^var\((--[a-z-]+)\)$/;

// plotly knows no CSS variables: each is looked up when a figure is drawn, again after a change of light and dark.
function themed(value) {
  if (typeof value === "string") {
    const variable = VARIABLE.exec(value);
    return variable ? getComputedStyle(document.documentElement).getPropertyValue(variable[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map(themed);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part)]));
}

// Under a finger a drag scrolls the page; with a mouse it zooms, and a double click zooms out.
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";

function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    const layout = { ...themed(figure.layout), dragmode };
    Plotly.react(id, themed(figure.data), layout, { responsive: true, displayModeBar: false });
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
