// The model that the LoRA is for: what is in the model folders, what each lacks, and whether it fits.
import { get, post } from "../lib/api.mjs";
import { isOnItsWay, useDownloads } from "../lib/downloads.mjs";
import { useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { go, link } from "../lib/router.mjs";
import { status, useStore } from "../lib/stores.mjs";
import { cardFor, count } from "../lib/words.mjs";
import { Button, Field, Loading, Notice, Problem, useLoaded } from "../parts/basics.mjs";
import { GetDialog, Getting, Marks, OwnFile, Shelf, timeWords } from "../parts/shelf.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";

/** The models of the folders and what changes them. */
function useShelf() {
  const [found, error, reload] = useLoaded((signal) => get(["models"], {}, signal), []);
  const [round, setRound] = useState(0); // of files that arrived in the model folders
  const lookAgain = () => {
    setRound((number) => number + 1);
    reload();
  };
  const [downloads, lookAtDownloads] = useDownloads(lookAgain);
  const [wanted, setWanted] = useState(null);
  return { found, error, reload, round, lookAgain, downloads, lookAtDownloads, wanted, setWanted };
}

const SHOWN = 3; // broken files

const FileRow = ({ file: { name, place, what } }) => html`<li>
  <b>${name}</b> <span class="faint">in ${place}: ${what}</span>
</li>`;

/** Files of the model folders that are no models, or damaged, each with its reason. */
function Broken({ found }) {
  const broken = found.other.filter((one) => !one.recognised);
  if (!broken.length) return null;
  const rows = broken.map((one) => html`<${FileRow} key=${`${one.place}/${one.name}`} file=${one} />`);
  return html`<${Notice} mood="fair">
    <p>${count(broken.length, "file")} in the model folders cannot be used:</p>
    <ul>${rows.slice(0, SHOWN)}</ul>
    ${
      rows.length > SHOWN &&
      html`<details><summary>${rows.length - SHOWN} more</summary><ul>${rows.slice(SHOWN)}</ul></details>`
    }
  <//>`;
}

/** Models to get, a place for a file that one has, and parts that are not used. */
function Others({ found, shelf, isOpen: isFirst }) {
  const { round, lookAgain, downloads, lookAtDownloads, wanted, setWanted } = shelf;
  const server = useStore(status);
  const [isOpen, setOpen] = useState(null); // null until it was opened or closed
  const unused = found.other.filter((one) => one.recognised);
  return html`
    ${
      unused.length > 0 &&
      html`<details>
        <summary>${count(unused.length, "file fits", "files fit")} none of these models</summary>
        <ul>${unused.map((one) => html`<${FileRow} key=${`${one.place}/${one.name}`} file=${one} />`)}</ul>
      </details>`
    }
    <details class="get-models" open=${isOpen ?? (isFirst || downloads.some((one) => isOnItsWay(one) || one.error))}
        onToggle=${(event) => setOpen(event.currentTarget.open)}>
      <summary><h2>Get a model</h2></summary>
      <${Shelf} downloads=${downloads} round=${round} onGet=${setWanted} onChange=${lookAtDownloads}
        suggests=${found.models.every((one) => one.builtin)} />
      <${OwnFile} place=${joined(server?.base_dir, "models/checkpoints")} onAdded=${lookAgain} />
      <div class="actions"><${Button} onClick=${lookAgain}>Look again<//></div>
    </details>
    ${wanted && html`<${GetDialog} wanted=${wanted} onStarted=${lookAtDownloads} onClose=${() => setWanted(null)} />`}
  `;
}

/** The models that are here, and others to get. */
export function ModelsView() {
  const shelf = useShelf();
  const { found, error, reload, downloads, lookAtDownloads, setWanted } = shelf;
  return html`<section>
    <h1>Models</h1>
    <${Problem} error=${error} onRetry=${reload} />
    ${!found && !error && html`<${Loading} what="models" />`}
    ${found && html`<${Broken} found=${found} />`}
    <ul class="models">
      ${found?.models.map(
        (model) => html`<li key=${model.name}>
          <div class="choice model"><${ModelBody} model=${model} /></div>
          <${Missing} model=${model} downloads=${downloads} onGet=${setWanted} onChange=${lookAtDownloads} />
        </li>`,
      )}
    </ul>
    ${found && html`<${Others} found=${found} shelf=${shelf} isOpen />`}
  </section>`;
}

export function ModelView({ dataset }) {
  const [draft, change] = useDraft(dataset);
  const shelf = useShelf();
  const { found, error, reload, downloads, lookAtDownloads, setWanted } = shelf;
  const models = found?.models ?? [];
  const [tooLarge, setTooLarge] = useState(new Set());
  const [photos] = useLoaded((signal) => get(["datasets", dataset], {}, signal), [dataset]);
  const { pairs } = draft.settings;
  const isEdit =
    !pairs && draft.settings.controls !== "none" && (photos?.images.some((one) => one.controls?.length) ?? false);
  const best = bestOf(models, tooLarge, isEdit);
  const chosen = (draft.is_chosen && models.find((one) => one.name === draft.model && one.ready)) || best;
  useEffect(() => {
    if (found && photos && chosen && chosen.name !== draft.model) change({ model: chosen.name, edit: null });
  }, [found, photos, chosen?.name]);
  // A training adapter is for one model.
  const { training_adapter: adapter = null, ...others } = draft.settings;
  const cannotEdit = found && photos && isEdit && !(chosen && takesControls(chosen, draft));
  const choose = (model) =>
    change({
      model: model.name,
      edit: null,
      is_chosen: true,
      ...(model.name !== draft.model && adapter ? { settings: others } : {}),
    });
  const plan = async (model) => {
    // What it needs is asked for, whether or not it can train on these photos.
    const found = await post(["plans"], {
      dataset,
      model: model.name,
      trigger: draft.trigger,
      settings: pairs ? { pairs } : { controls: takesControls(model, draft) ? "optional" : "none" },
    });
    if (found.fits === false) setTooLarge((names) => new Set([...names, model.name]));
    return found;
  };
  const row = (model) => html`<${ModelRow} key=${model.name} model=${model} isBest=${model === best && !model.builtin}
    chosen=${chosen} onChoose=${() => choose(model)} edit=${draft.edit} onEdit=${(edit) => change({ edit })}
    downloads=${downloads} onGet=${setWanted} onDownload=${lookAtDownloads}
    plan=${() => plan(model)} adapter=${adapter}
    onAdapter=${(name) => change({ settings: name ? { ...others, training_adapter: name } : others })} />`;
  return html`
    <${Stepper} at="model" dataset=${dataset} />
    <section>
      <h1>Which model should learn it?</h1>
      <p class="faint">The LoRA will work with this model, and mostly with others of its family.</p>
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="models" />`}
      ${found && html`<${Broken} found=${found} />`}
      ${found?.notes.map((one) => html`<${Notice} mood="fair" key=${one}><p>${one}.</p><//>`)}
      ${
        cannotEdit &&
        html`<${Notice} mood="fair">
          <p>
            ${chosen ? t`${chosen.title} cannot edit pictures` : t`None of these models edits pictures`}, and your
            photos have pictures before an edit. Choose or get one that can. Without one, a slider between both pictures
            works with every model.
          </p>
          <div class="actions">
            <${Button} onClick=${() => change({ pairs: true, settings: { ...draft.settings, pairs: "slider" } })}>
              Make it a slider
            <//>
            <${Button} onClick=${() => change({ settings: { ...draft.settings, controls: "none" } })}>
              Train on the pictures after alone
            <//>
          </div>
        <//>`
      }
      <div role="radiogroup" aria-label="Model" class="models">
        ${models.map(row)}
      </div>
      ${found && html`<${Others} found=${found} shelf=${shelf} isOpen=${models.every((one) => one.builtin)} />`}
    </section>
    <${NextBar} note=${chosen ? html`<b>${chosen.title}</b>` : ""}>
      <a class="button" href=${link("new", dataset, "photos")}>Back</a>
      <${Button} kind="primary" disabled=${!chosen || chosen.name !== draft.model || cannotEdit}
          onClick=${() => go("new", dataset, "settings")}>
        Next: settings<//>
    <//>
  `;
}

/**
 * The largest model that is whole, fit for pairs or for single photos, and not too large for this machine: larger
 * ones learn more. The built-in one otherwise, but none for pairs if none of them edits pictures.
 */
export function bestOf(models, tooLarge = new Set(), isPairs = false) {
  const ready = models.filter((one) => one.ready);
  const named = isPairs ? null : ready.find((one) => one.best && !tooLarge.has(one.name));
  const own = ready.filter(
    (one) => !one.builtin && !tooLarge.has(one.name) && (isPairs ? one.takes_controls : !one.edit),
  );
  // Without times of the others, the built-in one is named for want of a better one.
  if (named && (!named.builtin || own.every((one) => one.seconds !== null))) return named;
  const largest = own.sort((a, b) => b.size_bytes - a.size_bytes)[0] ?? null;
  return isPairs ? largest : (largest ?? ready.find((one) => one.builtin) ?? ready[0] ?? null);
}

const joined = (base, path) =>
  base ? `${base}${base.includes("\\") ? "\\" : "/"}${base.includes("\\") ? path.replace("/", "\\") : path}` : path;

/** Whether a model gets pictures before an edit beside a caption. */
export const takesControls = (model, draft) =>
  draft.edit && draft.model === model.name ? draft.edit !== "none" : model.takes_controls;

/** What training a distilled model needs, and a way to train with the LoRA that was made for that, if it is here. */
export function Distilled({ plan, adapter, onAdapter }) {
  if (adapter)
    return html`<p class="faint">
      Trained with ${adapter} beneath. <${Button} class="small" onClick=${() => onAdapter(null)}>Leave it out<//>
    </p>`;
  if (!plan?.distilled) return null;
  return html`<${Notice} mood="fair">
    <p>${plan.distilled}</p>
    ${
      plan.usual_adapter &&
      html`<${Button} onClick=${() => onAdapter(plan.usual_adapter)}>Train with ${plan.usual_adapter}<//>`
    }
  <//>`;
}

