// What is chosen for a training that is not started yet. The server keeps it for each folder of photos, so that all
// pages agree.
import { ApiError, get, put } from "./api.mjs";
import { useEffect } from "./html.mjs";
import { listen } from "./live.mjs";
import { createStore, say, useStore } from "./stores.mjs";

const SEND_AFTER_MS = 300;
const TEXTS = ["name", "trigger"]; // typed, so that two of them are shown instead of one of them lost
const OLD_KEY = "lorasmith.draft."; // of the browser's storage, where earlier pages kept them

/**
 * What the server has, null until it is loaded; that with what is changed here; and texts of others that `mine` differs
 * from, which are not sent before somebody chooses.
 *
 * @typedef {{ seen: Api.Draft | null, mine: Api.Draft, theirs: Record<string, string>, version: number }} State
 * @type {State}
 */
const NOTHING = { seen: null, mine: /** @type {Api.Draft} */ ({}), theirs: {}, version: -1 };

/** @type {Map<string, Draft>} */
const drafts = new Map();

/** The draft of a folder. */
function draftOf(dataset) {
  const draft = drafts.get(dataset) ?? new Draft(dataset);
  drafts.set(dataset, draft);
  return draft;
}

/** The server merges what several pages change; here, what is not stored yet is laid over what it has. */
class Draft {
  constructor(dataset) {
    this.dataset = dataset;
    this.store = createStore(NOTHING);
    this.isGone = false; // its folder was removed; what is loaded next is of another one
    this.timer = 0;
    /** @type {Promise<boolean> | null} */
    this.sending = null;
  }

  /** What is to be stored; null where nothing is changed. */
  get #unsent() {
    const { seen, mine, theirs } = this.store.get();
    if (!seen || this.isGone) return null;
    const draft = { ...mine, ...Object.fromEntries(Object.keys(theirs).map((name) => [name, seen[name]])) };
    return same(draft, seen) ? null : draft;
  }

  async load(signal) {
    if (this.#unsent) return this.send(); // its answer is the newer one
    const answer = await get(["datasets", this.dataset, "draft"], {}, signal);
    const isOlder = !this.isGone && answer.version < this.store.get().version; // than what was stored meanwhile
    if (!this.#unsent && !isOlder) this.#take(answer);
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
    const draft = this.#unsent;
    const { seen } = this.store.get();
    if (!draft || !seen) return;
    this.sending = put(["datasets", this.dataset, "draft"], { draft, seen }, { keepalive: true }).then(
      (answer) => {
        this.#take(answer, draft);
        return false;
      },
      (failure) => {
        if (!(failure instanceof ApiError)) throw failure;
        if (failure.kind === "StaleDraftError") this.#take(failure.details, seen, true);
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
    else if (this.isGone || (version > this.store.get().version && !this.#unsent)) this.#take({ draft, version });
  }

  /** Take what the server has, under what is changed here of `base`. */
  #take({ draft, version }, base = this.store.get().seen, isRefused = false) {
    const { seen, mine, theirs } = this.isGone ? NOTHING : this.store.get();
    this.isGone = false;
    if (!seen || !base) {
      this.store.set({ seen: draft, mine: { ...draft, ...mine }, theirs, version });
      return;
    }
    const settings = laid(base.settings, mine.settings, draft.settings, isRefused);
    const next = { ...laid(base, mine, draft, isRefused), settings };
    const names = TEXTS.filter((name) => name in theirs || (isRefused && !same(draft[name], base[name])));
    const others = names.filter((name) => !same(next[name], draft[name])).map((name) => [name, draft[name]]);
    this.store.set({ seen: draft, mine: next, theirs: Object.fromEntries(others), version });
  }
}

/** `there` under what `mine` changes of `base`, by name; of what both change only texts, if refused. */
function laid(base, mine, there, isRefused) {
  const own = (name) =>
    !same(mine[name], base[name]) && (!isRefused || same(there[name], base[name]) || TEXTS.includes(name));
  const names = Object.keys({ ...there, ...mine });
  const entries = names.map((name) => [name, own(name) ? mine[name] : there[name]]);
  return Object.fromEntries(entries.filter(([, value]) => value !== undefined));
}

const same = (a, b) => sorted(a ?? null) === sorted(b ?? null);
const sorted = (value) =>
  JSON.stringify(value, (_, one) =>
    one && typeof one === "object" && !Array.isArray(one) ? Object.fromEntries(Object.entries(one).sort()) : one,
  );

function oldDraft(dataset) {
  try {
    const { isChosen, ...stored } = JSON.parse(localStorage.getItem(OLD_KEY + dataset) ?? "");
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
      for (const draft of drafts.values()) if (draft.store.get().seen) draft.load().catch(() => {});
    },
  },
);
addEventListener("pagehide", () => {
  for (const draft of drafts.values()) draft.send({ isLeaving: true });
});

/** Loads the draft of a folder; raises an ApiError, of status 404 where there is no such folder. */
export const loadDraft = (dataset, signal) => draftOf(dataset).load(signal);

/**
 * The draft of a folder, which is loaded, and a function that changes parts of it.
 *
 * @returns {[Api.Draft, (parts: Partial<Api.Draft>) => void]}
 */
export function useDraft(dataset) {
  const draft = draftOf(dataset);
  const { mine } = useStore(draft.store);
  useEffect(() => () => void draft.send(), [dataset]); // at once when the view is left
  return [mine, (parts) => draft.change(parts)];
}

/**
 * Texts that were changed elsewhere while others were typed here, by name, and a function that chooses (name, whether
 * it is the one here).
 *
 * @returns {[Record<string, string>, (name: string, isMine: boolean) => void]}
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
