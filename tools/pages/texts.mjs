// The texts of the page's modules, as the keys of its tables of translations: `node texts.mjs FILE…` prints as JSON, by
// file, {keys, bare}: [key, line] of each text, and of what looks like one but would not be translated.
import { readFileSync } from "node:fs";
import { keyOf, translateTemplate } from "../../src/lorasmith/server/pages/lib/translation.mjs";

/**
 * The strings and template literals of a module: a scan of tokens, without a grammar.
 *
 * @returns {{ tag: string, strings: string[], line: number }[]} `tag` is empty where there is none
 */
function literals(source) {
  const found = [];
  const lineAt = (at) => source.slice(0, at).split("\n").length;
  /** Scans code from `at` to the brace that closes it, or to the end; returns where it ended. */
  function code(at) {
    let depth = 0;
    let before = ""; // the last token, by which a slash is a division or begins a regular expression
    while (at < source.length) {
      const rest = source.slice(at, at + 2);
      const letter = source[at];
      if (/\s/.test(letter)) at += 1;
      else if (rest === "//") at = end(source.indexOf("\n", at));
      else if (rest === "/*") at = source.indexOf("*/", at) + 2;
      else if (letter === '"' || letter === "'") {
        const start = at;
        for (at += 1; source[at] !== letter; at += 1) if (source[at] === "\\") at += 1;
        at += 1;
        found.push({ tag: "", strings: [plain(source.slice(start + 1, at - 1))], line: lineAt(start) });
        before = '"';
      } else if (letter === "`") {
        at = template(at, /^\w+$/.test(before) && source[at - 1] === before.at(-1) ? before : "");
        before = "`";
      } else if (letter === "/" && /^$|^[^\w)\]"`}]$|^(return|typeof)$/.test(before)) {
        let isClass = false;
        for (at += 1; source[at] !== "/" || isClass; at += 1) {
          if (source[at] === "\\") at += 1;
          else if (source[at] === "[") isClass = true;
          else if (source[at] === "]") isClass = false;
        }
        at += 1;
        before = '"';
      } else if (/[\w$]/.test(letter)) {
        const [word] = /^[\w$]+/.exec(source.slice(at));
        at += word.length;
        before = word;
      } else {
        if (letter === "{") depth += 1;
        if (letter === "}") {
          if (depth === 0) return at;
          depth -= 1;
        }
        before = letter;
        at += 1;
      }
    }
    return at;
  }
  const end = (at) => (at < 0 ? source.length : at);
  function template(at, tag) {
    const entry = { tag, strings: [""], line: lineAt(at) };
    found.push(entry);
    let raw = "";
    for (at += 1; source[at] !== "`"; ) {
      if (source[at] === "\\") {
        raw += source.slice(at, at + 2);
        at += 2;
      } else if (source.startsWith("${", at)) {
        entry.strings[entry.strings.length - 1] = plain(raw);
        raw = "";
        entry.strings.push("");
        at = code(at + 2) + 1;
      } else raw += source[at++];
    }
    entry.strings[entry.strings.length - 1] = plain(raw);
    return at + 1;
  }
  code(0);
  return found;
}

const plain = (raw) =>
  raw.replace(/\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([^]))/g, (_, long, short, letter) =>
    letter ? ({ n: "\n", t: "\t" }[letter] ?? letter) : String.fromCharCode(Number.parseInt(long ?? short, 16)),
  );

/** {keys, bare} of a module. */
function textsOf(file) {
  const source = readFileSync(file, "utf8");
  const keys = [];
  const bare = [];
  for (const { tag, strings, line } of literals(source)) {
    if (tag === "html") {
      const rest = translateTemplate(strings, (key) => (keys.push([key, line]), "")).strings.join("");
      for (const [, text] of rest.matchAll(/="([A-Z][^"]*[a-z][^"]*)"/g)) bare.push([text, line]);
    } else if (tag === "t") keys.push([keyOf(strings), line]);
    else if (/^[A-Z][^]* [a-z]/.test(keyOf(strings))) bare.push([keyOf(strings), line]);
  }
  for (const call of source.matchAll(/(?<!const )\bcount\(/g)) {
    const line = source.slice(0, call.index).split("\n").length;
    const [, one, many = `${one}s`] = COUNTED.exec(source.slice(call.index)) ?? [];
    if (!one) throw new Error(`${file}:${line}: count must name what it counts in quotes`);
    keys.push([`{0} ${many}`, line]);
  }
  return { keys, bare };
}

/** A call of `count`, whose number may have calls in it. */
const COUNTED = /^count\((?:[^()"]|\((?:[^()]|\([^()]*\))*\))*,\s*"([^"]+)"(?:,\s*"([^"]+)")?,?\s*\)/;

console.log(JSON.stringify(Object.fromEntries(process.argv.slice(2).map((file) => [file, textsOf(file)]))));
