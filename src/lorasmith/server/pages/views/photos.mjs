// The contact sheet: pictures from edge to edge, and beside them what they are of, and the words of the chosen one.
import { get } from "../lib/api.mjs";
import { useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { answered, isNameless, KINDS, kindOf } from "../lib/kinds.mjs";
import { go } from "../lib/router.mjs";
import { say, useStore } from "../lib/stores.mjs";
import { doneTo, takeBack, undoLast } from "../lib/undo.mjs";
import { count, slug } from "../lib/words.mjs";
import { Button, Loading, Panel, Problem, Question, Slider, useLoaded } from "../parts/basics.mjs";
import { Before, MoveControl, PAIRS } from "../parts/before.mjs";
import { CaptionDialog, CaptioningState } from "../parts/captioning.mjs";
import { ChooseFiles, PairZones, useDrops, Zone } from "../parts/drop_zone.mjs";
import { Icon } from "../parts/icons.mjs";
import { Loupe } from "../parts/loupe.mjs";
import { changesOf, useCaptions, useCheck, useFilter, usePhotos, useUndoKey } from "../parts/photo_hooks.mjs";
import { AllPhotos, ChosenPhotos, Named, What } from "../parts/photo_panel.mjs";
import { controlOf, PhotoTile } from "../parts/photo_tile.mjs";
import { Remarks, remarksOf, removedBy } from "../parts/remarks.mjs";
import { Replace } from "../parts/replace.mjs";
import { bestOf, takesControls } from "./model.mjs";

const SIZE_KEY = "lorasmith.sheet";
const LARGEST = 560; // height of a picture
const order = new Intl.Collator("en", { numeric: true }).compare;

/** @param edited the picture whose caption has the focus at first */
export function PhotosView({ dataset, edited }) {
  const [draft, change] = useDraft(dataset);
  const photos = usePhotos(dataset);
  const captions = useCaptions(photos);
  const [listed, listError] = useLoaded((signal) => get(["models"], {}, signal), []);
  const [opened, open] = useState(null); // the dialog that is open: {name, file}
  const [own, setOwn] = useState(remembered); // the size that somebody chose
  const [picked, pick] = useState(/** @type {string[]} */ (edited ? [edited] : [])); // files; the last one is looked at
  const [mode, setMode] = useState(/** @type {"large" | "crop" | "mask" | null} */ (null));
  const [written, write] = useState(edited); // the photo whose caption has the focus
  const sheet = useRef(null);
  useUndoKey(dataset);

  const { found, images, controls, onTheWay, underway, canChange, pale, previews, stray, version } = photos;
  const named = listed?.models.find((one) => one.name === draft.model);
  const takes = named ? takesControls(named, draft) : false;
  const isPairs = draft.pairs ?? (controls.length > 0 || takes);
  const words = isPairs ? (PAIRS[draft.settings.pairs] ?? PAIRS.none) : null;
  useEffect(() => {
    if (draft.pairs === false && controls.length && !draft.settings.controls)
      change({ settings: { ...draft.settings, controls: "none" } }); // pictures before are there, and not meant
  }, [draft.pairs, controls.length]);
  const suggested = listed && bestOf(listed.models, new Set(), words === PAIRS.none);
  const sized = draft.model ?? (listed ? (suggested?.name ?? null) : listError ? null : undefined);
  const check = useCheck(photos, captions.captions, draft, sized);
  const filter = useFilter(images, captions.captionOf);
  const kind = kindOf(draft, isPairs);
  const changes = changesOf(photos, words ?? PAIRS.none, (before, now) =>
    pick((files) => files.map((file) => (file === before ? now : file))),
  );
  const over = useDrops((files, before) => canChange && changes.take(files, before));

  // What was left out stays in its place, pale, until the page is loaded again.
  const gone = filter.isPart ? [] : pale.filter(({ image }) => !images.some((one) => one.file === image.file));
  const items = [...filter.shown.map((image) => ({ image, picture: "", done: null })), ...gone].sort((a, b) =>
    order(a.image.file, b.image.file),
  );
  const files = items.map(({ image }) => image.file);
  const kept = picked.filter((file) => files.includes(file));
  const chosen = kept.length ? kept : files.slice(0, 1);
  const at = chosen.at(-1) ?? "";
  const item = items.find(({ image }) => image.file === at);
  const isLarge = mode !== null && item !== undefined && !item.picture;

  const captioned = images.filter((one) => captions.captionOf(one).trim()).length;
  const total = images.length + onTheWay.filter((one) => !one.isBefore).length;
  const [, setWindow] = useState(""); // turned phones and other windows have another usual size
  useEffect(() => {
    const resized = () => setWindow(`${innerWidth} ${innerHeight}`);
    addEventListener("resize", resized);
    return () => removeEventListener("resize", resized);
  }, []);
  const size = own || usualSize(total);
  const remarks = remarksOf({
    check: check.check,
    images,
    captionOf: captions.captionOf,
    isNameless: isNameless(draft, images, captions.captionOf),
    words,
    taker: controls.length > 0 && named && words === PAIRS.none && !takes ? named.title : "",
    isSlider: kind === "slider",
  });

  /** Removes what remarks say should be: everything that they name, in one step. */
  function fix(some) {
    const there = removedBy(some).filter((file) => images.some((one) => one.file === file));
    if (!there.length) return say(t`These photos are not here any more.`);
    filter.setRemark(null);
    const kinds = some.filter((one) => one.removes?.length).map((one) => one.chip);
    return changes.drop(there, t`${count(there.length, "photo")} left out: ${kinds.join(", ")}.`);
  }

  /** Leaves the chosen photos out, or brings them back. */
  async function leaveOut() {
    const some = items.filter(({ image }) => chosen.includes(image.file));
    const out = some.filter((one) => one.done);
    const isInSheet = sheet.current?.contains(document.activeElement);
    if (out.length) await Promise.all([...new Set(out.map((one) => one.done))].map((one) => takeBack(dataset, one)));
    else {
      if (isLarge) step(1) || step(-1);
      await changes.leaveOut(chosen);
    }
    if (isInSheet) focused.current = true; // its tile may have been made again
  }

  const focused = useRef(false); // whether the photo that is looked at is to have the focus
  const show = (file, extend = false) => {
    pick(extend ? [...chosen.filter((one) => one !== file), file] : [file]);
    focused.current = true;
  };
  function step(by) {
    const next = files[files.indexOf(at) + by];
    if (next) show(next);
    return Boolean(next);
  }
  useEffect(() => {
    if (!focused.current || isLarge) return;
    focused.current = false;
    const tile = sheet.current?.querySelector(`.tile[tabindex="0"]`);
    if (!document.activeElement?.closest("textarea")) tile?.focus({ preventScroll: true });
    tile?.scrollIntoView({ block: "nearest" });
  });
  const choose = (file, event) => {
    if (event.shiftKey) {
      const [from, to] = [files.indexOf(chosen[0]), files.indexOf(file)];
      const some = files.slice(Math.min(from, to), Math.max(from, to) + 1);
      pick([chosen[0], ...some.filter((one) => one !== chosen[0] && one !== file), file]);
    } else if (event.ctrlKey || event.metaKey)
      pick(chosen.includes(file) ? chosen.filter((one) => one !== file) : [...chosen, file]);
    else show(file);
  };
  const isMine = item && !item.picture && canChange;
  const enter = (/** @type {"large" | "crop" | "mask"} */ next) => {
    if (next === "crop" && (item?.image.mask || item?.image.controls.length))
      return say(t`A photo with a mask or a picture before is cropped in another program: both files alike.`);
    setMode(next);
  };

  useKeys((event) => {
    const { key, target } = event;
    const isTyping = target.closest?.("input, textarea, select, summary");
    if (event.ctrlKey || event.metaKey || event.altKey || opened || target.closest?.("dialog")) return;
    if (isLarge && mode !== "large") {
      if (key === "Escape") setMode("large");
      return;
    }
    const page = { PageDown: 1, PageUp: -1 }[key];
    const along = { ArrowRight: 1, ArrowLeft: -1, ...(isLarge ? {} : { Home: -files.length, End: files.length }) }[key];
    if (page && (isLarge || target.closest?.("textarea"))) {
      step(page);
      write(target.closest?.("textarea") ? files[files.indexOf(at) + page] : undefined);
    } else if (isTyping) return;
    else if (key === "Escape" && isLarge) {
      setMode(null);
      show(at);
    } else if (along) {
      const next = files[clamp(files.indexOf(at) + along, 0, files.length - 1)];
      if (next) show(next, event.shiftKey);
    } else if ((key === "ArrowDown" || key === "ArrowUp") && !isLarge && target.closest?.(".tiles"))
      show(beside(sheet.current, at, key === "ArrowDown") ?? at, event.shiftKey);
    else if (key === "Enter" && (target === document.body || target.closest?.(".tiles")) && item && !item.picture)
      setMode("large"); // the focus falls to the body where a tile was made again
    else if (key === "x" && canChange && item) leaveOut();
    else if (key === "c" && isMine && item.image.width) enter("crop");
    else if (key === "m" && isMine && item.image.width) enter("mask");
    else return;
    event.preventDefault();
  });

  const last = useStore(doneTo(dataset)).at(-1);
  const model = named ?? suggested;
  return html`
    <div class="with-panel">
    <div class="sheet-main">
      <div class="sheet-head">
        <h1 class="unseen">Photos of ${draft.name || dataset}</h1>
        <div class="sheet-title">
          <${Named} dataset=${dataset} such=${slug(draft.trigger) || dataset} />
          <span class="chip" role="status">
            ${underway ? t`${count(underway, "photo")} on the way…` : count(total, "photo")}
          </span>
        </div>
        <div class="sheet-chips">
        <${Remarks} dataset=${dataset} remarks=${remarks} number=${images.length} check=${check} chosen=${filter.remark}
          onChoose=${filter.setRemark} onFix=${canChange ? fix : null}
          onCaption=${canChange ? () => open({ name: "captions" }) : null} />
        ${
          filter.tag !== null &&
          html`<button type="button" class="chip" aria-pressed="true" onClick=${() => filter.setTag(null)}>
            ${filter.tag}: ${count(filter.shown.length, "photo")}<span class="unseen">. Show all</span>
          </button>`
        }
        <span class="sheet-tools">
          ${
            canChange &&
            html`
              ${!words && total > 0 && html`<${ChooseFiles} isMore onFiles=${(some) => changes.take(some, null)} />`}
              <${Button} class="small" disabled=${!last} title=${last?.text} aria-label="Undo the last change"
                  onClick=${() => undoLast(dataset)}>
                <${Icon} name="undo" />Undo
              <//>
            `
          }
          <${Slider} label="Size of the pictures" unseen min="90" max=${LARGEST} step="10" value=${size}
            onInput=${(wide) => {
              setOwn(wide);
              remembered(wide);
            }} />
        </span>
        </div>
      </div>
      <${Problem} error=${photos.error} onRetry=${photos.reload} />
      ${!found && !photos.error && html`<${Loading} what="photos" />`}
      <${CaptioningState} dataset=${dataset}
        onUndo=${(written) => captions.store(partOf(written, "before"), partOf(written, "caption"))} />
      ${canChange && words && !isLarge && html`<${PairZones} over=${over} pairs=${words} onFiles=${changes.take} />`}
      ${canChange && !words && total === 0 && html`<${Zone} over=${over} onFiles=${changes.take} />`}
      ${
        isLarge
          ? html`<${Loupe} dataset=${dataset} image=${item.image} mode=${mode} at=${[files.indexOf(at), files.length]}
            facts=${check.check?.images[at]} version=${version} words=${words} onMode=${setMode} onGo=${step}
            onCrop=${changes.crop} onMask=${changes.mask} />`
          : (items.length > 0 || onTheWay.length > 0) &&
            html`<ul class=${`tiles ${over ? "over" : ""}`} ref=${sheet} role="listbox" aria-multiselectable="true"
              aria-label="Photos" style=${{ "--tile": `${size}px` }}>
            ${onTheWay.map((entry) => html`<${PhotoTile} key=${`sent ${entry.key}`} upload=${entry} />`)}
            ${items.map(
              ({ image, picture }) => html`<${PhotoTile} key=${image.file}
                dataset=${dataset} image=${image} picture=${picture} preview=${previews.get(image.file)?.preview}
                caption=${captions.captionOf(image)} remarks=${picture ? 0 : check.problemsOf(image).length}
                facts=${chosen.includes(image.file) ? check.check?.images[image.file] : null} version=${version}
                words=${words} isChosen=${chosen.includes(image.file)} isAt=${image.file === at}
                actions=${{
                  onChoose: choose,
                  onOpen: picture ? null : () => setMode("large"),
                  onPair: canChange ? changes.pair : undefined,
                }} />`,
            )}
          </ul>`
      }
      ${
        words &&
        stray.length > 0 &&
        html`
          <h2>${count(stray.length, "picture")} without a partner</h2>
          <p class="faint">Move each to the picture that it belongs to. What stays here is not trained on.</p>
          <ul class="strays">
            ${stray.map(
              (one) => html`<li key=${one.file}>
                <img src=${controlOf(dataset, one.file, version)} alt=${one.file} loading="lazy" />
                <span class="clip" title=${one.file}>${one.file}</span>
                ${
                  canChange &&
                  html`<${Before} image=${null} controls=${[one]} words=${words}
                    actions=${{ remove: changes.removeControl, move: (file) => open({ name: "move", file }) }} />`
                }
              </li>`,
            )}
          </ul>
        `
      }
      ${
        (!isLarge || mode === "large") &&
        html`<div class="sheet-bar">
          <${Button} kind="primary" disabled=${!images.length || underway > 0}
              onClick=${() => go("new", dataset, "model")}>
            Choose a model<${Icon} name="forward" />
          <//>
          <span class="faint">
            ${
              !total
                ? t`Add photos first.`
                : underway
                  ? t`${count(underway, "photo")} on the way…`
                  : draft.is_chosen && named
                    ? named.title
                    : model
                      ? t`One is suggested for this computer.`
                      : ""
            }
          </span>
        </div>`
      }
    </div>
    <${Panel} title=${[KINDS[kind]?.title, draft.trigger].filter(Boolean).join(" · ") || t`What is it?`}>
        ${found?.builtin && html`<p class="faint">These pictures belong to Lorasmith; they cannot be changed.</p>`}
        <${What} draft=${draft} kind=${kind} change=${change} dataset=${dataset}
          onAnswer=${(what) => change(answered(draft, what))} />
        ${
          item &&
          html`<${ChosenPhotos} draft=${draft} item=${item} files=${chosen} photos=${photos}
            captions=${captions} check=${check} words=${words} isEdited=${at === written} canChange=${canChange}
            isLarge=${isLarge} change=${change}
            actions=${{
              ...{
                leaveOut,
                enter,
                choose: changes.take,
                remove: changes.removeControl,
                removeMask: changes.removeMask,
              },
              move: (file) => open({ name: "move", file }),
            }} />`
        }
        ${
          images.length > 0 &&
          html`<${AllPhotos} images=${images} check=${check.check} captions=${captions} captioned=${captioned}
            filter=${filter} canChange=${canChange} onOpen=${(name) => open({ name })} kind=${kind} />`
        }
    <//>
    </div>
    ${
      opened &&
      html`<${Opened} dataset=${dataset} draft=${draft} images=${images} captions=${captions} changes=${changes}
        words=${words} opened=${opened} onClose=${() => open(null)} lacking=${images.length - captioned} />`
    }
  `;
}

/** The dialog that is open. */
function Opened({ dataset, draft, images, captions, changes, words, opened, onClose, lacking }) {
  switch (opened.name) {
    case "captions":
      return html`<${CaptionDialog} dataset=${dataset} number=${images.length} lacking=${lacking}
        trigger=${draft.trigger} onClose=${onClose} />`;
    case "clear":
      return html`<${Question} title="Remove these photos?" yes="Remove all" kind="danger" onClose=${onClose}
          onYes=${() => changes.removeAll(draft)}>
        <p>
          The folder ${html`<b>${dataset}</b>`} with ${count(images.length, "photo")} and their captions is moved to the
          removed files of Lorasmith. Nothing is deleted, and runs keep their LoRAs.
        </p>
      <//>`;
    case "move":
      return html`<${MoveControl} dataset=${dataset} control=${opened.file} images=${images} words=${words}
        onMove=${changes.pair} onClose=${onClose} />`;
    default:
      return html`<${Replace} images=${images} captionOf=${captions.captionOf} onReplace=${captions.replaceAll}
        onClose=${onClose} />`;
  }
}

/** Calls with each key that is pressed on the page. */
function useKeys(press) {
  const latest = useRef(press);
  latest.current = press;
  useEffect(() => {
    const pressed = (event) => event.defaultPrevented || latest.current(event);
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

/** The photo below or above another one, by where they are. */
function beside(list, file, isBelow) {
  const tiles = [...list.querySelectorAll(".tile:not([aria-disabled])")];
  const from = tiles.find((one) => one.dataset.file === file);
  const middle = (one) => one.offsetLeft + one.offsetWidth / 2;
  const tops = tiles
    .map((one) => one.offsetTop)
    .filter((top) => (isBelow ? top > from.offsetTop : top < from.offsetTop));
  const row = isBelow ? Math.min(...tops) : Math.max(...tops);
  return tiles
    .filter((one) => one.offsetTop === row)
    .sort((a, b) => Math.abs(middle(a) - middle(from)) - Math.abs(middle(b) - middle(from)))[0]?.dataset.file;
}

const clamp = (number, least, most) => Math.min(most, Math.max(least, number));

/** The largest height of a number of square pictures that fit into the window. */
function usualSize(number) {
  const beside = (innerWidth > 896 ? 352 : 8) + 2 * clamp(0.022 * innerWidth, 16, 40); // panel and gutters
  const [wide, high] = [innerWidth - beside, innerHeight - 230];
  const least = Math.min(170, 0.27 * innerWidth);
  let across = 1;
  while (Math.ceil(number / across) * (wide / across) > high && wide / across > least) across += 1;
  return clamp(wide / across - 12, least, LARGEST);
}

/** The size of the pictures that the browser keeps, after it was changed; 0 if it keeps none. */
function remembered(size = 0) {
  try {
    if (size) localStorage.setItem(SIZE_KEY, String(size));
    return Number(localStorage.getItem(SIZE_KEY));
  } catch {
    return 0;
  }
}

/** Captions that were written, before or after that, by file. */
const partOf = (written, part) => Object.fromEntries(Object.entries(written).map(([file, one]) => [file, one[part]]));
