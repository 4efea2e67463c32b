// The photos of a LoRA: what they show, their captions, what is wrong with them, and what of them is trained.
import { get, post, put, remove } from "../lib/api.mjs";
import { useConflicts, useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.mjs";
import { useEvents } from "../lib/live.mjs";
import { go } from "../lib/router.mjs";
import { announcement, say, useStore } from "../lib/stores.mjs";
import { forget, isVideo, leftOut, upload, uploadsOf } from "../lib/uploads.mjs";
import { capital, count, slug } from "../lib/words.mjs";
import { Button, Elsewhere, Field, Loading, Notice, Problem, Question, isPassing, useLoaded } from "../parts/basics.mjs";
import { Before, MoveControl, PAIRS } from "../parts/before.mjs";
import { DropZone } from "../parts/drop_zone.mjs";
import { PhotoTile, isStale } from "../parts/photo_tile.mjs";
import { Replace } from "../parts/replace.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";
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
  const [replacing, setReplacing] = useState(false);
  const [clearing, setClearing] = useState(false);
  const [moving, setMoving] = useState(null); // the picture before an edit that is to have another picture
  const [version, setVersion] = useState(0); // of the pictures before, whose names stay when they change places
  const [listed] = useLoaded(async (signal) => (draft.model ? get(["models"], {}, signal) : null), [draft.model]);
  const model = listed?.models.find((one) => one.name === draft.model);
  const others = useStore(leftOut)[dataset] ?? [];
  const sent = useStore(uploadsOf(dataset));
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
  const stored = new Set([...images.map((one) => one.file), ...controls.map((one) => `control/${one.file}`)]);
  const isPairs = draft.pairs ?? (controls.length > 0 || (model ? takesControls(model, draft) : false));
  const words = PAIRS[draft.settings.pairs] ?? PAIRS.none;
  const previews = new Map(sent.filter((one) => one.file).map((one) => [one.file, one]));
  const onTheWay = sent.filter((one) => one.state !== "done" || (!stored.has(one.file) && !gone.has(one.file)));
  const underway = onTheWay.filter((one) => one.state === "waiting" || one.state === "sending").length;
  const captionOf = (image) => captions[image.file] ?? image.caption ?? "";
  const [check, checkError] = useCheck(dataset, draft, images, captions, controls, version);

  const take = (files, before) => {
    announcement.set(`${count(upload(dataset, files, before), "photo")} added.`);
    if (before) setVersion((number) => number + 1);
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
  const pair = (control, image) => changeControls(async () => {
    const { changed } = await put(["datasets", dataset, "controls"], { control, image });
    if (changed) say(changed > 1 ? `The ${words.of} ${image} and the other one have changed places.` : `${image} has its ${words.other}.`);
  });
  const removeControl = (file) => changeControls(async () => {
    await remove(["datasets", dataset, "controls", file]);
    say(`${file} was moved to the removed files.`);
  });
  const actions = found?.builtin ? null : { pair, remove: removeControl, move: setMoving, choose: (files, image) => take(files, image) };

  /** Stores captions where they are still those that were `seen`, by file; otherwise it shows the others from then on. */
  function store(texts, seen) {
    underWay.current = { ...underWay.current, ...texts };
    setCaptions((all) => ({ ...all, ...texts }));
    const send = async () => {
      try {
        await put(["datasets", dataset, "captions"], Object.fromEntries(Object.entries(texts).map(([file, caption]) => [file, { caption, seen: seen[file] }])));
      } catch (failure) {
        setCaptions((all) => ({ ...all, ...seen, ...(isStale(failure) ? failure.details : {}) }));
        if (!isStale(failure)) say(failure.message, { mood: "bad" });
        throw failure;
      } finally {
        underWay.current = Object.fromEntries(Object.entries(underWay.current).filter(([file, text]) => texts[file] !== text));
      }
    };
    return (sending.current = sending.current.then(send, send)); // one after the other: each has seen what came before
  }

  async function replaceAll(texts) {
    const before = Object.fromEntries(images.filter((one) => one.file in texts).map((one) => [one.file, captionOf(one)]));
    await store(texts, before);
    const undo = () => store(before, texts).catch((failure) => isStale(failure) && say(failure.message, { mood: "bad" }));
    say(`${count(Object.keys(texts).length, "caption")} changed.`, { undo });
  }

  async function drop(image) {
    setGone((all) => new Set([...all, image.file]));
    try {
      const { removed } = await remove(["datasets", dataset, "images", image.file]);
      const entry = previews.get(image.file);
      if (entry) forget(dataset, entry.key);
      say(`${image.file} was moved to the removed files.`, { undo: () => restore(image.file, removed) });
    } catch (failure) {
      setGone((all) => new Set([...all].filter((file) => file !== image.file)));
      say(failure.message, { mood: "bad" });
    }
  }

  async function restore(file, removed) {
    try {
      await post(["datasets", dataset, "restore"], { removed });
      setGone((all) => new Set([...all].filter((one) => one !== file)));
      reload();
    } catch (failure) {
      say(failure.message, { mood: "bad" });
    }
  }

  async function removeAll() {
    const { removed } = await remove(["datasets", dataset]);
    say(`The photos were moved to ${removed}.`);
    go();
  }

  const problemsOf = (image) => check?.images?.[image.file]?.problems ?? [];
  const lacking = isPairs ? images.filter((one) => !one.controls?.length).length : 0;
  const odd = images.filter((one) => problemsOf(one).length);
  const shown = onlyOdd && odd.length ? odd : images;
  const total = images.length + onTheWay.filter((one) => one.state !== "skipped").length;
  const captioned = images.filter((one) => captionOf(one).trim()).length;
  const ready = images.length > 0 && underway === 0;

  return html`
    <${Stepper} at="photos" dataset=${dataset} />
    <section>
      <h1>Your photos</h1>
      <div class="fields two">
        <${Field} label="Name of the LoRA" help="The file and its folder are called so.">
          ${(attributes) => html`<input ...${attributes} type="text" maxlength="64" value=${draft.name} placeholder=${slug(draft.trigger) || dataset}
            onInput=${(event) => change({ name: event.currentTarget.value })} />
            ${"name" in theirs && html`<${Elsewhere} there=${theirs.name} what="name" onChoose=${(isMine) => choose("name", isMine)} />`}`}<//>
        <${Field} label="Trigger word" optional help="Words that will call up what the photos show, such as “milo cat”. Put them into your prompts later.">
          ${(attributes) => html`<input ...${attributes} type="text" maxlength="200" value=${draft.trigger} autocapitalize="off"
            onInput=${(event) => change({ trigger: event.currentTarget.value })} />
            ${"trigger" in theirs && html`<${Elsewhere} there=${theirs.trigger} what="trigger word" onChoose=${(isMine) => choose("trigger", isMine)} />`}`}<//>
      </div>
    </section>
    <section aria-labelledby="photos">
      <div class="head"><h2 id="photos">${total ? count(total, "photo") : "Photos"}</h2>
        <span class="faint" role="status">${underway ? `${count(underway, "photo")} on the way…` : images.length ? `${captioned} of ${images.length} with a caption` : ""}</span></div>
      ${found?.builtin ? html`<p class="faint">These pictures belong to Lorasmith, to try it with; they cannot be changed.</p>` : html`<${DropZone} onFiles=${take} pairs=${isPairs ? words : null} />
        <label class="check"><input type="checkbox" checked=${isPairs} onChange=${(event) => change({ pairs: event.currentTarget.checked, settings: taught(draft, "none") })} /> These are pairs: two pictures of each name</label>
        ${isPairs && html`<${Field} label="What they teach">${(attributes) => html`<select ...${attributes} value=${draft.settings.pairs ?? "none"} onChange=${(event) => change({ pairs: true, settings: taught(draft, event.currentTarget.value) })}>
          ${Object.entries(PAIRS).map(([name, { title }]) => html`<option key=${name} value=${name}>${capital(title)}</option>`)}</select>`}<//>`}`}
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="photos" />`}
      ${others.length > 0 && html`<${Notice}><p>${count(others.length, "file was", "files were")} left out: ${others.slice(0, 3).join(", ")}${others.length > 3 ? " …" : ""}</p>
        ${others.some(isVideo) && html`<p>Videos are not added here: run <code>lorasmith train</code> on their folder with a model of videos, or add them as animated WebP files.</p>`}<//>`}
      <${Findings} check=${check} error=${checkError} images=${images} trigger=${draft.trigger} captioned=${captioned} lacking=${lacking} words=${words} model=${model} draft=${draft} hasControls=${controls.length > 0} />
      ${images.length > 0 && html`<div class="tools">
        ${!found.builtin && html`<${Button} class="small" onClick=${() => setReplacing(true)}>Find and replace in captions<//>`}
        <label class="check"><input type="checkbox" checked=${crops} onChange=${(event) => setCrops(event.currentTarget.checked)} /> Show what is trained</label>
        ${odd.length > 0 && html`<label class="check"><input type="checkbox" checked=${onlyOdd} onChange=${(event) => setOnlyOdd(event.currentTarget.checked)} /> Only the ${count(odd.length, "photo")} with remarks</label>`}
        ${!found.builtin && html`<${Button} class="small" onClick=${() => setClearing(true)}>Remove all<//>`}
      </div>`}
      <ul class=${`tiles ${isPairs ? "pairs" : ""}`}>
        ${onTheWay.map((entry) => html`<${PhotoTile} key=${`sent ${entry.key}`} upload=${entry} onRemove=${() => forget(dataset, entry.key)} />`)}
        ${shown.map((image) => html`<${PhotoTile} key=${image.file} dataset=${dataset} image=${image} preview=${previews.get(image.file)?.preview}
          caption=${captionOf(image)} problems=${problemsOf(image)} facts=${crops ? check?.images?.[image.file] : null} trigger=${draft.trigger}
          isFixed=${found.builtin} isEdited=${image.file === edited} onCaption=${(caption, seen) => store({ [image.file]: caption }, { [image.file]: seen })} onRemove=${() => drop(image)}
          before=${isPairs ? html`<${Before} dataset=${dataset} image=${image.file} controls=${image.controls ?? []} version=${version} words=${words} actions=${actions} />` : null} />`)}
      </ul>
      ${isPairs && stray.length > 0 && html`<h3>${capital(words.others)}, without ${words === PAIRS.none ? "one after" : "a picture"}</h3>
        <p class="faint">Drag each onto the picture that it belongs to, or press ⇄. What stays here is not trained on.</p>
        <ul class="tiles">${stray.map((one) => html`<li class="tile" key=${one.file}><${Before} dataset=${dataset} image=${null} controls=${[one]} version=${version} words=${words} actions=${actions} />
          <p class="tile-name"><span class="clip" title=${one.file}>${one.file}</span></p></li>`)}</ul>`}
    </section>
    ${clearing && html`<${Question} title="Remove these photos?" yes="Remove all" kind="danger" onClose=${() => setClearing(false)} onYes=${removeAll}>
      <p>The folder <b>${dataset}</b> with ${count(images.length, "photo")} and their captions is moved to the removed files of Lorasmith. Nothing is deleted, and runs keep their LoRAs.</p><//>`}
    ${moving && html`<${MoveControl} dataset=${dataset} control=${moving} images=${images} words=${words} onMove=${pair} onClose=${() => setMoving(null)} />`}
    ${replacing && html`<${Replace} images=${images} captionOf=${captionOf} onReplace=${replaceAll} onClose=${() => setReplacing(false)} />`}
    <${NextBar} note=${noteOf(total, underway)}>
      <a class="button" href="#/">Back</a>
      <${Button} kind="primary" disabled=${!ready} onClick=${() => go("new", dataset, "model")}>Next: model<//>
    <//>`;
}

/** The settings of a draft with what its pairs teach. */
const taught = (draft, pairs) => Object.fromEntries([...Object.entries(draft.settings).filter(([name]) => name !== "pairs"), ...(pairs === "none" ? [] : [["pairs", pairs]])]);

function noteOf(total, underway) {
  if (!total) return "Add photos to go on.";
  if (underway) return `${count(underway, "photo")} on the way…`;
  return total < FEW ? "It works with a few, and better with ten or more." : "";
}

/** The check of the dataset, made again when photos, captions, trigger or model have settled. */
function useCheck(dataset, draft, images, captions, controls, version) {
  const [result, setResult] = useState([null, null]);
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
        const query = { model: draft.model, edit: draft.edit, trigger: draft.trigger, resolution: draft.settings.resolution };
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
    };
  }, [dataset, files, words, draft.trigger, draft.model, draft.edit, draft.settings.resolution, version, controls.length]);
  return result;
}

