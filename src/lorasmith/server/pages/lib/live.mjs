// Events of the server, by topic. Hidden pages listen to nothing, and load again when they are seen.
import { EventHub } from "./event_hub.mjs";
import { useEffect, useRef } from "./html.mjs";
import { connection } from "./stores.mjs";

const READY_WITHIN_MS = 10000;
const readers = new Set(); // {topic, handlers, onOpen}
/** @type {{ watch: (topics: string[] | null) => void } | null} */
let hub = null; // the shared worker, or the page's own connection

/**
 * Listens to a topic until the returned function is called: "" for all jobs, the queue, datasets and drafts, jobs/ID or
 * runs/ID for what is shown of one. `onOpen` is called when the stream has begun: at first, and after a lost connection
 * or a hidden page. Readers must accept an event twice.
 */
export const listen = (topic, handlers, { onOpen = () => {} } = {}) => added({ topic, handlers, onOpen });

/** Listens while the component is shown; `topic` null listens to nothing. */
export function useEvents(topic, handlers, { onOpen = () => {} } = {}) {
  const reader = useRef({ topic, handlers, onOpen }).current;
  Object.assign(reader, { topic, handlers, onOpen });
  useEffect(() => (topic === null ? undefined : added(reader)), [topic]);
}

function added(reader) {
  readers.add(reader);
  update();
  return () => {
    readers.delete(reader);
    update();
  };
}

let timer = 0;
let sent = "";
function update() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    hub ??= connected();
    const topics = document.hidden ? null : [...new Set([...readers].map((one) => one.topic))].filter(Boolean).sort();
    // A new reader of a topic that is watched already needs its start, too: one view has one reader of each.
    if (JSON.stringify(topics) === sent) return;
    sent = JSON.stringify(topics);
    hub.watch(topics);
  });
}

function receive({ type, name, data }) {
  if (type === "event") {
    for (const { topic, handlers } of [...readers]) if (topic === (data.topic ?? "")) handlers[name]?.(data);
  } else if (type !== "ready") {
    connection.set({ lost: type === "lost" });
    if (type === "open") for (const { onOpen } of [...readers]) onOpen();
  }
}

/** The shared worker, or a connection of this page where there is none: browsers of phones, or an error in it. */
function connected() {
  const own = () => {
    const client = { send: receive };
    const alone = new EventHub(new URL("lorasmith/v1/events", document.baseURI).href);
    return { watch: (topics) => alone.watch(client, topics) };
  };
  if (!globalThis.SharedWorker) return own();
  const worker = new SharedWorker(new URL("./shared_events.mjs", import.meta.url), {
    type: "module",
    name: "lorasmith 1",
  });
  const shared = { watch: (topics) => worker.port.postMessage({ topics }) };
  const failed = () => {
    clearTimeout(late);
    worker.port.postMessage({ isLeaving: true });
    worker.port.close();
    hub = own();
    sent = "";
    update();
  };
  const late = setTimeout(failed, READY_WITHIN_MS);
  worker.onerror = failed;
  worker.port.onmessage = ({ data }) => {
    clearTimeout(late);
    receive(data);
  };
  addEventListener("pagehide", () => worker.port.postMessage({ isLeaving: true }));
  addEventListener("pageshow", ({ persisted }) => {
    if (!persisted) return;
    sent = "";
    update();
  });
  return shared;
}

document.addEventListener("visibilitychange", update);
