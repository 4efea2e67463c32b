// What pictures can be of: the question of the contact sheet, and what follows from its answer.
import { t } from "./language.mjs";

const SUBJECT = {
  teaches: /** @type {const} */ ("subject"),
  ask: t`What will you call it in prompts?`,
  help: t`Two words: one of your own, and what it is.`,
  enough: 10,
};

/**
 * The answers, as a draft keeps them. `settings` are those that one adds; `ask`, `such` and `help` are of the trigger;
 * `enough` is the number of pictures or pairs that are a good start; `follows` says on later steps what it decides.
 *
 * @typedef {"person" | "pet" | "thing" | "style" | "edit" | "slider"} Kind
 * @type {Record<Kind, {
 *   title: string, icon: string, teaches: "" | "subject" | "style", isPairs?: boolean, settings?: Record<string, any>,
 *   ask: string, such: string, help: string, enough: number, follows: string,
 * }>}
 */
export const KINDS = {
  person: {
    ...SUBJECT,
    title: t`Person`,
    icon: "person",
    ask: t`What will you call them in prompts?`,
    such: "ohwx woman",
    follows: t`A person: the name goes in front of every caption, and one subject is learnt.`,
  },
  pet: {
    ...SUBJECT,
    title: t`Pet`,
    icon: "pet",
    such: "milo cat",
    follows: t`A pet: its name goes in front of every caption, and one subject is learnt.`,
  },
  thing: {
    ...SUBJECT,
    title: t`Thing`,
    icon: "thing",
    such: "zibo chair",
    follows: t`A thing: its name goes in front of every caption, and one subject is learnt.`,
  },
  style: {
    ...SUBJECT,
    title: t`Style`,
    icon: "style",
    teaches: "style",
    such: "zibo ink style",
    help: t`One word of your own, and “style”.`,
    enough: 12,
    settings: { caption_dropout: 0.1 },
    follows: t`A style: captions say what is in the pictures, and every tenth time there is none.`,
  },
  edit: {
    title: t`Before / after`,
    icon: "edit",
    teaches: "",
    isPairs: true,
    ask: t`Words in front of every request`,
    such: "",
    help: t`None are needed: each caption says what to change.`,
    enough: 10,
    follows: t`Before and after: captions say what to change, and the model must be one that edits pictures.`,
  },
  slider: {
    title: t`Slider`,
    icon: "slider",
    teaches: "",
    isPairs: true,
    ask: t`What do all pictures show?`,
    such: "a house",
    help: t`What is the same at both ends.`,
    enough: 4,
    settings: { pairs: "slider" },
    follows: t`A slider: its strength goes from one end to the other, and nothing else of the pictures is learnt.`,
  },
};

/** Settings that an answer decides. */
const DECIDED = ["pairs", "controls", "caption_dropout", "preserve", "preserve_class"];

/** Settings that the page asks for in other places than among all of them. */
const ASKED = [...DECIDED.filter((name) => name !== "caption_dropout"), "masks", "training_adapter", "image_repeats"];

/**
 * The settings of a draft that follow from what the page asked, so that nobody changed them among all settings.
 *
 * @param {Api.Draft} draft
 * @param {Kind | ""} kind
 * @param {Record<string, any>} usual values without the draft's
 */
export const unchanged = ({ settings }, kind, usual) =>
  Object.keys(settings).filter(
    (name) =>
      ASKED.includes(name) ||
      settings[name] === usual[name] ||
      (kind && KINDS[kind].settings?.[name] === settings[name]),
  );

/**
 * What a draft says that its pictures are of; empty if nothing does.
 *
 * @param {Api.Draft} draft
 * @param {boolean} isPairs
 * @returns {Kind | ""}
 */
export function kindOf({ what, teaches, settings }, isPairs) {
  if (isPairs) return settings.pairs === "slider" ? "slider" : "edit";
  return what && !KINDS[what].isPairs ? what : teaches === "style" ? "style" : "";
}

/**
 * The changes of a draft by an answer.
 *
 * @param {Api.Draft} draft
 * @param {Kind} what
 */
export function answered(draft, what) {
  const { teaches, isPairs = false, settings } = KINDS[what];
  const others = Object.entries(draft.settings).filter(([name]) => !DECIDED.includes(name));
  return { what, teaches, pairs: isPairs, settings: { ...Object.fromEntries(others), ...settings } };
}

/**
 * Whether nothing says what pictures show: neither a trigger nor a caption, where captions are their files'.
 *
 * @param {Api.Draft} draft
 * @param {Api.PictureRow[]} images
 */
export const isNameless = ({ trigger, settings }, images, captionOf = (one) => one.caption) =>
  images.length > 0 &&
  !trigger.trim() &&
  (settings.captions ?? "files") === "files" &&
  !images.some((one) => captionOf(one).trim());

/** The class of a subject: the last word of its trigger, such as cat; empty for a trigger of one word. */
const classOf = (trigger) => /\s(\S+)$/.exec(trigger.trim())?.[1] ?? "";

/**
 * The settings of a draft by which others of its subject's class stay as they were, or without them; and that class.
 *
 * @param {Api.Draft} draft
 */
export function preserving({ settings: { preserve, preserve_class, ...others }, trigger }, isKept) {
  const name = classOf(trigger);
  return isKept && name ? { ...others, preserve: "class", preserve_class: name } : others;
}