/** What a model draws, and what it takes to train it. */
function ModelBody({ model, isBest, memory }) {
  const time = timeWords(model.seconds);
  return html`
    ${
      model.builtin &&
      html`<img class="model-sample" src=${`pages/${model.name}.webp`} alt="Pictures that it drew"
        onError=${(event) => (event.currentTarget.hidden = true)} />`
    }
    <b>${model.title || model.name}</b>
    <${Marks} best=${isBest} edits=${model.takes_controls} clips=${model.clips} />
    <span class="faint">
      ${
        model.builtin
          ? t`Built in: icons of 64 × 64 pixels, to see how everything works. Its LoRAs fit no other model.`
          : model.family
      }
    </span>
    ${
      memory?.fits === false
        ? html`<span class="fair">Too large for this machine: needs ${cardFor(memory.memory_bytes)}</span>`
        : time && html`<span class="faint">${time}</span>`
    }
    ${
      !model.ready &&
      html`<span class="fair">
        Missing: ${model.missing
          .map((one) => `${one.part.replaceAll("_", " ")}${one.usual_file ? ` (${one.usual_file})` : ""}`)
          .join(", ")}
      </span>`
    }
  `;
}

/** The way to get what a model lacks. */
const Missing = ({ model, downloads, onGet, onChange }) =>
  !model.ready && model.missing.some((one) => one.on_hub)
    ? html`<${Getting} download=${downloads.find((one) => one.subject === `model:${model.name}`)}
        onChange=${onChange} of=${t` of ${model.title}`} what="Get what is missing"
        onGet=${() => onGet({ kind: "model", name: model.name })} />`
    : null;

