// The photos of a LoRA: what they show, their captions, what is wrong with them, and what of them is trained.
import { get, post, put, remove } from "../lib/api.mjs";
import { changeDraft, useConflicts, useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { go } from "../lib/router.mjs";
import { say, useStore } from "../lib/stores.mjs";
import { counted, hasTag } from "../lib/tags.mjs";
import { did, doneTo, undoLast } from "../lib/undo.mjs";
import { forget, upload, uploadsOf } from "../lib/uploads.mjs";
import { capital, count, slug } from "../lib/words.mjs";
import { Button, Elsewhere, Field, Loading, Problem, Question, isPassing, useLoaded } from "../parts/basics.mjs";
import { Before, MoveControl, PAIRS } from "../parts/before.mjs";
import { CaptionDialog, CaptioningState } from "../parts/captioning.mjs";
import { DropZone } from "../parts/drop_zone.mjs";
import { PhotoEditor } from "../parts/photo_editor.mjs";
import { PhotoTile, isStale } from "../parts/photo_tile.mjs";
import { Remarks, remarksOf, removedBy } from "../parts/remarks.mjs";
import { LeftOut } from "../parts/left_out.mjs";
import { Replace } from "../parts/replace.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";
import { TagList } from "../parts/tags.mjs";
import { takesControls } from "./model.mjs";

const CHECK_AFTER_MS = 700;
const RELOAD_AFTER_MS = 400;
const FEW = 5;

/** @param edited the picture whose caption has the focus at first */
export function PhotosView({ dataset, edited }) {
  const [draft, change] = useDraft(dataset);
  const [theirs, choose] = useConflicts(dataset);
  const [found, error, reload] = useLoaded((signal) => get(["datasets", dataset], {}, signal), [dataset]);
  const [captions, setCaptions] = useState({}); // sent or stored since `found` was loaded
  const [gone, setGone] = useState(new Set());
  const [crops, setCrops] = useState(true);
  const [onlyOdd, setOnlyOdd] = useState(false);
  const [only, setOnly] = useState(null); // the remark whose photos are shown alone
  const [tag, setTag] = useState(null); // the tag whose photos are shown alone
  const [large, setLarge] = useState(null); // the photo that is shown large
  const [captioning, setCaptioning] = useState(false);
  const [replacing, setReplacing] = useState(false);
  const [clearing, setClearing] = useState(false);
  const [moving, setMoving] = useState(null); // the picture before an edit that is to have another picture
  const [version, setVersion] = useState(0); // of the pictures before, whose names stay when they change places
  const [listed] = useLoaded(async (signal) => (draft.model ? get(["models"], {}, signal) : null), [draft.model]);
  const model = listed?.models.find((one) => one.name === draft.model);
  const sent = useStore(uploadsOf(dataset));
  const done = useStore(doneTo(dataset));
  const timer = useRef(0);
  const underWay = useRef({}); // captions that are being stored
  const sending = useRef(Promise.resolve());

  useEffect(() => setCaptions(underWay.current), [found]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const changed = () => {
    clearTimeout(timer.current);
    timer.current = setTimeout(reload, RELOAD_AFTER_MS);
  };
  const arrived = sent.filter((one) => one.state === "done").length;
  useEffect(() => void (arrived && changed()), [arrived]);
  useEvents("", { dataset: ({ name }) => name === dataset && changed() }, { onOpen: () => found && changed() });

  const images = useMemo(() => (found?.images ?? []).filter((one) => !gone.has(one.file)), [found, gone]);
  const stray = found?.controls ?? [];
  const controls = [...images.flatMap((one) => one.controls ?? []), ...stray];
  const stored = new Set([
    ...images.flatMap((one) => [one.file, one.mask].filter(Boolean)),
    ...controls.map((one) => `control/${one.file}`),
  ]);
  const isPairs = draft.pairs ?? (controls.length > 0 || (model ? takesControls(model, draft) : false));
  const words = PAIRS[draft.settings.pairs] ?? PAIRS.none;
  const previews = new Map(sent.filter((one) => one.file).map((one) => [one.file, one]));
  const onTheWay = sent.filter((one) => one.state !== "done" || (!stored.has(one.file) && !gone.has(one.file)));
  const underway = onTheWay.filter((one) => one.state === "waiting" || one.state === "sending").length;
  const captionOf = (image) => captions[image.file] ?? image.caption ?? "";
  const [check, checkError, checking] = useCheck(dataset, draft, images, captions, controls, version);

  useEffect(() => {
    const pressed = (event) => {
      if (
        event.key !== "z" ||
        !(event.ctrlKey || event.metaKey) ||
        event.shiftKey ||
        event.target.closest?.("input:not([type=checkbox], [type=radio]), textarea, select, dialog:not(.photo-dialog)")
      )
        return;
      event.preventDefault();
      undoLast(dataset);
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, [dataset]);

  const take = async (files, before) => {
    const added = await upload(dataset, files, before).catch((failure) => (say(failure.message, { mood: "bad" }), []));
    if (added.length)
      did(dataset, `${count(added.length, "photo")} added.`, () => withdraw(added.map((one) => one.key)));
    if (before) setVersion((number) => number + 1);
  };
  const withdraw = async (keys) => {
    const entries = uploadsOf(dataset)
      .get()
      .filter((one) => keys.includes(one.key));
    for (const one of entries) forget(dataset, one.key); // those that are not sent yet are not sent
    const files = entries.filter((one) => one.state === "done").map((one) => one.file);
    const photos = files.filter((file) => !file.startsWith("control/"));
    setGone((all) => new Set([...all, ...photos]));
    if (photos.length) await post(["datasets", dataset, "remove"], { files: photos });
    for (const one of entries.filter(({ file }) => file?.startsWith("control/"))) {
      await remove(["datasets", dataset, "controls", one.file.slice("control/".length)]);
      if (one.replaced) await post(["datasets", dataset, "restore"], { removed: one.replaced, control: true });
    }
    setVersion((number) => number + 1);
    reload();
  };
  const changeControls = async (change) => {
    try {
      await change();
    } catch (failure) {
      say(failure.message, { mood: "bad" });
    }
    setVersion((number) => number + 1);
    await reload();
  };
  const taken = (undo) => async () => {
    await undo();
    setVersion((number) => number + 1);
    reload();
  };
  const pair = (control, image) =>
    changeControls(async () => {
      const { changed } = await put(["datasets", dataset, "controls"], { control, image });
      const now = `${image.replace(/\.[^.]*$/, "")}${control.replace(/^.*(?=\.)/, "")}`; // the name that it has now
      const undo = taken(() => put(["datasets", dataset, "controls"], { control: now, former: control }));
      if (changed)
        did(
          dataset,
          changed > 1
            ? `The ${words.of} ${image} and the other one have changed places.`
            : `${image} has its ${words.other}.`,
          undo,
        );
    });
  const removeControl = (file) =>
    changeControls(async () => {
      const { removed } = await remove(["datasets", dataset, "controls", file]);
      did(
        dataset,
        `${file} was moved to the removed files.`,
        taken(() => post(["datasets", dataset, "restore"], { removed, control: true })),
      );
    });
  const actions = found?.builtin
    ? null
    : { pair, remove: removeControl, move: setMoving, choose: (files, image) => take(files, image) };

  /**
   * Stores captions where they are still those that were `seen`, by file; otherwise it shows the others from then on.
   */
  function store(texts, seen) {
    underWay.current = { ...underWay.current, ...texts };
    setCaptions((all) => ({ ...all, ...texts }));
    const send = async () => {
      try {
        await put(
          ["datasets", dataset, "captions"],
          Object.fromEntries(Object.entries(texts).map(([file, caption]) => [file, { caption, seen: seen[file] }])),
        );
      } catch (failure) {
        setCaptions((all) => ({ ...all, ...seen, ...(isStale(failure) ? failure.details : {}) }));
        if (!isStale(failure)) say(failure.message, { mood: "bad" });
        throw failure;
      } finally {
        underWay.current = Object.fromEntries(
          Object.entries(underWay.current).filter(([file, text]) => texts[file] !== text),
        );
      }
    };
    return (sending.current = sending.current.then(send, send)); // one after the other: each has seen what came before
  }

  async function replaceAll(texts, said = `${count(Object.keys(texts).length, "caption")} changed.`) {
    const before = Object.fromEntries(
      images.filter((one) => one.file in texts).map((one) => [one.file, captionOf(one)]),
    );
    await store(texts, before);
    did(dataset, said, () => store(before, texts));
  }

  /** What was typed: one entry for each caption that is typed into at a stretch. */
  async function storeTyped(image, caption, seen) {
    await store({ [image.file]: caption }, { [image.file]: seen });
    const last = doneTo(dataset).get().at(-1);
    const key = `caption ${image.file}`;
    const first = last?.key === key ? last.before : seen;
    did(
      dataset,
      `The caption of ${image.file} was changed.`,
      () => store({ [image.file]: first }, { [image.file]: caption }),
      { key, before: first, quiet: true },
    );
  }

  const changeTags = async (texts, said) => {
    try {
      await replaceAll(texts, said);
    } catch (failure) {
      say(failure.message, { mood: "bad" });
    }
  };

  /** Moves photos to the removed files, all at once; they come back together. */
  async function drop(files, said) {
    setGone((all) => new Set([...all, ...files]));
    const back = () => setGone((all) => new Set([...all].filter((file) => !files.includes(file))));
    try {
      const { removed } =
        files.length === 1
          ? await remove(["datasets", dataset, "images", files[0]])
          : await post(["datasets", dataset, "remove"], { files });
      for (const file of files) if (previews.has(file)) forget(dataset, previews.get(file).key);
      did(dataset, said, async () => {
        await post(["datasets", dataset, "restore"], { removed });
        back();
        reload();
      });
    } catch (failure) {
      back();
      say(failure.message, { mood: "bad" });
    }
  }
  const dropOne = (image) => drop([image.file], `${image.file} was moved to the removed files.`);

  /** Removes what remarks say should be: everything that they name, in one step. */
  function fix(some) {
    const there = new Set(images.map((one) => one.file));
    const kinds = some
      .map((one) => [one.title, (one.removes ?? []).filter((file) => there.has(file)).length])
      .filter(([, number]) => number);
    const files = removedBy(some).filter((file) => there.has(file));
    if (!files.length) return say("These photos are not here any more.");
    setOnly(null);
    const moved = `${count(files.length, "photo was", "photos were")} moved to the removed files`;
    return drop(files, `${moved}: ${kinds.map(([title, number]) => `${title.toLowerCase()} (${number})`).join(", ")}.`);
  }

  async function crop(image, box) {
    const whole = { x: 0, y: 0, width: 1, height: 1 };
    const cropped = async (file, part) => {
      const answer = await put(["datasets", dataset, "images", file, "crop"], part);
      const entry = previews.get(file);
      if (entry) forget(dataset, entry.key); // its preview is that of the whole photo
      reload();
      return answer.file;
    };
    const file = await cropped(image.file, box);
    if (large === image.file) setLarge(file);
    did(dataset, `${image.file} was cropped.`, async () => {
      const now = await cropped(file, image.crop ?? whole);
      setLarge((shown) => (shown === file ? now : shown));
    });
  }

  async function removeAll() {
    const { removed } = await remove(["datasets", dataset]);
    const { name, trigger, ...chosen } = draft;
    did(dataset, `The photos were moved to ${removed}.`, async () => {
      await post(["datasets", dataset, "restore"], { removed });
      await changeDraft(dataset, { name, trigger, ...chosen });
      go("new", dataset);
    });
    go();
  }

  const problemsOf = (image) => check?.images?.[image.file]?.problems ?? [];
  const odd = images.filter((one) => problemsOf(one).length);
  const shown = images
    .filter((one) => !onlyOdd || !odd.length || problemsOf(one).length)
    .filter(
      (one) => !only?.files.some((file) => images.some((each) => each.file === file)) || only.files.includes(one.file),
    )
    .filter((one) => tag === null || hasTag(captionOf(one), tag));
  const total = images.length + onTheWay.length;
  const captioned = images.filter((one) => captionOf(one).trim()).length;
  const ready = images.length > 0 && underway === 0;
  const canChange = found ? !found.builtin : false;
  const remarks = !images.length
    ? []
    : remarksOf({
        check,
        isNameless: !captioned && !draft.trigger.trim(),
        lack: words.lack,
        lacking: isPairs ? images.filter((one) => !one.controls?.length).map((one) => one.file) : [],
        taker: controls.length > 0 && model && words === PAIRS.none && !takesControls(model, draft) ? model.title : "",
      });
  const tags = useMemo(() => counted(images.map(captionOf)).map(([name]) => name), [images, captions]);
  const last = done.at(-1);

  return html`
    <${Stepper} at="photos" dataset=${dataset} />
    <section>
      <h1>Your photos</h1>
      <div class="fields two">
        <${Field} label="Name of the LoRA" help="The file and its folder are called so.">
          ${(attributes) => html`
            <input ...${attributes} type="text" maxlength="64" value=${draft.name}
              placeholder=${slug(draft.trigger) || dataset}
              onInput=${(event) => change({ name: event.currentTarget.value })} />
            ${
              "name" in theirs &&
              html`<${Elsewhere} there=${theirs.name} what="name" onChoose=${(isMine) => choose("name", isMine)} />`
            }
          `}
        <//>
        <${Field} label="Trigger word" optional
            help="Words that will call up what the photos show, such as “milo cat”. Put them into your prompts later.">
          ${(attributes) => html`
            <input ...${attributes} type="text" maxlength="200" value=${draft.trigger} autocapitalize="off"
              onInput=${(event) => change({ trigger: event.currentTarget.value })} />
            ${
              "trigger" in theirs &&
              html`<${Elsewhere} there=${theirs.trigger} what="trigger word"
                onChoose=${(isMine) => choose("trigger", isMine)} />`
            }
          `}
        <//>
      </div>
    </section>
    <section aria-labelledby="photos">
      <div class="head">
        <h2 id="photos">${total ? count(total, "photo") : "Photos"}</h2>
        <span class="faint" role="status">
          ${
            underway
              ? `${count(underway, "photo")} on the way…`
              : images.length
                ? `${captioned} of ${images.length} with a caption`
                : ""
          }
        </span>
      </div>
      ${
        found?.builtin
          ? html`<p class="faint">These pictures belong to Lorasmith, to try it with; they cannot be changed.</p>`
          : html`
            <${DropZone} onFiles=${take} pairs=${isPairs ? words : null} />
            <label class="check">
              <input type="checkbox" checked=${isPairs}
                onChange=${(event) =>
                  change({ pairs: event.currentTarget.checked, settings: taught(draft, "none") })} />
              These are pairs: two pictures of each name
            </label>
            ${
              isPairs &&
              html`<${Field} label="What they teach">
                ${(attributes) => html`<select ...${attributes} value=${draft.settings.pairs ?? "none"}
                    onChange=${(event) => change({ pairs: true, settings: taught(draft, event.currentTarget.value) })}>
                  ${Object.entries(PAIRS).map(
                    ([name, { title }]) => html`<option key=${name} value=${name}>${capital(title)}</option>`,
                  )}
                </select>`}
              <//>`
            }
          `
      }
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="photos" />`}
      <${LeftOut} dataset=${dataset} />
      <${CaptioningState} dataset=${dataset}
        onUndo=${(written) =>
          store(
            Object.fromEntries(Object.entries(written).map(([file, one]) => [file, one.before])),
            Object.fromEntries(Object.entries(written).map(([file, one]) => [file, one.caption])),
          )} />
      <${Remarks} dataset=${dataset} remarks=${remarks} images=${images} isChecked=${Boolean(check)}
        error=${checkError} checking=${checking} onFix=${canChange ? fix : null} onShow=${setOnly}
        onCaption=${canChange ? () => setCaptioning(true) : null} />
      ${
        images.length > 0 &&
        html`
          <div class="tools">
            ${
              canChange &&
              html`
                <${Button} class="small" onClick=${() => setCaptioning(true)}>Write captions<//>
                <${Button} class="small" onClick=${() => setReplacing(true)}>Find and replace in captions<//>
                <${Button} class="small" onClick=${() => setClearing(true)}>Remove all<//>
                <${Button} class="small" disabled=${!last} title=${last?.text} aria-label="Undo the last change"
                    onClick=${() => undoLast(dataset)}>
                  Undo
                <//>
              `
            }
            <label class="check">
              <input type="checkbox" checked=${crops} onChange=${(event) => setCrops(event.currentTarget.checked)} />
              Show what is trained
            </label>
            ${
              odd.length > 0 &&
              html`<label class="check">
                <input type="checkbox" checked=${onlyOdd}
                  onChange=${(event) => setOnlyOdd(event.currentTarget.checked)} />
                Only the ${count(odd.length, "photo")} with remarks
              </label>`
            }
          </div>
          <${TagList} images=${images} captionOf=${captionOf} chosen=${tag} onChoose=${setTag}
            onChange=${canChange ? changeTags : null} />
          ${
            (only || tag !== null) &&
            html`<p class="filtered" role="status">
              Shown: ${count(shown.length, "photo")}${only ? ` of “${only.title}”` : ""}
              ${tag !== null ? ` with the tag “${tag}”` : ""}.
              <button type="button" class="as-link"
                  onClick=${() => {
                    setOnly(null);
                    setTag(null);
                  }}>
                Show all
              </button>
            </p>`
          }
        `
      }
      <ul class=${`tiles ${isPairs ? "pairs" : ""}`}>
        ${onTheWay.map(
          (entry) => html`<${PhotoTile} key=${`sent ${entry.key}`} upload=${entry}
            onRemove=${() => forget(dataset, entry.key)} />`,
        )}
        ${shown.map(
          (image) => html`<${PhotoTile} key=${image.file} dataset=${dataset} image=${image}
            preview=${previews.get(image.file)?.preview} caption=${captionOf(image)} problems=${problemsOf(image)}
            facts=${crops ? check?.images?.[image.file] : null} trigger=${draft.trigger}
            usesMasks=${draft.settings.masks === "files"} isFixed=${!canChange}
            isEdited=${image.file === edited} onCaption=${(caption, seen) => storeTyped(image, caption, seen)}
            onRemove=${() => dropOne(image)} onOpen=${() => setLarge(image.file)}
            before=${
              isPairs
                ? html`<${Before} dataset=${dataset} image=${image.file} controls=${image.controls ?? []}
                  version=${version} words=${words} actions=${actions} />`
                : null
            } />`,
        )}
      </ul>
      ${
        isPairs &&
        stray.length > 0 &&
        html`
          <h3>${capital(words.others)}, without ${words === PAIRS.none ? "one after" : "a picture"}</h3>
          <p class="faint">
            Drag each onto the picture that it belongs to, or press ⇄. What stays here is not trained on.
          </p>
          <ul class="tiles">
            ${stray.map(
              (one) => html`<li class="tile" key=${one.file}>
                <${Before} dataset=${dataset} image=${null} controls=${[one]} version=${version} words=${words}
                  actions=${actions} />
                <p class="tile-name"><span class="clip" title=${one.file}>${one.file}</span></p>
              </li>`,
            )}
          </ul>
        `
      }
    </section>
    ${
      large !== null &&
      html`<${PhotoEditor} dataset=${dataset} images=${shown.some((one) => one.file === large) ? shown : images}
        file=${large} captionOf=${captionOf} facts=${check?.images ?? {}} problemsOf=${problemsOf}
        trigger=${draft.trigger} known=${tags} undo=${last} onClose=${() => setLarge(null)}
        actions=${{
          show: setLarge,
          ...(canChange
            ? {
                caption: storeTyped,
                crop,
                remove: dropOne,
                undo: () => undoLast(dataset),
                tags: (image, text) => changeTags({ [image.file]: text }, `The tags of ${image.file} were changed.`),
              }
            : {}),
        }} />`
    }
    ${
      captioning &&
      html`<${CaptionDialog} dataset=${dataset} number=${images.length} lacking=${images.length - captioned}
        trigger=${draft.trigger} onClose=${() => setCaptioning(false)} />`
    }
    ${
      clearing &&
      html`<${Question} title="Remove these photos?" yes="Remove all" kind="danger"
          onClose=${() => setClearing(false)} onYes=${removeAll}>
        <p>
          The folder <b>${dataset}</b> with ${count(images.length, "photo")} and their captions is moved to the
          removed files of Lorasmith. Nothing is deleted, and runs keep their LoRAs.
        </p>
      <//>`
    }
    ${
      moving &&
      html`<${MoveControl} dataset=${dataset} control=${moving} images=${images} words=${words} onMove=${pair}
        onClose=${() => setMoving(null)} />`
    }
    ${
      replacing &&
      html`<${Replace} images=${images} captionOf=${captionOf} onReplace=${replaceAll}
        onClose=${() => setReplacing(false)} />`
    }
    <${NextBar} note=${noteOf(total, underway)}>
      <a class="button" href="#/">Back</a>
      <${Button} kind="primary" disabled=${!ready} onClick=${() => go("new", dataset, "model")}>Next: model<//>
    <//>
  `;
}

/** The settings of a draft with what its pairs teach. */
const taught = (draft, pairs) =>
  Object.fromEntries([
    ...Object.entries(draft.settings).filter(([name]) => name !== "pairs"),
    ...(pairs === "none" ? [] : [["pairs", pairs]]),
  ]);

function noteOf(total, underway) {
  if (!total) return "Add photos to go on.";
  if (underway) return `${count(underway, "photo")} on the way…`;
  return total < FEW ? "It works with a few, and better with ten or more." : "";
}

/**
 * The check of the dataset, made again when photos, captions, trigger or model have settled: [check, error, checking],
 * where checking is {done, total} images during a long one, else null.
 */
function useCheck(dataset, draft, images, captions, controls, version) {
  const [result, setResult] = useState(/** @type {[Api.DataCheckAnswer | null, any]} */ ([null, null]));
  const [checking, setChecking] = useState(null);
  useEvents("", {
    check: ({ name, done, total }) => name === dataset && setChecking(done < total ? { done, total } : null),
  });
  const files = images.map((one) => one.file).join("\n");
  const words = JSON.stringify(captions);
  useEffect(() => {
    if (!files) {
      setResult([null, null]);
      return undefined;
    }
    const stop = new AbortController();
    const ask = async () => {
      try {
        const query = {
          model: draft.model,
          edit: draft.edit,
          trigger: draft.trigger,
          resolution: draft.settings.resolution,
        };
        setResult([await get(["datasets", dataset, "check"], query, stop.signal), null]);
      } catch (error) {
        if (stop.signal.aborted) return;
        if (isPassing(error)) timer = setTimeout(ask, 2000);
        else setResult(([before]) => [before, error]);
      }
    };
    let timer = setTimeout(ask, CHECK_AFTER_MS);
    return () => {
      clearTimeout(timer);
      stop.abort();
      setChecking(null);
    };
  }, [
    dataset,
    files,
    words,
    draft.trigger,
    draft.model,
    draft.edit,
    draft.settings.resolution,
    version,
    controls.length,
  ]);
  return [...result, checking];
}
