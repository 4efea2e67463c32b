// Captions in JSON: their texts, and such a caption with another text in place of one.

const TOKENS = /"(?:[^"\\]|\\.)*"|[{}[\],:]/g;

/**
 * The texts in a caption that is a JSON object, in their order; null for other captions.
 *
 * @returns {{ path: (string | number)[], text: string, start: number, end: number }[] | null}
 */
export function textsOf(caption) {
  if (!isObject(caption)) return null;
  const found = [];
  const path = [];
  for (const token of caption.matchAll(TOKENS)) {
    const [raw] = token;
    const end = token.index + raw.length;
    if (raw === "{") path.push("");
    else if (raw === "[") path.push(0);
    else if (raw === "}" || raw === "]") path.pop();
    else if (raw === "," && typeof path.at(-1) === "number") path[path.length - 1] += 1;
    else if (raw[0] === '"' && /^\s*:/.test(caption.slice(end))) path[path.length - 1] = JSON.parse(raw);
    else if (raw[0] === '"') found.push({ path: [...path], text: JSON.parse(raw), start: token.index, end });
  }
  return found;
}

/** A caption with another text in one place; all else, such as coordinates, stays letter for letter. */
export const withText = (caption, { start, end }, text) =>
  caption.slice(0, start) + JSON.stringify(text) + caption.slice(end);

/** What a text is of: `high level description`, `elements 2 text`. */
export const nameOf = (path) =>
  path.map((one) => (typeof one === "number" ? one + 1 : one.replaceAll("_", " "))).join(" ");

function isObject(caption) {
  try {
    return caption.startsWith("{") && typeof JSON.parse(caption) === "object";
  } catch {
    return false;
  }
}
