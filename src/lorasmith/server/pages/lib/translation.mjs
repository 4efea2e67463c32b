// Texts of templates in another language, by a table of ../lang/; loaded only where the page is not in English.

/** Attributes of elements and properties of components that people read. */
const READ = "alt|aria-label|axis|busyText|empty|help|label|none|placeholder|title|what|yes";
const ATTRIBUTE = new RegExp(`(\\s(?:${READ})=")([^"]*)(?=")`, "g");
const TAG = /(<!--[^]*?-->|<(?:"[^"]*"|'[^']*'|[^"'>])*>)/;
const HOLE = /\x01(\d+)\x01/;

/** The key of a template literal: its text, with `{0}` for its first hole. */
export const keyOf = (strings) => strings.reduce((all, one, index) => `${all}{${index - 1}}${one}`);

/** A template as one text, with a mark for each hole. */
const marked = (strings) => strings.reduce((all, one, index) => `${all}\x01${index - 1}\x01${one}`);

/**
 * A template of elements with its texts replaced: those between tags, and attributes that people read. Where a line
 * ends beside a hole, a text ends, as htm drops that space.
 *
 * @param {readonly string[]} strings
 * @param {(key: string) => string} translate
 * @returns {{ strings: string[], order: number[] }} the strings, and which of the old holes is where
 */
export function translateTemplate(strings, translate) {
  const made = marked(strings)
    .split(TAG)
    .map((part, index) =>
      index % 2
        ? part.replace(ATTRIBUTE, (_, before, value) => before + translateText(value, translate))
        : part
            .split(/((?<=\x01)\s*\n\s*|\s*\n\s*(?=\x01))/)
            .map((text) => translateText(text, translate))
            .join(""),
    )
    .join("")
    .split(HOLE);
  return {
    strings: made.filter((_, index) => index % 2 === 0),
    order: made.filter((_, index) => index % 2).map(Number),
  };
}

function translateText(text, translate) {
  if (!/\p{L}/u.test(text)) return text;
  const [, before, words, after] = /** @type {string[]} */ (/^(\s*)([^]*?)(\s*)$/.exec(text));
  const holes = [...words.matchAll(new RegExp(HOLE, "g"))].map(([hole]) => hole);
  let next = 0;
  const key = words.replace(new RegExp(HOLE, "g"), () => `{${next++}}`).replace(/[ \t\n]+/g, " ");
  return before + translate(key).replace(/\{(\d)\}/g, (_, hole) => holes[hole]) + after;
}

/**
 * @typedef {Record<string, string | Record<string, string>>} Table texts by their English; one with a number has a form
 *   for each of the language's plural categories
 */

/**
 * What the page translates its texts with.
 *
 * @param {string} language
 * @param {Table} table
 */
export function translator(language, table) {
  const rules = new Intl.PluralRules(language);
  const templates = new Map();
  const entry = (key, number = 0) => {
    const found = table[key] ?? key;
    return typeof found === "string" ? found : (found[rules.select(number)] ?? found.other);
  };
  // Keys of sentences of the server begin with ~. A hole ends at a comma, but for the last word of a key.
  const sentences = Object.keys(table)
    .filter((key) => key.startsWith("~"))
    .sort((a, b) => b.length - a.length)
    .map((key) => {
      const words = key.slice(1).replace(/[.?()]/g, "\\$&");
      const like = words.replace(/\{\d\}$/, "(.+)").replace(/\{\d\}/g, "((?:[^,]|,\\d)+?)");
      return { key, like: new RegExp(`^${like}$`) };
    });
  const heard = (text) => {
    const found = text in table ? null : sentences.find(({ like }) => like.test(text));
    const [, ...values] = found?.like.exec(text) ?? [];
    return entry(found?.key ?? text).replace(/\{(\d)\}/g, (hole, place) => (found ? heard(values[place]) : hole));
  };
  return {
    entry,
    heard,
    text: (strings, values) => entry(keyOf(strings)).replace(/\{(\d)\}/g, (_, hole) => values[hole]),
    elements:
      (html) =>
      (strings, ...values) => {
        let made = templates.get(strings); // htm, too, knows a template by its strings
        if (!made) templates.set(strings, (made = translateTemplate(strings, entry)));
        return html(made.strings, ...made.order.map((hole) => values[hole]));
      },
  };
}