function ModelRow({
  model,
  isBest,
  chosen,
  onChoose,
  plan,
  edit,
  onEdit,
  adapter,
  onAdapter,
  onGet,
  downloads,
  onDownload,
}) {
  const isChosen = model === chosen;
  const [memory, setMemory] = useState(null);
  useEffect(() => {
    if (!isChosen || memory || !model.ready) return undefined;
    let shown = true;
    plan().then(
      (found) => shown && setMemory(found),
      () => shown && setMemory(null),
    );
    return () => (shown = false);
  }, [isChosen]);
  const row = html`<label class=${`choice model ${isChosen ? "chosen" : ""} ${model.ready ? "" : "unready"}`}>
    <input type="radio" name="model" value=${model.name} checked=${isChosen} disabled=${!model.ready}
      onChange=${onChoose} />
    <${ModelBody} model=${model} isBest=${isBest} memory=${memory} />
  </label>`;
  if (!isChosen)
    return html`<div>
      ${row}<${Missing} model=${model} downloads=${downloads} onGet=${onGet} onChange=${onDownload} />
    </div>`;
  const distilled = html`<${Distilled} plan=${memory} adapter=${adapter} onAdapter=${onAdapter} />`;
  if (!model.edits?.length) return html`<div>${row}${distilled}</div>`;
  return html`<div>
    ${row}${distilled}
    <${Field} class="kind" label="Does it edit pictures?"
        help="Its file cannot tell: models that edit pictures have the same tensors.">
      ${(attributes) => html`<select ...${attributes} value=${edit ?? ""}
          onChange=${(event) => onEdit(event.currentTarget.value || null)}>
        <option value="">
          ${model.edit ? t`Yes, ${model.edit}, by its ${model.recognised_by}` : t`No, by its name`}
        </option>
        ${model.edits
          .filter((one) => one !== model.edit)
          .map((one) => html`<option key=${one} value=${one}>Yes, ${one}</option>`)}
        ${model.edit && html`<option value="none">No</option>`}
      </select>`}
    <//>
  </div>`;
}
