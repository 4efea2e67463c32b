// The shared worker: all tabs of a browser have one connection to the server's events, as it has six for all of them.
import { EventHub } from "./event_hub.mjs";

const hub = new EventHub(new URL("../../lorasmith/v1/events", import.meta.url).href);

addEventListener("connect", (event) => {
  const [port] = /** @type {MessageEvent} */ (event).ports;
  const client = { send: (message) => port.postMessage(message) };
  port.onmessage = ({ data }) => (data.isLeaving ? hub.leave(client) : hub.watch(client, data.topics));
  port.postMessage({ type: "ready" });
});
