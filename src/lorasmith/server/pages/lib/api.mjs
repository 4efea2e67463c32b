// Requests to the server. Every failure is an ApiError whose message is a sentence for people.
import { t } from "./language.mjs";
import { connection } from "./stores.mjs";

const ROOT = new URL("lorasmith/v1/", document.baseURI);

export class ApiError extends Error {
  /** @param {any} [details] */
  constructor(kind, message, status = 0, details = null) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.details = details;
  }
}

/**
 * The address of a part of the API, from path segments (escaped here) and a query.
 *
 * @param {(Api.Get | Api.Post | Api.Put | Api.Delete)["path"] | ["runs", string, "files"]} segments
 * @param {Record<string, any>} [query]
 */
export function address(segments, query = {}) {
  const url = new URL(segments.map(encodeURIComponent).join("/"), ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  return url.href;
}

/** The address of a file of a run, whose name may have folders; of a picture with a `width` that of a small version. */
export function fileOfRun(run, file, width = 0) {
  const path = file.split("/").map(encodeURIComponent).join("/");
  return `${address(["runs", run, "files"])}/${path}${width ? `?width=${width}` : ""}`;
}

/**
 * @template {Api.Get["path"]} P
 * @param {P} segments
 * @param {Api.Of<Api.Get, P>["query"]} [query]
 * @param {AbortSignal} [signal]
 * @returns {Promise<Api.Of<Api.Get, P>["answer"]>}
 */
export const get = (segments, query, signal) => request("GET", address(segments, query), { signal });

/**
 * @template {Api.Post["path"]} P
 * @param {P} segments
 * @param {Api.Of<Api.Post, P>["body"]} [body]
 * @returns {Promise<Api.Of<Api.Post, P>["answer"]>}
 */
export const post = (segments, body) => request("POST", address(segments), { body: body ?? {} });

/**
 * @template {Api.Put["path"]} P
 * @param {P} segments
 * @param {Api.Of<Api.Put, P>["body"]} body
 * @param {{ keepalive?: boolean }} [options]
 * @returns {Promise<Api.Of<Api.Put, P>["answer"]>}
 */
export const put = (segments, body, { keepalive } = {}) => request("PUT", address(segments), { body, keepalive });

/**
 * @template {Api.Delete["path"]} P
 * @param {P} segments
 * @returns {Promise<Api.Of<Api.Delete, P>["answer"]>}
 */
export const remove = (segments) => request("DELETE", address(segments), {});

/**
 * @param {string} method
 * @param {string} url
 * @param {{ body?: unknown, signal?: AbortSignal, keepalive?: boolean }} options
 * @returns {Promise<any>}
 */
async function request(method, url, { body, signal, keepalive }) {
  /** @type {RequestInit & { headers: Record<string, string> }} */
  const options = { method, signal, keepalive, headers: { Accept: "application/json" } };
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection.set({ lost: true });
    throw new ApiError(
      "offline",
      t`The server does not answer. If it was stopped, start it again with: lorasmith serve`,
    );
  }
  if (connection.get().lost) connection.set({ lost: false });
  if (response.ok) return response.status === 204 ? null : response.json();
  let found;
  try {
    found = (await response.json()).error;
  } catch {
    // Not one of the API's own errors.
  }
  if (found?.message)
    throw new ApiError(found.kind ?? "error", sentence(found.message), response.status, found.details);
  throw new ApiError(
    "error",
    t`The server answered with an error (${response.status} ${response.statusText}).`,
    response.status,
  );
}

/**
 * A message as a sentence: a capital at its start (unless it starts with a name such as sd-scripts), a full stop at
 * its end.
 */
export function sentence(text) {
  const trimmed = String(text).trim();
  if (!trimmed) return trimmed;
  const isWord = /^[a-z]+(?=[ ,:;.?!]|$)/.test(trimmed);
  return (isWord ? trimmed[0].toUpperCase() + trimmed.slice(1) : trimmed) + (/[.!?…:`]\)?$/.test(trimmed) ? "" : ".");
}
