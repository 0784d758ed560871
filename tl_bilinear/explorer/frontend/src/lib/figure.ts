// Charts of the page as one SVG file, for a paper.

const GAP = 24;
const TITLE = 44;

/** One picture after the other, below a title; each keeps the size of its own view box. */
export function figureOf(title: string, caption: string, charts: SVGSVGElement[]): string {
  const sizes = charts.map((chart) => chart.viewBox.baseVal);
  const width = sizes.reduce((sum, box) => sum + box.width + GAP, GAP);
  const height = Math.max(...sizes.map((box) => box.height)) + TITLE + GAP;
  const name = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(name, "svg");
  made.setAttribute("xmlns", name);
  made.setAttribute("viewBox", `0 0 ${width} ${height}`);
  made.setAttribute("width", String(width));
  made.setAttribute("height", String(height));
  made.setAttribute("font-family", "system-ui, sans-serif");
  made.setAttribute("font-size", "11");
  const write = (text: string, y: number, size: number) => {
    const line = document.createElementNS(name, "text");
    line.setAttribute("x", String(GAP));
    line.setAttribute("y", String(y));
    line.setAttribute("font-size", String(size));
    line.textContent = text;
    made.append(line);
  };
  write(title, 20, 14);
  write(caption, 37, 11);
  let x = GAP;
  charts.forEach((chart, i) => {
    const part = chart.cloneNode(true) as SVGSVGElement;
    for (const each of [part, ...part.querySelectorAll("*")]) {
      for (const { name } of [...each.attributes]) {
        if (/^(class|style|role|tabindex|aria-.*|href)$/.test(name)) each.removeAttribute(name);
      }
    }
    part.setAttribute("x", String(x));
    part.setAttribute("y", String(TITLE));
    part.setAttribute("width", String(sizes[i].width));
    part.setAttribute("height", String(sizes[i].height));
    x += sizes[i].width + GAP;
    made.append(part);
  });
  // Without the markers that the page's framework leaves between elements.
  return new XMLSerializer().serializeToString(made).replace(/<!--.*?-->/g, "");
}
