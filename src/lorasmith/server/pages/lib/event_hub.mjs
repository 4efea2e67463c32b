// The one connection to the server's events, for all clients: the tabs of a browser, or the only one.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 10000;
const SETTLED_AFTER_MS = 20; // a view that opens wants several topics at once

/**
 * A client is an object with `send(message)`. It receives {type: "open"} when a stream has begun that has all of its
 * topics, from their start; {type: "lost"} while the server does not answer; and {type: "event", name, data}, of topics
 * of others too, and some twice.
 */
export class EventHub {
  #url;
  #clients = new Map(); // topics of each, null of one that is hidden
  #waiting = new Set(); // clients that wait for an "open"
  /** @type {EventSource | null} */
  #source = null;
  /** @type {EventSource | null} */
  #next = null; // a stream with other topics, which replaces the first when it has begun
  #timer = 0;
  #wait = FIRST_WAIT_MS;

  constructor(url) {
    this.#url = url;
  }

  /** Listen for a client: to all jobs, and to topics such as jobs/ID; `topics` null: to nothing. */
  watch(client, topics) {
    const before = this.#clients.get(client);
    this.#clients.set(client, topics);
    if (topics && !(before && topics.every((one) => before.includes(one)))) this.#waiting.add(client);
    this.#begin(SETTLED_AFTER_MS);
  }

  leave(client) {
    this.#clients.delete(client);
    this.#waiting.delete(client);
    this.#begin(SETTLED_AFTER_MS);
  }

  #begin(after) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#open(), after);
  }

  #open() {
    this.#next?.close();
    this.#next = null;
    const watching = [...this.#clients.values()].filter(Boolean);
    if (!watching.length) {
      this.#source?.close();
      this.#source = null;
      return;
    }
    if (this.#source && !this.#waiting.size) return; // topics that nobody watches any more stay until the next change
    const url = new URL(this.#url);
    const topics = new Set(watching.flat());
    for (const topic of topics) url.searchParams.append("topic", topic);
    const source = new EventSource(url);
    this.#next = source;
    source.onopen = () => {
      this.#wait = FIRST_WAIT_MS;
      if (source === this.#next) {
        this.#source?.close(); // only now, so that nothing is missed between the two
        this.#source = source;
        this.#next = null;
      }
      for (const client of this.#waiting) {
        if (!(this.#clients.get(client) ?? []).every((one) => topics.has(one))) continue; // it has asked for more since
        this.#waiting.delete(client);
        client.send({ type: "open" });
      }
    };
    source.onerror = () => {
      if (source !== this.#source && source !== this.#next) return;
      this.#lost();
      if (source.readyState !== EventSource.CLOSED) return; // the browser connects again by itself
      this.#source?.close();
      this.#source = null;
      this.#begin(this.#wait);
      this.#wait = Math.min(this.#wait * 2, LONGEST_WAIT_MS);
    };
    for (const name of ["job", "queue", "dataset", "check", "draft", "view", "graph", "progress", "fault"]) {
      source.addEventListener(name, (event) => {
        if (typeof event.data === "string") this.#tell({ type: "event", name, data: JSON.parse(event.data) });
      });
    }
  }

  #lost() {
    this.#tell({ type: "lost" });
    for (const [client, topics] of this.#clients) if (topics) this.#waiting.add(client);
  }

  #tell(message) {
    for (const [client, topics] of this.#clients) if (topics) client.send(message);
  }
}
