// Photos on their way to the server. They outlive the view that started them.
import { ApiError, get, post } from "./api.mjs";
import { ARCHIVE, isArchive, unpacked } from "./archives.mjs";
import { changeDraft, currentDraft } from "./drafts.mjs";
import { useEffect, useState } from "./html.mjs";
import { t } from "./language.mjs";
import { createStore } from "./stores.mjs";

/** A file, with the path inside the dropped folder. @typedef {{ file: File, path: string }} Sent */

const AT_ONCE = 3;
const stores = new Map();
/** [{name, reason}] of files that were not added, by dataset. */
export const leftOut = createStore({});
let lastKey = 0;
/** @type {Promise<Api.FormatsAnswer> | null} */
let asked = null;

/** What the server reads: {pictures, captions, refused}, asked for once. */
const formats = () =>
  (asked ??= get(["formats"]).catch((error) => {
    asked = null;
    throw error;
  }));

/** The types of pictures that a file input offers, and of captions and archives if it takes them. */
export function useAccept(withCaptions = false) {
  const [read, setRead] = useState(null);
  useEffect(() => void formats().then(setRead, () => {}), []);
  const others = withCaptions ? [...(read?.captions ?? []), ARCHIVE] : [];
  return ["image/*", ...(read?.pictures ?? []), ...others].join(",");
}

/**
 * Files by what becomes of them; archives are opened.
 *
 * @param {Sent[]} files
 */
export async function sorted(files) {
  const read = await formats();
  /** @type {{ pictures: Sent[], captions: Sent[], masks: Sent[], refused: { name: string, reason: string }[] }} */
  const found = { pictures: [], captions: [], masks: [], refused: [] };
  const waiting = [...files];
  for (let one = waiting.shift(); one; one = waiting.shift()) {
    const kind = suffix(one.path).toLowerCase();
    if (isArchive(one.path))
      await unpacked(one.file).then(
        (inner) => waiting.unshift(...inner.filter(({ path }) => !isArchive(path))),
        (error) => found.refused.push({ name: nameOf(one.path), reason: error.message }),
      );
    else if (read.captions.includes(kind)) found.captions.push(one);
    else if (kind in read.refused) found.refused.push({ name: nameOf(one.path), reason: read.refused[kind] });
    else if (read.pictures.includes(kind) || one.file.type.startsWith("image/"))
      (isMask(one.path) ? found.masks : found.pictures).push(one);
    else found.refused.push({ name: nameOf(one.path), reason: t`is not a picture` });
  }
  return found;
}

/**
 * The number of the folder for controls, the pictures before an edit, that a file is in: 0 for `control`, 1 for
 * `control_1`; null if it is in none.
 */
function controlFolder(path) {
  const found = /(^|\/)control(_([1-9]))?\//.exec(path);
  return found && Number(found[3] ?? 0);
}

/** Whether a file is a mask, by its name. */
export const isMask = (name) => /\.mask\.[^.]+$/i.test(name);
/** Has masks used by the training, when some were added. */
export async function trainWithMasks(dataset) {
  const { settings } = await currentDraft(dataset);
  await changeDraft(dataset, { settings: { ...settings, masks: "files" } });
}

const stem = (path) => path.replace(/\.[^./]*$/, "");
const suffix = (path) => path.slice(stem(path).length);
const nameOf = (path) => path.split("/").pop();

/**
 * Uploads of a dataset: a store of [{key, name, preview, isBefore, state: "waiting"|"sending"|"done", file,
 * replaced}].
 */
export function uploadsOf(dataset) {
  if (!stores.has(dataset)) stores.set(dataset, createStore([]));
  return stores.get(dataset);
}

/**
 * Starts to send pictures, each with caption and mask, those in folders for controls as controls; then captions and
 * masks of pictures that are there already. What is not added goes to `leftOut`.
 *
 * @param {string} dataset
 * @param {Sent[]} files
 * @param {string | null} before null for pictures to train on; "" for pictures before an edit, by their names; or the
 *   picture that the first of them is before
 * @param {(answer: Api.UploadAnswer) => unknown} onOthers called with what has become of masks and those captions
 * @returns the uploads, as of `uploadsOf`, when they have begun
 */
