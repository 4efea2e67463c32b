// Photos on their way to the server. They outlive the view that started them.
import { ApiError, post } from "./api.mjs";
import { createStore } from "./stores.mjs";

const AT_ONCE = 3;
const PICTURE = /\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic|heif|jxl)$/i;
const VIDEO = /\.(mp4|avi|mov|webm|mkv|flv)$/i;
const stores = new Map();
/** Paths of files that were dropped and are neither pictures to train on nor captions, by dataset. */
export const leftOut = createStore({});
let lastKey = 0;

export const isPicture = ({ file, path }) => PICTURE.test(path) || file.type.startsWith("image/");

/** The number of the folder for controls, the pictures before an edit, that a file is in: 0 for `control`, 1 for `control_1`; null if it is in none. */
function controlFolder(path) {
  const found = /(^|\/)control(_([1-9]))?\//.exec(path);
  return found && Number(found[3] ?? 0);
}

const stem = (path) => path.replace(/\.[^./]*$/, "");
const suffix = (path) => path.slice(stem(path).length);

export const isVideo = (path) => VIDEO.test(path);

/** Uploads of a dataset: a store of [{key, name, preview, isBefore, state: "waiting"|"sending"|"done"|"skipped", reason, file, captionFault, replaced}]. */
export function uploadsOf(dataset) {
  if (!stores.has(dataset)) stores.set(dataset, createStore([]));
  return stores.get(dataset);
}

/**
 * Starts to send pictures, each with the caption beside it; those in folders for controls as controls.
 *
 * @param files [{file, path}], with the path inside the dropped folder
 * @param before null for pictures to train on; "" for pictures before an edit, by their names; or the picture that the
 *   first of them is before
 * @returns the uploads, as of `uploadsOf`
 */
export function upload(dataset, files, before = null) {
  const captions = new Map(files.filter(({ path }) => /\.txt$/i.test(path)).map((one) => [stem(one.path), one.file]));
  const all = files.filter(isPicture);
  const pictures = before ? all.slice(0, 1) : all;
  const hasOthers = all.some(({ path }) => controlFolder(path) === null); // a dropped folder may have that name itself
  const store = uploadsOf(dataset);
  const entries = pictures.map(({ file, path }) => {
    const name = path.split("/").pop();
    const number = controlFolder(path) ?? 0;
    const isBefore = before !== null || (hasOthers && controlFolder(path) !== null);
    const sent = before ? stem(before) + suffix(name) : number ? `${stem(name)}_${number}${suffix(name)}` : name;
    return {
      key: ++lastKey, name, preview: URL.createObjectURL(file), state: "waiting", reason: "", isBefore,
      sent: isBefore ? `control/${sent}` : name, picture: file, caption: isBefore ? null : captions.get(stem(path)) ?? null, file: null,
    };
  });
  store.set((before) => [...before, ...entries]);
  const waiting = [...entries];
  const work = async () => {
    for (let entry = waiting.shift(); entry; entry = waiting.shift()) {
      if (store.get().some((one) => one.key === entry.key)) await send(dataset, store, entry);
    }
  };
  for (let worker = 0; worker < AT_ONCE; worker += 1) work();
  const used = new Set([...pictures, ...files.filter(({ path }) => /\.txt$/i.test(path))]);
  leftOut.set((before) => ({ ...before, [dataset]: files.filter((one) => !used.has(one)).map(({ path }) => path) }));
  return entries;
}

async function send(dataset, store, entry) {
  const change = (parts) => store.set((all) => all.map((one) => (one.key === entry.key ? { ...one, ...parts } : one)));
  change({ state: "sending" });
  const body = new FormData();
  body.append("file", entry.picture, entry.sent);
  if (entry.caption) body.append("file", entry.caption, entry.name.replace(/\.[^.]*$/, ".txt"));
  try {
    const answer = await post(["datasets", dataset, "images"], body);
    const skipped = answer.skipped?.find((one) => !/\.txt$/i.test(one.file)) ?? answer.skipped?.[0];
    const added = answer.added?.find((file) => !/\.txt$/i.test(file));
    const captionFault = answer.skipped?.find((one) => /\.txt$/i.test(one.file))?.reason ?? "";
    if (added) change({ state: "done", file: added, captionFault, replaced: answer.replaced?.[added] ?? null });
    else change({ state: "skipped", reason: skipped?.reason ?? "The server did not take this file." });
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    change({ state: "skipped", reason: error.message });
  }
}

/** Forgets an upload and the memory of its preview. */
export function forget(dataset, key) {
  const store = uploadsOf(dataset);
  const entry = store.get().find((one) => one.key === key);
  if (entry) URL.revokeObjectURL(entry.preview);
  store.set((all) => all.filter((one) => one.key !== key));
}

/** The files of a drop, folders opened: a list of {file, path}. Call it before anything is awaited. */
export async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, path: file.name }));
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

async function walk(entry, folder, found) {
  if (entry.name.startsWith(".")) return;
  const path = folder + entry.name;
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject)).catch(() => null);
    if (file) found.push({ file, path });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!some.length) return;
    for (const one of some) await walk(one, `${path}/`, found);
  }
}

/** The files of a file input: a list of {file, path}. */
export const filesOfInput = (input) => [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
