// The model that the LoRA is for: what is in the model folders, what each lacks, and whether it fits.
import { get, post } from "../lib/api.mjs";
import { isOnItsWay, useDownloads } from "../lib/downloads.mjs";
import { useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { go, link } from "../lib/router.mjs";
import { status, useStore } from "../lib/stores.mjs";
import { bytes, count } from "../lib/words.mjs";
import { Button, Field, Loading, Notice, Problem, useLoaded } from "../parts/basics.mjs";
import { GetDialog, Getting, OwnFile, Shelf } from "../parts/shelf.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";

export function ModelView({ dataset }) {
  const [draft, change] = useDraft(dataset);
  const [found, error, reload] = useLoaded((signal) => get(["models"], {}, signal), []);
  const server = useStore(status);
  const models = found?.models ?? [];
  const [arrivals, setArrivals] = useState(0); // of files in the model folders
  const lookAgain = () => {
    setArrivals((number) => number + 1);
    reload();
  };
  const [downloads, lookAtDownloads] = useDownloads(lookAgain);
  const [wanted, setWanted] = useState(null);
  const [isOpen, setOpen] = useState(null); // whether the shelf is; null until it was opened or closed
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
  const families = [
    ...Map.groupBy(
      models.filter((one) => !one.builtin),
      (one) => one.family,
    ),
  ];
  const builtin = models.filter((one) => one.builtin);
  const row = (model) => html`<${ModelRow} key=${model.name} model=${model} isBest=${model === best}
    chosen=${chosen} onChoose=${() => choose(model)} edit=${draft.edit} onEdit=${(edit) => change({ edit })}
    onGet=${() => setWanted({ kind: "model", name: model.name })}
    download=${downloads.find((one) => one.subject === `model:${model.name}`)} onDownload=${lookAtDownloads}
    plan=${() => plan(model)} adapter=${adapter}
    onAdapter=${(name) => change({ settings: name ? { ...others, training_adapter: name } : others })} />`;
  return html`
    <${Stepper} at="model" dataset=${dataset} />
    <section>
      <h1>Which model should learn it?</h1>
      <p>The LoRA will work with this model, and mostly with others of its family.</p>
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="models" />`}
      ${
        found &&
        !families.length &&
        html`<${Notice} mood="fair">
          <p>
            There is no model of your own yet. Get one
            below${builtin.length ? ", or try everything with the small one that is built in" : ""}.
          </p>
          ${found.notes.map((one) => html`<p key=${one}>Also, ${one}.</p>`)}
        <//>`
      }
      ${
        cannotEdit &&
        html`<${Notice} mood="fair">
          <p>
            ${chosen ? `${chosen.title} cannot edit pictures` : "None of these models edits pictures"}, and your photos
            have pictures before an edit. Choose or get one that can. Without one, a slider between both pictures works
            with every model.
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
      <div role="radiogroup" aria-label="Model" class="choices">
        ${families.map(
          ([family, members]) => html`<div class="family" key=${family}><h2>${family}</h2>${members.map(row)}</div>`,
        )}
        ${
          builtin.length > 0 &&
          html`<div class="family">
            <h2>To try it out</h2>${builtin.map(row)}
            <p class="faint">
              It draws icons of 64 × 64 pixels, on any machine and without a download. What it learns shows how
              everything here works; its LoRAs fit no other model.
            </p>
          </div>`
        }
      </div>
      ${
        found &&
        html`<details class="get-models"
            open=${isOpen ?? (!families.length || downloads.some((one) => isOnItsWay(one) || one.error))}
            onToggle=${(event) => setOpen(event.currentTarget.open)}>
          <summary><h2>Get a model</h2></summary>
          <p>
            Models to begin with, the smallest first. Nothing is downloaded before you have seen what, how much and
            from where.
          </p>
          <${Shelf} downloads=${downloads} round=${arrivals} onGet=${setWanted} onChange=${lookAtDownloads} />
          <${OwnFile} place=${joined(server?.base_dir, "models/checkpoints")} onAdded=${lookAgain} />
          <div class="actions"><${Button} onClick=${lookAgain}>Look again<//></div>
        </details>`
      }
      ${wanted && html`<${GetDialog} wanted=${wanted} onStarted=${lookAtDownloads} onClose=${() => setWanted(null)} />`}
      ${
        found &&
        found.other.length > 0 &&
        html`<details>
          <summary>${count(found.other.length, "file")} in the model folders that cannot be trained</summary>
          <ul>
            ${found.other.map(
              (one) => html`<li key=${`${one.place}/${one.name}`}>
                <b>${one.name}</b> <span class="faint">in ${one.place}: ${one.what}</span>
              </li>`,
            )}
          </ul>
        </details>`
      }
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
  const own = ready.filter(
    (one) => !one.builtin && !tooLarge.has(one.name) && (isPairs ? one.takes_controls : !one.edit),
  );
  const largest = own.sort((a, b) => b.size_bytes - a.size_bytes)[0] ?? null;
  return isPairs ? largest : (largest ?? ready.find((one) => one.builtin) ?? ready[0] ?? null);
}

const joined = (base, path) =>
  base ? `${base}${base.includes("\\") ? "\\" : "/"}${base.includes("\\") ? path.replace("/", "\\") : path}` : path;

/** Whether a model gets pictures before an edit beside a caption. */
export const takesControls = (model, draft) =>
  draft.edit && draft.model === model.name ? draft.edit !== "none" : model.takes_controls;

/** What the list says of pictures before an edit, and how the variant was recognised. */
const editsBy = (model) =>
  model.edit && model.takes_controls
    ? `Edits pictures: ${model.edit}, by its ${model.recognised_by}`
    : model.takes_controls
      ? "Edits pictures, as all of its family"
      : null;

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

/** @param {Props<{ model: Api.ModelRow }>} props */
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
  download,
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
  const needed = memory?.memory_bytes;
  const fits = memory?.fits;
  const row = html`<label class=${`choice ${isChosen ? "chosen" : ""} ${model.ready ? "" : "unready"}`}>
    <input type="radio" name="model" value=${model.name} checked=${isChosen} disabled=${!model.ready}
      onChange=${onChoose} />
    <span class="choice-body">
      <span class="choice-title">
        <b>${model.title || model.name}</b>${isBest && html` <span class="tag">Suggested</span>`}
      </span>
      <span class="faint">
        ${[
          model.builtin ? "Built in; learns small pictures in a minute or two" : null,
          bytes(model.size_bytes),
          model.precision,
          editsBy(model),
        ]
          .filter(Boolean)
          .join(" · ")}
      </span>
      ${
        model.builtin &&
        html`<img class="model-sample" src=${`pages/${model.name}.webp`} alt="Pictures that it drew"
          onError=${(event) => (event.currentTarget.hidden = true)} />`
      }
      ${
        needed &&
        html`<span class=${fits === false ? "fair" : "faint"}>
          ${
            fits === false
              ? `Training needs ${bytes(needed)} of memory, more than is there`
              : `Training needs about ${bytes(needed)} of memory${fits ? ", which fits" : ""}`
          }
        </span>`
      }
      ${
        !model.ready &&
        html`<span class="fair">
          Missing: ${model.missing
            .map((one) => `${one.part.replaceAll("_", " ")}${one.usual_file ? ` (${one.usual_file})` : ""}`)
            .join(", ")}
        </span>`
      }
    </span>
  </label>`;
  if (!model.ready && model.missing.some((one) => one.on_hub)) {
    return html`<div>
      ${row}
      <${Getting} class="below" download=${download} onChange=${onDownload} of=${` of ${model.title}`}
        what="Get what is missing" onGet=${onGet} />
    </div>`;
  }
  if (!isChosen) return row;
  const distilled = html`<${Distilled} plan=${memory} adapter=${adapter} onAdapter=${onAdapter} />`;
  if (!model.edits?.length) return html`<div>${row}${distilled}</div>`;
  return html`<div>
    ${row}${distilled}
    <${Field} class="kind" label="Does it edit pictures?"
        help="Its file cannot tell: models that edit pictures have the same tensors.">
      ${(attributes) => html`<select ...${attributes} value=${edit ?? ""}
          onChange=${(event) => onEdit(event.currentTarget.value || null)}>
        <option value="">
          ${model.edit ? `Yes, ${model.edit}, by its ${model.recognised_by}` : "No, by its name"}
        </option>
        ${model.edits
          .filter((one) => one !== model.edit)
          .map((one) => html`<option key=${one} value=${one}>Yes, ${one}</option>`)}
        ${model.edit && html`<option value="none">No</option>`}
      </select>`}
    <//>
  </div>`;
}
