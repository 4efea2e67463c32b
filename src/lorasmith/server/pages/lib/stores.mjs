// Values that several parts of the page share.
import { useEffect, useState } from "./html.mjs";

/**
 * @template T
 * @typedef {{
 *   get: () => T,
 *   set: (next: T | ((before: T) => T)) => void,
 *   subscribe: (reader: (value: T) => unknown) => () => void,
 * }} Store
 */

/**
 * A value that tells its readers when it is replaced.
 *
 * @template T
 * @param {T} initial
 * @returns {Store<T>}
 */
export function createStore(initial) {
  let value = initial;
  const readers = new Set();
  return {
    get: () => value,
    set(next) {
      value = next instanceof Function ? next(value) : next;
      for (const reader of [...readers]) reader(value);
    },
    subscribe(reader) {
      readers.add(reader);
      return () => readers.delete(reader);
    },
  };
}

/**
 * The value of a store; the component is drawn again when it is replaced.
 *
 * @template T
 * @param {Store<T>} store
 */
export function useStore(store) {
  const [value, setValue] = useState(store.get);
  useEffect(() => {
    setValue(() => store.get());
    return store.subscribe((next) => setValue(() => next));
  }, [store]);
  return value;
}

/** {lost}: whether the server does not answer. */
export const connection = createStore({ lost: false });
/** The answer to GET /status, null before the first one. */
export const status = createStore(/** @type {Api.StatusAnswer | null} */ (null));
/** The jobs by id and the queue, null before the first answer. */
export const work = createStore(
  /** @type {{ jobs: Map<string, Api.JobAnswer>, queue: Api.QueueCounts } | null} */ (null),
);

/**
 * The job of an answer, with what was heard of it since it was asked for, which is newer; `asked` is what was known
 * then.
 */
export function newest(job, asked, now) {
  const heard = now?.jobs.get(job.id);
  return heard === asked?.jobs.get(job.id) ? { ...heard, ...job } : { ...job, ...heard };
}

/** A short message at the edge of the page. */
export const toast = createStore(
  /** @type {{ text: string, mood: string, undo: (() => unknown) | null } | null} */ (null),
);
/** Text that screen readers read out when it changes. */
export const announcement = createStore("");

let toastTimer = 0;
/**
 * @param {string} text
 * @param {{ mood?: string, undo?: (() => unknown) | null }} [options]
 */
export function say(text, { mood = "good", undo = null } = {}) {
  clearTimeout(toastTimer);
  toast.set({ text, mood, undo });
  toastTimer = setTimeout(() => toast.set(null), undo ? 12000 : 6000);
}

/**
 * Runs a change; its failure is said at the edge of the page.
 *
 * @template T
 * @param {() => T} change
 */
export async function said(change) {
  try {
    return await change();
  } catch (failure) {
    return say(failure.message, { mood: "bad" });
  }
}
