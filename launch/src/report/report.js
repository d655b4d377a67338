// A cross through every chart at the pointer, and the values there of the chart under it. The values
// are read back from the drawn paths.
const short = (value) => {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4, notation: Math.abs(value) >= 1e4 ? "compact" : "standard" });
};

const plots = [...document.querySelectorAll(".plot")].map((plot) => {
  const [x0, x1] = plot.dataset.x.split(" ").map(Number);
  const [low, high, kind] = plot.dataset.y.split(" ").map((word) => (isNaN(word) ? word : Number(word)));
  const value = (y) => {
    const share = 1 - y / 1000;
    return kind === "log" ? low * (high / low) ** share : low + share * (high - low);
  };
  const curves = [...plot.querySelectorAll(".curve")].map((path) => ({
    name: path.dataset.name,
    points: [...path.getAttribute("d").matchAll(/[ML]([\d.-]+) ([\d.-]+)/g)].map((m) => [+m[1], +m[2]]),
  }));
  const add = (name) => {
    const element = document.createElement("div");
    element.className = name;
    element.hidden = true;
    element.setAttribute("aria-hidden", "true");
    return plot.appendChild(element);
  };
  return { plot, curves, value, tokens: (x) => x0 + (x / 1000) * (x1 - x0), cross: add("cross"), readout: add("readout") };
});

const nearest = (points, x) => {
  let [first, last] = [0, points.length - 1];
  while (last - first > 1) {
    const middle = (first + last) >> 1;
    if (points[middle][0] < x) first = middle;
    else last = middle;
  }
  return Math.abs(points[first][0] - x) < Math.abs(points[last][0] - x) ? points[first] : points[last];
};

const show = (x, under) => {
  for (const { plot, curves, value, tokens, cross, readout } of plots) {
    cross.hidden = false;
    cross.style.left = `${x / 10}%`;
    readout.hidden = plot !== under;
    if (readout.hidden) continue;
    const lines = curves
      .filter((curve) => curve.points.length > 0)
      .map((curve) => `${curve.name}: ${short(value(nearest(curve.points, x)[1]))}`);
    readout.textContent = [`${short(tokens(x))} tokens`, ...lines].join("\n");
    const place = (x / 1000) * plot.clientWidth;
    const left = x < 500 ? place + 10 : place - readout.offsetWidth - 10;
    readout.style.left = `${left}px`;
  }
};

const hide = () => {
  for (const { cross, readout } of plots) cross.hidden = readout.hidden = true;
};

for (const { plot } of plots) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(Math.min(1000, Math.max(0, ((event.clientX - box.left) / box.width) * 1000)), plot);
  });
  plot.addEventListener("pointerleave", hide);
}
