// What is chosen for a training that is not started yet. The server keeps it for each folder of photos, so that all
// pages agree.
import { ApiError, get, put } from "./api.mjs";
import { useEffect } from "./html.mjs";
import { listen } from "./live.mjs";
import { createStore, say, useStore } from "./stores.mjs";

const SEND_AFTER_MS = 300;
const TEXTS = ["name", "trigger"]; // typed, so that two of them are shown instead of one of them lost
const OLD_KEY = "lorasmith.draft."; // of the browser's storage, where earlier pages kept them

const NOTHING = { seen: null, mine: null, theirs: {}, version: -1 };

const drafts = new Map();

/**
 * The draft of a folder: a store of {seen, mine, theirs, version}, `seen` null until it is loaded; `theirs` are texts
 * of others that `mine` differs from.
 */
function draftOf(dataset) {
  if (!drafts.has(dataset)) drafts.set(dataset, new Draft(dataset));
  return drafts.get(dataset);
}

class Draft {
  constructor(dataset) {
    this.dataset = dataset;
    this.store = createStore(NOTHING);
    this.isGone = false; // its folder was removed; what is loaded next is of another one
    this.timer = 0;
    this.sending = null;
  }

  async load(signal) {
    const answer = await get(["datasets", this.dataset, "draft"], {}, signal);
    this.#take(answer);
    const old = answer.version === 0 ? oldDraft(this.dataset) : null;
    if (old) this.change(old);
  }

  change(parts) {
    this.store.set((all) => ({ ...all, mine: { ...all.mine, ...parts } }));
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.send(), SEND_AFTER_MS);
  }

  /** Keep what is typed here, or take what is there, of a text that both have changed. */
  choose(name, isMine) {
    const { theirs, mine } = this.store.get();
    const { [name]: text, ...others } = theirs;
    this.store.set((all) => ({ ...all, theirs: others }));
    this.change({ [name]: isMine ? mine[name] : text });
  }

  /**
   * Store what is changed here; resolves when it is stored, or refused. A page that is left cannot wait for an
   * earlier answer.
   */
  async send({ isLeaving = false } = {}) {
    clearTimeout(this.timer);
    while (this.sending && !isLeaving) await this.sending;
    const { seen, mine, theirs } = this.store.get();
    if (!seen || this.isGone) return;
    const draft = { ...mine, ...Object.fromEntries(Object.keys(theirs).map((name) => [name, seen[name]])) };
    if (same(draft, seen)) return;
    this.sending = put(["datasets", this.dataset, "draft"], { draft, seen }, { keepalive: true }).then(
      (answer) => this.#take(answer, draft),
      (failure) => {
        if (!(failure instanceof ApiError)) throw failure;
        if (failure.kind === "StaleDraftError") this.#take(failure.details);
        else say(failure.message, { mood: "bad" });
        return failure.kind === "StaleDraftError";
      },
    );
    const isAgain = await this.sending.finally(() => (this.sending = null));
    if (isAgain) await this.send();
  }

  async hear({ draft, version }) {
    while (this.sending) await this.sending; // its answer is the newer one
    if (!draft)
      this.isGone = true; // a view may still show it
    else if (this.isGone || version > this.store.get().version) this.#take({ draft, version });
  }

  /** Take what the server has; `sent` is what it was made from here. */
  #take({ draft, version }, sent = null) {
    const { seen, mine, theirs } = this.isGone ? NOTHING : this.store.get();
    this.isGone = false;
    if (!seen) {
      this.store.set({ seen: draft, mine: { ...draft, ...mine }, theirs, version });
      return;
    }
    const base = sent ?? seen;
    const next = { ...draft, settings: rebased(base.settings, mine.settings, draft.settings) };
    const others = { ...theirs };
    for (const name of Object.keys(draft)) {
      if (name === "settings" || same(mine[name], draft[name])) continue;
      if (same(mine[name], base[name]) && !(name in theirs)) continue; // only they have changed it
      if (same(draft[name], base[name]) && !(name in theirs))
        next[name] = mine[name]; // only this page has
      else if (TEXTS.includes(name)) {
        next[name] = mine[name];
        others[name] = draft[name];
      }
    }
    for (const name of Object.keys(others)) if (same(next[name], draft[name])) delete others[name];
    this.store.set({ seen: draft, mine: next, theirs: others, version });
  }
}

/** `theirs` with what `mine` changes of `base`, by name. */
function rebased(base, mine, theirs) {
  const names = new Set([...Object.keys(base), ...Object.keys(mine), ...Object.keys(theirs)]);
  return Object.fromEntries(
    [...names]
      .map((name) => [
        name,
        same(mine[name], base[name]) || !same(theirs[name], base[name]) ? theirs[name] : mine[name],
      ])
      .filter(([, value]) => value !== undefined),
  );
}

const same = (a, b) => sorted(a ?? null) === sorted(b ?? null);
const sorted = (value) =>
  JSON.stringify(value, (_, one) =>
    one && typeof one === "object" && !Array.isArray(one) ? Object.fromEntries(Object.entries(one).sort()) : one,
  );

function oldDraft(dataset) {
  try {
    const { isChosen, ...stored } = JSON.parse(localStorage.getItem(OLD_KEY + dataset));
    localStorage.removeItem(OLD_KEY + dataset);
    return { ...stored, is_chosen: isChosen ?? false };
  } catch {
    return null;
  }
}

listen(
  "",
  { draft: (notice) => drafts.get(notice.dataset)?.hear(notice) },
  {
    onOpen: () => {
      // What fails here is done when the connection is back.
      for (const draft of drafts.values())
        if (draft.store.get().seen)
          draft
            .load()
            .then(() => draft.send())
            .catch(() => {});
    },
  },
);
addEventListener("pagehide", () => {
  for (const draft of drafts.values()) draft.send({ isLeaving: true });
});

/** Loads the draft of a folder; raises an ApiError, of status 404 where there is no such folder. */
export const loadDraft = (dataset, signal) => draftOf(dataset).load(signal);

/** The draft of a folder, which is loaded, and a function that changes parts of it. */
export function useDraft(dataset) {
  const draft = draftOf(dataset);
  const { mine } = useStore(draft.store);
  useEffect(() => () => void draft.send(), [dataset]); // at once when the view is left
  return [mine, (parts) => draft.change(parts)];
}

/**
 * Texts that were changed elsewhere while others were typed here, by name, and a function that chooses (name, whether
 * it is the one here).
 */
export function useConflicts(dataset) {
  const draft = draftOf(dataset);
  return [useStore(draft.store).theirs, (name, isMine) => draft.choose(name, isMine)];
}

/** The draft of a folder, which is loaded if it is not. */
export async function currentDraft(dataset) {
  const draft = draftOf(dataset);
  if (!draft.store.get().seen || draft.isGone) await draft.load();
  return draft.store.get().mine;
}

/** Changes parts of a draft that no view shows, and stores them. */
export async function changeDraft(dataset, parts) {
  await currentDraft(dataset);
  draftOf(dataset).change(parts);
  await draftOf(dataset).send();
}
