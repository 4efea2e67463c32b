// ZIP files of photos, opened in the browser, so that what is in them is taken as if its folder had been dropped.
import { t } from "./language.mjs";

const END = 0x06054b50;
const ENTRY = 0x02014b50;
const END_BYTES = 22; // without its comment, which has at most 64 kB
const STORED = 0;
const DEFLATED = 8;

export const ARCHIVE = ".zip";
export const isArchive = (path) => path.toLowerCase().endsWith(ARCHIVE);
/** A path without the suffix of an archive. */
export const withoutArchive = (path) => (isArchive(path) ? path.slice(0, -ARCHIVE.length) : path);

const known = new WeakMap(); // what is in an archive, which a new set asks for before it is sent

/**
 * The files in an archive, without hidden ones: a list of {file, path}. Throws an error whose message is the reason, as
 * that of other files that are left out.
 *
 * @param {File} archive
 */
export function unpacked(archive) {
  if (!known.has(archive)) known.set(archive, opened(archive));
  return known.get(archive);
}

async function opened(archive) {
  const found = [];
  for (const entry of await entriesOf(archive)) {
    if (/(^|\/)(\.|__MACOSX\/)|\/$/.test(entry.path)) continue;
    if (entry.isEncrypted) throw new Error(t`is protected by a password; pack it without one`);
    const content = await contentOf(archive, entry);
    if (content?.size !== entry.size) throw damaged();
    found.push({ file: new File([content], entry.path.split("/").pop()), path: entry.path });
  }
  return found;
}

const damaged = () => new Error(t`cannot be unpacked; pack it again`);

/** What the directory at the end of an archive says. */
async function entriesOf(archive) {
  const tail = await viewOf(archive.slice(-END_BYTES - 0xffff));
  let end = tail.byteLength - END_BYTES;
  while (end >= 0 && tail.getUint32(end, true) !== END) end -= 1;
  if (end < 0) throw damaged();
  const start = tail.getUint32(end + 16, true);
  const directory = await viewOf(archive.slice(start, start + tail.getUint32(end + 12, true)));
  const entries = [];
  for (let at = 0; at + 46 <= directory.byteLength; ) {
    const short = (place) => directory.getUint16(at + place, true);
    const long = (place) => directory.getUint32(at + place, true);
    if (long(0) !== ENTRY || at + 46 + short(28) > directory.byteLength) throw damaged();
    entries.push({
      path: new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, short(28))).replaceAll("\\", "/"),
      isEncrypted: Boolean(short(8) & 1),
      method: short(10),
      packed: long(20),
      size: long(24),
      offset: long(42),
    });
    at += 46 + short(28) + short(30) + short(32);
  }
  if (entries.length !== tail.getUint16(end + 10, true)) throw damaged();
  return entries;
}

/** The content of an entry, null if it is damaged. */
async function contentOf(archive, { offset, packed, method }) {
  const header = await viewOf(archive.slice(offset, offset + 30));
  if (header.byteLength < 30) return null;
  const start = offset + 30 + header.getUint16(26, true) + header.getUint16(28, true);
  const content = archive.slice(start, start + packed);
  if (method === STORED) return content;
  if (method !== DEFLATED) return null;
  const stream = content.stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).blob().catch(() => null);
}

const viewOf = async (blob) => new DataView(await blob.arrayBuffer());
