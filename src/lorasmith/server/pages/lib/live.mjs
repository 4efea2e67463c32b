// Events of the server (EventSource): the connection is watched, and closed while nobody looks.
import { useEffect } from "./html.mjs";
import { connection } from "./stores.mjs";

const open = new Set();
const broken = new Set();
const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 10000;

/**
 * Listens to a stream of events until the returned function is called.
 *
 * The browser reconnects by itself after a lost connection; after an answer with an error, or while the page was
 * hidden, the stream is opened again here, from its start, so readers must accept an event twice.
 */
export function listen(url, handlers, { onOpen, onRefused } = {}) {
  const key = {};
  let source = null;
  let timer = 0;
  let wait = FIRST_WAIT_MS;
  let ended = false;

  function start() {
    clearTimeout(timer);
    if (ended || source || document.hidden) return;
    source = new EventSource(url);
    source.onopen = () => {
      wait = FIRST_WAIT_MS;
      mark(key, false);
      onOpen?.();
    };
    source.onerror = () => {
      mark(key, true);
      if (source?.readyState !== EventSource.CLOSED) return;
      source = null;
      onRefused?.();
      timer = setTimeout(start, wait);
      wait = Math.min(wait * 2, LONGEST_WAIT_MS);
    };
    for (const [name, handler] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => {
        if (typeof event.data !== "string") return; // an error of the connection, not an event of that name
        let data;
        try {
          data = JSON.parse(event.data);
        } catch {
          return;
        }
        handler(data, event.lastEventId);
      });
    }
  }
  function pause() {
    clearTimeout(timer);
    source?.close();
    source = null;
  }
  // A browser has six connections to a server, all tabs together: hidden ones leave theirs to others.
  const seen = () => (document.hidden ? pause() : start());

  document.addEventListener("visibilitychange", seen);
  open.add(key);
  start();
  return () => {
    ended = true;
    pause();
    document.removeEventListener("visibilitychange", seen);
    open.delete(key);
    mark(key, false);
  };
}

function mark(key, isBroken) {
  if (isBroken && open.has(key)) broken.add(key);
  else broken.delete(key);
  const lost = broken.size > 0;
  if (lost !== connection.get().lost) connection.set({ lost });
}

/** Listens while the component is shown; `url` null listens to nothing. */
export function useEvents(url, handlers, options) {
  useEffect(() => (url ? listen(url, handlers, options) : undefined), [url]);
}
