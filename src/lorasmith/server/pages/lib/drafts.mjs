// What was chosen for a training that is not started yet, kept by the browser for each folder of photos.
import { useEffect, useState } from "./html.mjs";

const KEY = "lorasmith.draft.";
const EMPTY = { name: "", trigger: "", model: null, edit: null, isChosen: false, pairs: null, preset: "balanced", settings: {}, measurement: null };

export function readDraft(dataset) {
  try {
    const stored = JSON.parse(localStorage.getItem(KEY + dataset));
    return { ...EMPTY, ...stored, settings: { ...(stored?.settings ?? {}) } };
  } catch {
    return { ...EMPTY };
  }
}

export function writeDraft(dataset, draft) {
  try {
    localStorage.setItem(KEY + dataset, JSON.stringify(draft));
  } catch {
    // A browser that stores nothing: the draft lasts until the page is left.
  }
  unsaved.set(dataset, draft);
  for (const reader of readers) reader(dataset, draft);
}

const unsaved = new Map();
const readers = new Set();

/** The draft of a dataset and a function that changes parts of it. */
export function useDraft(dataset) {
  const [draft, setDraft] = useState(() => unsaved.get(dataset) ?? readDraft(dataset));
  useEffect(() => {
    setDraft(unsaved.get(dataset) ?? readDraft(dataset));
    const reader = (name, value) => name === dataset && setDraft(value);
    readers.add(reader);
    return () => readers.delete(reader);
  }, [dataset]);
  const change = (parts) => writeDraft(dataset, { ...(unsaved.get(dataset) ?? readDraft(dataset)), ...parts });
  return [draft, change];
}
