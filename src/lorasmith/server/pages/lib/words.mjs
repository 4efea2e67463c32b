// Numbers, sizes, times and states in words.
import { language, plural, t, translated } from "./language.mjs";

const numbers = new Intl.NumberFormat(language);
/** A number of things; the names are literals, as the translations are keyed by them. */
export const count = (number, one, many = `${one}s`) => plural(number, numbers.format(number), one, many);
export const capital = (text) => text && text[0].toUpperCase() + text.slice(1);
export const sum = (numbers) => numbers.reduce((all, one) => all + one, 0);
export const whole = (number) => numbers.format(Math.round(number));

/** A loss or another measured number, in four significant digits. */
export function measured(number) {
  if (!Number.isFinite(number)) return "–";
  if (number === 0) return "0";
  return Math.abs(number) < 0.001 ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}

/** The size of a file or a folder, as shops and download pages have it. */
export function bytes(number) {
  if (!Number.isFinite(number)) return "–";
  const units = [t`bytes`, "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit === 0 || number >= 100 ? Math.round(number) : Number(number.toPrecision(2))} ${units[unit]}`;
}

/** The size of a memory, as its maker has it. */
export const memorySize = (number) => `${Math.max(1, Math.round(number / 2 ** 30))} GB`;

const CARDS = [4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80, 96, 141];
/** The smallest usual card that has so much memory, and a twelfth for all else on it. */
export function cardFor(number) {
  const size = CARDS.find((one) => one * 2 ** 30 >= number * (13 / 12));
  if (!size) return t`several large cards`;
  return size === 8 || size === 80 ? t`an ${size}\u00a0GB\u00a0card` : t`a ${size}\u00a0GB\u00a0card`;
}

/** A duration such as "about 4 minutes" (without "about" if exact). */
export function duration(seconds, { about = false } = {}) {
  if (!Number.isFinite(seconds)) return "–";
  const told = (text) => (about ? t`about ${text}` : text);
  if (seconds < 1) return t`less than a second`;
  if (about && seconds < 90)
    return seconds < 10
      ? t`a few seconds`
      : seconds < 50
        ? t`about ${10 * Math.round(seconds / 10)} seconds`
        : t`about a minute`;
  if (seconds < 90) return told(count(Math.round(seconds), "second"));
  let minutes = Math.round(seconds / 60);
  if (minutes < 60) return told(count(minutes, "minute"));
  const unit = minutes < 180 ? 10 : 60;
  if (about) minutes = unit * Math.round(minutes / unit);
  const hours = Math.floor(minutes / 60);
  const rest = minutes % 60;
  if (hours < 24) return told(rest ? t`${count(hours, "hour")} ${rest} min` : count(hours, "hour"));
  return told(count(Math.round(hours / 24), "day"));
}

const dates = language === "en" ? "en-GB" : language;
const sameYear = new Intl.DateTimeFormat(dates, {
  day: "numeric",
  month: "short",
  hour: "2-digit",
  minute: "2-digit",
});
const otherYear = new Intl.DateTimeFormat(dates, { day: "numeric", month: "short", year: "numeric" });
export function moment(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const date = new Date(seconds * 1000);
  return (date.getFullYear() === new Date().getFullYear() ? sameYear : otherYear).format(date);
}

const STATES = {
  pending: [t`Waiting`, "faint"],
  waiting: [t`Waiting`, "faint"],
  running: [t`Running`, "accent"],
  completed: [t`Finished`, "good"],
  complete: [t`Finished`, "good"],
  finished: [t`Finished`, "good"],
  stopped: [t`Stopped early`, "good"],
  cancelled: [t`Stopped`, "fair"],
  paused: [t`Paused`, "fair"],
  interrupted: [t`Interrupted`, "fair"],
  failed: [t`Failed`, "bad"],
};
/** The word for a state of a job or a run, and its colour; a run, and a job that trains, is of the kind "train". */
export const stateWords = (state, kind = "train") =>
  state === "running" && kind === "train" ? [t`Training`, "accent"] : (STATES[state] ?? [capital(state), "fair"]);

/** A name that folders and files may have. */
export function slug(text) {
  return text
    .normalize("NFKD")
    .replace(/\p{M}/gu, "")
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 48);
}

/** The value of a setting as text. */
export function valueWords(value) {
  if (value === null || value === undefined || value === "") return t`automatic`;
  if (value === true) return t`on`;
  if (value === false) return t`off`;
  if (typeof value === "number")
    return Math.abs(value) > 0 && Math.abs(value) < 0.001 ? value.toExponential().replace("e-", "e−") : String(value);
  return Array.isArray(value) ? value.map(valueWords).join(", ") : String(value);
}

/** The name of a setting as words: "batch_size" → "Batch size". */
export const nameWords = (name) => translated(capital(name).replaceAll("_", " "));
