// What was done to the photos of a folder on this page, and how each of it is taken back.
import { t } from "./language.mjs";
import { createStore, said, say, toast } from "./stores.mjs";

const MOST = 100;

/**
 * @typedef {{ text: string, undo: () => unknown, key: string | null, before: string | null, photos: Pale[] }} Done
 * @typedef {{ image: Api.PictureRow, picture: string }} Pale a photo that was left out, and the address of a copy
 */

/** @type {Map<string, import("./stores.mjs").Store<Done[]>>} */
const stores = new Map();

/**
 * What can be undone of a folder, the last one at the end.
 *
 * @returns {import("./stores.mjs").Store<Done[]>}
 */
export function doneTo(dataset) {
  const store = stores.get(dataset) ?? createStore(/** @type {Done[]} */ ([]));
  stores.set(dataset, store);
  return store;
}

/**
 * Notes what was done, and says it with a button that takes it back.
 *
 * @param {string} dataset
 * @param {string} text
 * @param {() => unknown} undo takes it back; may return a promise, whose failure is said
 * @param {{ key?: string | null, before?: string | null, quiet?: boolean, photos?: Pale[] }} [options] `key` of changes
 *   that are one if they follow each other, such as typing; `before` is what the first of them replaced; whether
 *   nothing is said; `photos` that were left out
 */
export function did(dataset, text, undo, { key = null, before = null, quiet = false, photos = [] } = {}) {
  const entry = { text, undo, key, before, photos };
  doneTo(dataset).set((all) =>
    [...(key !== null && all.at(-1)?.key === key ? all.slice(0, -1) : all), entry].slice(-MOST),
  );
  if (!quiet) say(text, { undo: () => takeBack(dataset, entry) });
}

/** Takes back the last thing that was done to a folder. */
export function undoLast(dataset) {
  const last = doneTo(dataset).get().at(-1);
  return last && takeBack(dataset, last);
}

export async function takeBack(dataset, entry) {
  doneTo(dataset).set((all) => all.filter((one) => one !== entry));
  toast.set(null);
  await said(async () => {
    await entry.undo();
    say(t`Undone: ${entry.text}`);
  });
}
