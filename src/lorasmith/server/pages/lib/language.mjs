// The language of the page's texts. They stand in the modules in English; another language is a table of ../lang/.

/** English, and the names of the tables; each is a language's code. */
export const LANGUAGES = ["en", "zh"];

const KEY = "language";

/** What was chosen here before, else the first of the browser's languages that there is a table for. */
function preferred() {
  const wanted = [...(globalThis.navigator?.languages ?? [])];
  try {
    wanted.unshift(localStorage.getItem(KEY) ?? "");
  } catch {
    // The browser stores nothing for this page.
  }
  return wanted.map((one) => one.split("-")[0]).find((one) => LANGUAGES.includes(one)) ?? "en";
}

/** Remembers a choice, and loads the page again in that language. */
export function setLanguage(language) {
  localStorage.setItem(KEY, language);
  location.reload();
}

async function load(language) {
  const [{ translator }, answer] = await Promise.all([
    import("./translation.mjs"),
    fetch(new URL(`../lang/${language}.json`, import.meta.url)),
  ]);
  return translator(language, await answer.json());
}

const wanted = preferred();
const translation = wanted === "en" ? null : await load(wanted).catch(() => null);
export const language = translation ? wanted : "en";
document.documentElement.lang = language;

/** A text with values: `t` before a template literal; `{0}` is its first value in the table. */
export const t = (strings, ...values) =>
  translation ? translation.text(strings, values) : String.raw({ raw: strings }, ...values);

/** A text that is not written in a module, such as a name of the server's. */
export const translated = (text) => (translation ? translation.heard(text) : text);

/** A number of things, whose key has the plural: `{0} photos`. */
export const plural = (number, words, one, many) =>
  translation
    ? translation.entry(`{0} ${many}`, number).replace("{0}", words)
    : `${words} ${number === 1 ? one : many}`;

/** `html`, whose texts are translated. */
export const ofElements = (html) => (translation ? translation.elements(html) : html);
