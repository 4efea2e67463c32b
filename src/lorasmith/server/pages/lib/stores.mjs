// Values that several parts of the page share.
import { useEffect, useState } from "./html.mjs";

/** A value that tells its readers when it is replaced. */
export function createStore(initial) {
  let value = initial;
  const readers = new Set();
  return {
    get: () => value,
    set(next) {
      value = typeof next === "function" ? next(value) : next;
      for (const reader of [...readers]) reader(value);
    },
    subscribe(reader) {
      readers.add(reader);
      return () => readers.delete(reader);
    },
  };
}

/** The value of a store; the component is drawn again when it is replaced. */
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
export const status = createStore(null);
/** {jobs: Map of id → job, queue: {pending, running}}, null before the first answer. */
export const work = createStore(null);

/**
 * The job of an answer, with what was heard of it since it was asked for, which is newer; `asked` is what was known
 * then.
 */
export function newest(job, asked, now) {
  const heard = now?.jobs.get(job.id);
  return heard === asked?.jobs.get(job.id) ? { ...heard, ...job } : { ...job, ...heard };
}

/** A short message at the edge of the page: {text, mood, undo}. */
export const toast = createStore(null);
/** Text that screen readers read out when it changes. */
export const announcement = createStore("");

let toastTimer = 0;
export function say(text, { mood = "good", undo = null } = {}) {
  clearTimeout(toastTimer);
  toast.set({ text, mood, undo });
  toastTimer = setTimeout(() => toast.set(null), undo ? 12000 : 6000);
}
