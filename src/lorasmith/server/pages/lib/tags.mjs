// Tags: the parts of a caption between commas.
import { textsOf } from "./json_caption.mjs";

/** Whether a caption is parts between commas: not several lines, which are several captions, and not JSON. */
export const isTagged = (caption) => !caption.includes("\n") && textsOf(caption) === null;

/** The tags of a caption; none of one that has no such parts. */
export const tagsOf = (caption) =>
  isTagged(caption)
    ? caption
        .split(",")
        .map((one) => one.trim())
        .filter(Boolean)
    : [];

const same = (a, b) => a.toLowerCase() === b.toLowerCase();
export const hasTag = (caption, tag) => tagsOf(caption).some((one) => same(one, tag));
export const withoutTag = (caption, tag) =>
  tagsOf(caption)
    .filter((one) => !same(one, tag))
    .join(", ");
export const withTag = (caption, tag) => (hasTag(caption, tag) ? caption : [...tagsOf(caption), tag.trim()].join(", "));

/** The tags of some captions with their numbers, the most frequent first: [[tag, number]]. */
export function counted(captions) {
  const found = new Map();
  for (const caption of captions) {
    for (const tag of new Map(tagsOf(caption).map((one) => [one.toLowerCase(), one])).values()) {
      const [first, number] = found.get(tag.toLowerCase()) ?? [tag, 0];
      found.set(tag.toLowerCase(), [first, number + 1]);
    }
  }
  return [...found.values()].sort((a, b) => b[1] - a[1]);
}
