// What can be computed about a page: {faint: text below 4.5 : 1, nameless: controls without names, wide: what sticks out,
// small: on a phone, what is touched and below 24 pixels, labels included; links within sentences are not}.
(() => {
  const LEAST = 4.5;
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const shown = (element) => element.checkVisibility({ checkVisibilityCSS: true }) && !element.closest(".unseen, noscript, canvas, [aria-disabled=true], :disabled, .unready input");
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || !shown(element)) continue;
    const back = behind(element);
    const ink = over(rgba(getComputedStyle(element).color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < LEAST) faint.push(`${text.data.trim().slice(0, 40)} ${ratio.toFixed(2)} ${element.className}`);
  }
  const nameless = [...document.querySelectorAll("a[href], button, input, select, textarea")]
    .filter((one) => shown(one) && !one.closest("[aria-hidden=true]"))
    .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.[0]?.textContent.trim() || one.querySelector("img[alt]:not([alt=''])")))
    .map((one) => one.outerHTML.slice(0, 80));
  const width = document.documentElement.clientWidth;
  const wide = document.documentElement.scrollWidth > width ? [`${document.documentElement.scrollWidth} of ${width}`] : [];
  const TARGET = 24;
  const text = (one) => one.textContent.trim();
  const isInline = (one) => one.matches("a") && getComputedStyle(one).display === "inline" && text(one) !== text(one.parentElement);
  const least = (one) => Math.min(one.getBoundingClientRect().width, one.getBoundingClientRect().height);
  const small = [...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
    .filter((one) => width < 500 && shown(one) && !isInline(one))
    .map((one) => [one, Math.max(least(one), ...[...(one.matches("[type=checkbox], [type=radio]") ? one.labels : [])].map(least))])
    .filter(([, size]) => size > 0 && size < TARGET) // pictures may not have come yet
    .map(([one, size]) => `${one.outerHTML.slice(0, 90)} ${size.toFixed(1)}`);
  return { faint, nameless, wide, small };
})();