export async function upload(dataset, files, before = null, onOthers = () => {}) {
  const { pictures: all, captions: texts, masks, refused } = await sorted(files);
  leaveOut(dataset, refused);
  const captions = new Map(texts.map((one) => [stem(one.path), one.file]));
  const masked = new Map(masks.map((one) => [stem(stem(one.path)), one.file]));
  const pictures = before ? all.slice(0, 1) : all;
  const hasOthers = all.some(({ path }) => controlFolder(path) === null); // a dropped folder may have that name itself
  const store = uploadsOf(dataset);
  const entries = pictures.map(({ file, path }) => {
    const name = nameOf(path);
    const number = controlFolder(path) ?? 0;
    const isBefore = before !== null || (hasOthers && controlFolder(path) !== null);
    const sent = before ? stem(before) + suffix(name) : number ? `${stem(name)}_${number}${suffix(name)}` : name;
    return {
      key: ++lastKey,
      name,
      preview: URL.createObjectURL(file),
      state: "waiting",
      isBefore,
      sent: isBefore ? `control/${sent}` : name,
      picture: file,
      caption: isBefore ? null : (captions.get(stem(path)) ?? null),
      mask: isBefore ? null : (masked.get(stem(path)) ?? null),
      file: null,
    };
  });
  store.set((before) => [...before, ...entries]);
  const waiting = [...entries];
  const work = async () => {
    for (let entry = waiting.shift(); entry; entry = waiting.shift()) {
      if (store.get().some((one) => one.key === entry.key)) await send(dataset, store, entry, onOthers);
    }
  };
  const stems = new Set(pictures.map(({ path }) => stem(path)));
  const others = [
    ...masks.filter(({ path }) => !stems.has(stem(stem(path)))),
    ...texts.filter(({ path }) => !stems.has(stem(path))),
  ];
  Promise.all(Array.from({ length: AT_ONCE }, work)).then(async () => {
    const answer = others.length ? await sendOthers(dataset, others) : null;
    if (answer) onOthers(answer);
  });
  return entries;
}

const leaveOut = (dataset, some) =>
  some.length && leftOut.set((before) => ({ ...before, [dataset]: [...(before[dataset] ?? []), ...some] }));

/** The reason of a failure as other reasons are: what follows the name of a file. */
function reasonOf(error) {
  if (!(error instanceof ApiError)) throw error;
  return t`was not sent: ${error.message}`;
}

async function sendOthers(dataset, others) {
  const body = new FormData();
  for (const { file, path } of others) body.append("file", file, nameOf(path));
  try {
    const answer = await post(["datasets", dataset, "images"], body);
    leaveOut(
      dataset,
      answer.skipped.map(({ file, reason }) => ({ name: file, reason })),
    );
    if (answer.added.some(isMask)) await trainWithMasks(dataset);
    return answer;
  } catch (error) {
    leaveOut(
      dataset,
      others.map(({ path }) => ({ name: nameOf(path), reason: reasonOf(error) })),
    );
  }
}

async function send(dataset, store, entry, onOthers) {
  const change = (parts) => store.set((all) => all.map((one) => (one.key === entry.key ? { ...one, ...parts } : one)));
  change({ state: "sending" });
  const body = new FormData();
  body.append("file", entry.picture, entry.sent);
  if (entry.caption) body.append("file", entry.caption, `${stem(entry.name)}.txt`);
  if (entry.mask) body.append("file", entry.mask, `${stem(entry.name)}.mask${suffix(entry.mask.name)}`);
  try {
    const answer = await post(["datasets", dataset, "images"], body);
    const added = answer.added.find((file) => !file.endsWith(".txt") && !isMask(file));
    if (entry.mask) onOthers(answer);
    if (answer.added.some(isMask)) await trainWithMasks(dataset);
    leaveOut(
      dataset,
      answer.skipped.map(({ file, reason }) => ({ name: file, reason })),
    );
    if (added) change({ state: "done", file: added, replaced: answer.replaced?.[added] ?? null });
    else forget(dataset, entry.key);
  } catch (error) {
    leaveOut(dataset, [{ name: entry.name, reason: reasonOf(error) }]);
    forget(dataset, entry.key);
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
  if (!entries.length) return visible([...transfer.files].map((file) => ({ file, path: file.name })));
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

/** Whether files can be dropped, as with a mouse: a finger drags none. */
export const canDrop = matchMedia("(any-pointer: fine)").matches;

/** The files of a file input: a list of {file, path}. */
export const filesOfInput = (input) =>
  visible([...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name })));

/** Hidden files and those in hidden folders are a system's own. */
const visible = (files) => files.filter(({ path }) => !/(^|\/)\./.test(path));
