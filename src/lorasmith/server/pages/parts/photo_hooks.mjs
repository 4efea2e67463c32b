// The photos of a folder as a page has them: those that are stored and those on their way, their captions, their check,
// and what changes them, each of which can be undone.
import { get, post, put, remove } from "../lib/api.mjs";
import { changeDraft } from "../lib/drafts.mjs";
import { useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { go } from "../lib/router.mjs";
import { said, say, useStore } from "../lib/stores.mjs";
import { hasTag } from "../lib/tags.mjs";
import { did, doneTo, undoLast } from "../lib/undo.mjs";
import { forget, isMask, trainWithMasks, upload, uploadsOf } from "../lib/uploads.mjs";
import { count } from "../lib/words.mjs";
import { isPassing, useLoaded } from "./basics.mjs";
import { isStale } from "./caption.mjs";
import { sourceOf, THUMBNAIL } from "./photo_tile.mjs";

const CHECK_AFTER_MS = 700;
const RELOAD_AFTER_MS = 400;
const MOST_PALE = 24;
const WHOLE = { x: 0, y: 0, width: 1, height: 1 };

/** The photos, loaded again when something has changed on the server. */
export function usePhotos(/** @type {string} */ dataset) {
  const [found, error, reload] = useLoaded((signal) => get(["datasets", dataset], {}, signal), [dataset]);
  const [gone, setGone] = useState(/** @type {Set<string>} */ (new Set())); // removed since `found` was loaded
  const [version, setVersion] = useState(0); // of the pictures before, whose names stay when they change places
  const sent = useStore(uploadsOf(dataset));
  const timer = useRef(0);

  const reloadSoon = () => {
    clearTimeout(timer.current);
    timer.current = setTimeout(reload, RELOAD_AFTER_MS);
  };
  useEffect(() => () => clearTimeout(timer.current), []);
  const arrived = sent.filter((one) => one.state === "done").length;
  useEffect(() => void (arrived && reloadSoon()), [arrived]);
  useEvents("", { dataset: ({ name }) => name === dataset && reloadSoon() }, { onOpen: () => found && reloadSoon() });

  const images = useMemo(() => (found?.images ?? []).filter((one) => !gone.has(one.file)), [found, gone]);
  const stray = found?.controls ?? []; // that belong to no photo
  const controls = [...images.flatMap((one) => one.controls), ...stray];
  const stored = new Set([...images.map((one) => one.file), ...controls.map((one) => `control/${one.file}`)]);
  const onTheWay = sent.filter((one) => one.state !== "done" || (!stored.has(one.file) && !gone.has(one.file)));
  const pale = useStore(doneTo(dataset)).flatMap((done) => done.photos.map((one) => ({ ...one, done })));
  return {
    dataset,
    ...{ found, error, reload, version, images, stray, controls, onTheWay, pale },
    canChange: found ? !found.builtin : false,
    underway: onTheWay.filter((one) => one.state === "waiting" || one.state === "sending").length,
    previews: new Map(sent.filter((one) => one.file).map((one) => [one.file, one])),
    hide: (files) => setGone((all) => new Set([...all, ...files])),
    show: (files) => setGone((all) => new Set([...all].filter((file) => !files.includes(file)))),
    /** Loads again what is there, and pictures before under the same names. */
    renew() {
      setVersion((number) => number + 1);
      return reload();
    },
  };
}

/**
 * The captions: those of the photos, and what was sent since these were loaded. `store` stores texts where they are
 * still those that were `seen`, by file; otherwise it shows the others from then on.
 *
 * @param {ReturnType<typeof usePhotos>} photos
 */
export function useCaptions({ dataset, found, images }) {
  const [captions, setCaptions] = useState(/** @type {Record<string, string>} */ ({}));
  const underWay = useRef(/** @type {Record<string, string>} */ ({})); // that are being stored
  const sending = useRef(Promise.resolve());
  useEffect(() => setCaptions(underWay.current), [found]);
  const captionOf = (/** @type {Api.PictureRow} */ image) => captions[image.file] ?? image.caption ?? "";

  /**
   * @param {Record<string, string>} texts
   * @param {Record<string, string>} seen
   */
  function store(texts, seen) {
    underWay.current = { ...underWay.current, ...texts };
    setCaptions((all) => ({ ...all, ...texts }));
    const edits = Object.entries(texts).map(([file, caption]) => [file, { caption, seen: seen[file] }]);
    const send = async () => {
      try {
        await put(["datasets", dataset, "captions"], Object.fromEntries(edits));
      } catch (failure) {
        setCaptions((all) => ({ ...all, ...seen, ...(isStale(failure) ? failure.details : {}) }));
        if (!isStale(failure)) say(failure.message, { mood: "bad" });
        throw failure;
      } finally {
        const others = Object.entries(underWay.current).filter(([file, text]) => texts[file] !== text);
        underWay.current = Object.fromEntries(others);
      }
    };
    return (sending.current = sending.current.then(send, send)); // one after the other: each has seen what came before
  }

  async function replaceAll(texts, text = t`${count(Object.keys(texts).length, "caption")} changed.`) {
    const changed = images.filter((one) => one.file in texts);
    const before = Object.fromEntries(changed.map((one) => [one.file, captionOf(one)]));
    await store(texts, before);
    did(dataset, text, () => store(before, texts));
  }

  /** What was typed: one entry for each caption that is typed into at a stretch. */
  async function storeTyped({ file }, caption, seen) {
    await store({ [file]: caption }, { [file]: seen });
    const last = doneTo(dataset).get().at(-1);
    const key = `caption ${file}`;
    const before = last?.key === key ? last.before : seen;
    const undo = () => store({ [file]: before }, { [file]: caption });
    did(dataset, t`The caption of ${file} was changed.`, undo, { key, before, quiet: true });
  }

  const changeTags = (texts, text) => said(() => replaceAll(texts, text));
  return { captions, captionOf, store, replaceAll, storeTyped, changeTags };
}

/**
 * What adds, removes and changes photos.
 *
 * @param {ReturnType<typeof usePhotos>} photos
 * @param words of `PAIRS`
 * @param {(before: string, now: string) => unknown} onRenamed called with the names of a photo that was renamed
 */
export function changesOf({ dataset, images, previews, hide, show, reload, renew }, words, onRenamed) {
  async function withdraw(keys) {
    const all = uploadsOf(dataset).get();
    const entries = all.filter((one) => keys.includes(one.key));
    for (const one of entries) forget(dataset, one.key); // those that are not sent yet are not sent
    const files = entries.filter((one) => one.state === "done").map((one) => one.file);
    const photos = files.filter((file) => !file.startsWith("control/"));
    hide(photos);
    if (photos.length) await post(["datasets", dataset, "remove"], { files: photos });
    for (const one of entries.filter(({ file }) => file?.startsWith("control/"))) {
      await remove(["datasets", dataset, "controls", one.file.slice("control/".length)]);
      if (one.replaced) await post(["datasets", dataset, "restore"], { removed: one.replaced, control: true });
    }
    renew();
  }

  async function take(files, before) {
    const added = (await said(() => upload(dataset, files, before, masked))) ?? [];
    const keys = added.map((one) => one.key);
    if (keys.length) did(dataset, t`${count(keys.length, "photo")} added.`, () => withdraw(keys));
    if (before) renew();
  }

  const changeControls = async (change) => {
    await said(change);
    await renew();
  };
  const undone = (undo) => async () => {
    await undo();
    renew();
  };

  const pair = (control, image) =>
    changeControls(async () => {
      const { changed } = await put(["datasets", dataset, "controls"], { control, image });
      if (!changed) return;
      const now = `${image.replace(/\.[^.]*$/, "")}${control.replace(/^.*(?=\.)/, "")}`; // the name that it has now
      const text = t`The ${words.of} ${image} and the other one have changed places.`;
      const undo = () => put(["datasets", dataset, "controls"], { control: now, former: control });
      did(dataset, changed > 1 ? text : t`${image} has its ${words.other}.`, undone(undo));
    });

  const removeControl = (file) =>
    changeControls(async () => {
      const { removed } = await remove(["datasets", dataset, "controls", file]);
      const undo = () => post(["datasets", dataset, "restore"], { removed, control: true });
      did(dataset, t`${file} was moved to the removed files.`, undone(undo));
    });

  /** Notes the masks among files that were added. @param {Api.UploadAnswer} answer */
  function masked({ added, replaced = {} }) {
    for (const mask of added.filter(isMask)) {
      const stem = mask.replace(/\.mask\.[^.]+$/, "");
      if (added.some((one) => !isMask(one) && one.startsWith(`${stem}.`))) continue; // it comes and goes with its photo
      const undo = async () => {
        const { images: all } = await get(["datasets", dataset]);
        const image = all.find((one) => one.mask === mask);
        if (image) await remove(["datasets", dataset, "images", image.file, "mask"]);
        if (replaced[mask]) await post(["datasets", dataset, "restore"], { removed: replaced[mask] });
      };
      did(dataset, replaced[mask] ? t`${stem} has another mask now.` : t`${stem} has a mask now.`, undone(undo));
    }
    renew();
  }

  /** Stores a mask that was painted, white inside. */
  async function mask({ file }, /** @type {Blob | null} */ painted) {
    if (!painted) throw new Error(t`Paint what is to be learnt, then keep the mask.`);
    const body = new FormData();
    body.append("file", painted, `${file.replace(/\.[^.]*$/, "")}.mask.png`);
    const answer = await post(["datasets", dataset, "images"], body);
    if (answer.skipped.length) throw new Error(t`The mask ${answer.skipped[0].reason}.`);
    masked(answer);
    await trainWithMasks(dataset);
  }

  const removeMask = ({ file }) =>
    changeControls(async () => {
      const { removed } = await remove(["datasets", dataset, "images", file, "mask"]);
      did(
        dataset,
        t`The mask of ${file} was removed.`,
        undone(() => post(["datasets", dataset, "restore"], { removed })),
      );
    });

  /** Copies of photos, which are shown pale where these were; of many, none. */
  async function copied(files) {
    const some = files.length > MOST_PALE ? [] : images.filter((one) => files.includes(one.file));
    const copy = async (image) => {
      const answer = await fetch(sourceOf(dataset, image, THUMBNAIL));
      return { image, picture: URL.createObjectURL(await answer.blob()) };
    };
    return Promise.all(some.map(copy)).catch(() => []);
  }

  /** Moves photos to the removed files, all at once; they come back together. */
  async function drop(files, text) {
    const photos = await copied(files);
    if (!photos.length) hide(files);
    try {
      const { removed } =
        files.length === 1
          ? await remove(["datasets", dataset, "images", files[0]])
          : await post(["datasets", dataset, "remove"], { files });
      for (const file of files) if (previews.has(file)) forget(dataset, previews.get(file).key);
      const undo = async () => {
        await post(["datasets", dataset, "restore"], { removed });
        show(files);
        reload();
      };
      hide(files);
      did(dataset, text, undo, { photos });
    } catch (failure) {
      show(files);
      say(failure.message, { mood: "bad" });
    }
  }

  async function crop(image, box) {
    const cropped = async (file, part) => {
      const answer = await put(["datasets", dataset, "images", file, "crop"], part);
      const entry = previews.get(file);
      if (entry) forget(dataset, entry.key); // its preview is that of the whole photo
      reload();
      onRenamed(file, answer.file);
      return answer.file;
    };
    const file = await cropped(image.file, box);
    did(dataset, t`${image.file} was cropped.`, () => cropped(file, image.crop ?? WHOLE));
  }

  /** @param {Api.Draft} draft */
  async function removeAll({ name, trigger, ...chosen }) {
    const { removed } = await remove(["datasets", dataset]);
    did(dataset, t`The photos were moved to ${removed}.`, async () => {
      await post(["datasets", dataset, "restore"], { removed });
      await changeDraft(dataset, { name, trigger, ...chosen });
      go("new", dataset);
    });
    go();
  }

  const leaveOut = (files) => drop(files, t`${files.length === 1 ? files[0] : count(files.length, "photo")} left out.`);
  return { take, pair, removeControl, drop, leaveOut, crop, mask, removeMask, removeAll };
}

/**
 * The check of the photos, made again when photos, captions, trigger or model have settled; `checking` is {done, total}
 * images during a long one, else null.
 *
 * @param {ReturnType<typeof usePhotos>} photos
 * @param captions that were sent since the photos were loaded
 * @param {Api.Draft} draft
 * @param {string | null | undefined} model the one that is chosen or suggested; undefined while that is not known
 */
export function useCheck({ dataset, images, controls, version }, captions, draft, model) {
  const [[check, error], setResult] = useState(/** @type {[Api.DataCheckAnswer | null, any]} */ ([null, null]));
  const [checking, setChecking] = useState(null);
  useEvents("", {
    check: ({ name, done, total }) => name === dataset && setChecking(done < total ? { done, total } : null),
  });
  const files = images.map((one) => one.file).join("\n");
  const { edit, trigger } = draft;
  const { resolution, masks } = draft.settings;
  const query = { model, edit, trigger, resolution, masks };
  useEffect(() => {
    if (!files || model === undefined) {
      setResult([null, null]);
      return undefined;
    }
    const stop = new AbortController();
    const ask = async () => {
      try {
        setResult([await get(["datasets", dataset, "check"], query, stop.signal), null]);
      } catch (failure) {
        if (stop.signal.aborted) return;
        if (isPassing(failure)) timer = setTimeout(ask, 2000);
        else setResult(([before]) => [before, failure]);
      }
    };
    let timer = setTimeout(ask, CHECK_AFTER_MS);
    return () => {
      clearTimeout(timer);
      stop.abort();
      setChecking(null);
    };
  }, [dataset, files, JSON.stringify([captions, query]), version, controls.length]);
  const problemsOf = (/** @type {Api.PictureRow} */ image) => check?.images[image.file]?.problems ?? [];
  return { check, error, checking, problemsOf };
}

/**
 * Which photos are shown: those of one remark, with a tag.
 *
 * @param {Api.PictureRow[]} images
 */
export function useFilter(images, captionOf) {
  const [remark, setRemark] = useState(null);
  const [tag, setTag] = useState(null);
  const named = images.filter((one) => remark?.files?.includes(one.file));
  const tagged = tag === null ? [] : images.filter((one) => hasTag(captionOf(one), tag)); // none if it was undone
  const shown = images
    .filter((one) => !named.length || named.includes(one))
    .filter((one) => !tagged.length || tagged.includes(one));
  return { shown, isPart: shown.length < images.length, remark, setRemark, tag: tagged.length ? tag : null, setTag };
}

/** Ctrl+Z takes back the last change, where it does not take back typing. */
export function useUndoKey(dataset) {
  useEffect(() => {
    const typing = "input:not([type=checkbox], [type=radio], [type=range]), textarea, select, dialog, .masker";
    const pressed = (event) => {
      if (event.key !== "z" || !(event.ctrlKey || event.metaKey) || event.shiftKey || event.target.closest?.(typing))
        return;
      event.preventDefault();
      undoLast(dataset);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [dataset]);
}
