"use strict";
// Hover: the nearest point of each curve at the pointer's place. Every text is set as text, never as markup.
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.points);
  const cursor = plot.querySelector(".cursor");
  const tip = plot.querySelector(".tip");

  const nearest = (at, place) => {
    let low = 0, high = at.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (at[middle] < place) low = middle; else high = middle;
    }
    return Math.abs(at[low] - place) <= Math.abs(at[high] - place) ? low : high;
  };

  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const place = 100 * (event.clientX - box.left) / box.width;
    const found = data.series
      .map((series) => ({ series, index: nearest(series.at, place) }))
      .map((hit) => ({ ...hit, distance: Math.abs(hit.series.at[hit.index] - place) }));
    const least = Math.min(...found.map((hit) => hit.distance));
    const anchor = found.find((hit) => hit.distance === least);
    const at = anchor.series.at[anchor.index];
    const rows = found.filter((hit) => Math.abs(hit.series.at[hit.index] - at) <= 2.5);
    tip.replaceChildren(element("span", `${anchor.series.x[anchor.index]} ${data.x_unit}`, "unit"));
    for (const hit of rows) {
      const row = element("div");
      row.append(element("span", undefined, `swatch ${hit.series.colour}`), element("span", hit.series.label),
        element("b", hit.series.y[hit.index]));
      tip.append(row);
    }
    cursor.style.left = `${at}%`;
    cursor.hidden = tip.hidden = false;
    if (at < 50) { tip.style.left = `calc(${at}% + 12px)`; tip.style.right = "auto"; }
    else { tip.style.right = `calc(${100 - at}% + 12px)`; tip.style.left = "auto"; }
  };

  const hide = () => { cursor.hidden = tip.hidden = true; };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