function Findings({ check, error, images, trigger, captioned, lacking, words, model, draft, hasControls }) {
  if (error) return html`<${Notice} mood="fair"><p>The photos were not checked. ${error.message}</p><//>`;
  if (!images.length) return null;
  const wordless = !captioned && !trigger.trim();
  const skipped = check?.skipped ?? [];
  const findings = check?.findings ?? [];
  const unused = hasControls && model && words === PAIRS.none && !takesControls(model, draft);
  if (!wordless && !skipped.length && !findings.length && !lacking && !unused) return check ? html`<p class="all-good"><span aria-hidden="true">✓</span> Nothing to mend in these photos.</p>` : null;
  return html`<ul class="findings">
    ${wordless && html`<li class="fair-item">Give a trigger word above, or captions to the photos, so that the LoRA learns what to call this.</li>`}
    ${lacking > 0 && html`<li class="fair-item">${lacking === 1 ? "A photo lacks" : `${lacking} photos lack`} ${words.lack}</li>`}
    ${unused && html`<li class="fair-item">${model.title} takes no pictures before an edit. Choose an edit model, or what else the pairs teach, or controls none in the settings to train without them.</li>`}
    ${skipped.map((one) => html`<li class="bad-item" key=${one.file}>${one.file} cannot be used: ${one.reason}</li>`)}
    ${findings.map((one, index) => html`<li key=${index} class=${one.severity === "error" || one.severity === "bad" ? "bad-item" : "fair-item"}>${one.message}</li>`)}
  </ul>`;
}
