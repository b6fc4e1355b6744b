// Every visible text with less contrast than 4.5 to what is behind it, and every line of a chart with less than 3.
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const bad = [];
  let seen = 0;
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const node = walker.currentNode.parentElement;
    if (!text || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.checkVisibility()) continue;
    const inSvg = node instanceof SVGElement;
    const style = getComputedStyle(node);
    const ink = rgba(inSvg ? style.fill : style.color);
    // What is behind the numbers in a heat map is a picture: fedcl.plots chooses their colour by its luminance.
    if (inSvg && node.closest("#figure-matrix") && /^\d+$/.test(text)) continue;
    const ground = behind(node);
    seen += 1;
    const found = ratio(over(ink, ground), ground);
    if (found < 4.5) bad.push(`${found.toFixed(2)}: ${text.slice(0, 40)} (${node.tagName} ${node.className})`);
  }
  document.querySelectorAll(".chart g.line, .chart .mean").forEach((node) => {
    const found = ratio(over(rgba(getComputedStyle(node).stroke), behind(node)), behind(node));
    if (found < 3) bad.push(`${found.toFixed(2)}: a line of a chart`);
  });
  return { bad, seen };
}
