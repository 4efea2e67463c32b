// A folder to share a LoRA with: what is in it and what leaves is listed, then it is downloaded or uploaded to the hub.
import { address, post } from "../lib/api.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { bytes, whole } from "../lib/words.mjs";
import { Button, Field, Loading, Problem } from "./basics.mjs";
import { Icon } from "./icons.mjs";
import { nameOfRun } from "./run_card.mjs";

const MISSING = [
  { key: "trigger", label: t`Trigger`, example: "sks dog", known: (found) => found.trigger },
  {
    key: "base_model",
    label: t`Base model on the hub`,
    example: "owner/name",
    known: (found) => found.base_models.length,
  },
  { key: "licence", label: t`Licence of the base model`, example: "apache-2.0", known: (found) => found.licence },
];

/** @param {Props<{ run: Api.RunAnswer, step: number | null }>} props */
export function HubFolder({ run, step, onBack }) {
  const [asked, setAsked] = useState({ step, private_captions: true, with_training_pictures: false });
  const [found, setFound] = useState(null);
  const [isBusy, setBusy] = useState(true);
  const [lacking, setLacking] = useState([]);
  const [error, setError] = useState(null);
  useEffect(() => {
    let isShown = true;
    const write = async () => {
      try {
        const answer = await post(["runs", run.id, "hub-folder"], asked);
        if (!isShown) return;
        setFound(answer);
        setLacking((before) => (before.length ? before : MISSING.filter((one) => !one.known(answer))));
        setError(null);
      } catch (failure) {
        if (isShown) setError(failure);
      }
      if (isShown) setBusy(false);
    };
    write();
    return () => {
      isShown = false;
    };
  }, [asked]);
  const change = (changes) => {
    setBusy(true); // until it is written again, nothing else is asked for
    setAsked({ ...asked, ...changes });
  };
  return html`<div class="hub-folder">
    <p>A folder as the Hugging Face hub expects it: the LoRA, its pictures, and a page that says how it is used.</p>
    <${Problem} error=${error} />
    ${isBusy && html`<${Loading} what="the folder" />`}
    ${found && html`<${Contents} found=${found} />`}
    <label class="check">
      <input type="checkbox" checked=${!asked.private_captions} disabled=${isBusy}
        onChange=${(event) => change({ private_captions: !event.currentTarget.checked })} />
      <span>Keep folders, captions and prompts in the LoRA's metadata</span>
    </label>
    <label class="check">
      <input type="checkbox" checked=${asked.with_training_pictures} disabled=${isBusy}
        onChange=${(event) => change({ with_training_pictures: event.currentTarget.checked })} />
      <span>Include small versions of the training pictures</span>
    </label>
    ${lacking.map(
      (one) => html`<${Field} key=${one.key} label=${one.label} optional>
        ${(attributes) => html`<input ...${attributes} type="text" maxlength="200" placeholder=${one.example}
          value=${asked[one.key] ?? ""} disabled=${isBusy}
          onChange=${(event) => change({ [one.key]: event.currentTarget.value.trim() })} />`}
      <//>`,
    )}
    <div class="actions end">
      <${Button} onClick=${onBack}>Back<//>
      ${
        found &&
        !isBusy &&
        !error &&
        html`<a class="button primary" href=${address(["runs", run.id, "hub-folder"])} download>
          <${Icon} name="download" /> Download the folder
          <small>${bytes(found.files.reduce((sum, one) => sum + one.bytes, 0))}</small>
        </a>`
      }
    </div>
    ${found && !isBusy && !error && html`<${Upload} run=${run} asked=${asked} found=${found} />`}
  </div>`;
}

/** Scrolls to what has appeared, such as a question below the end of the dialog. */
const shown = (element) => element?.scrollIntoView({ block: "nearest" });

/** @param {Props<{ found: Api.HubFolder }>} props */
function Contents({ found }) {
  const told = Object.entries(found.told);
  return html`
    <h3>What leaves your computer</h3>
    <ul class="hub-files">
      ${found.files.map(
        (one) => html`<li key=${one.path}><span>${one.path}</span> <span class="faint">${bytes(one.bytes)}</span></li>`,
      )}
    </ul>
    ${
      told.length
        ? html`<p>The LoRA's metadata tells of folders, captions or prompts:</p>
          <dl class="hub-told">
            ${told.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
          </dl>`
        : html`<p class="faint">The LoRA's metadata has no folders, captions or prompts.</p>`
    }
    ${!found.pictures && html`<p class="faint">It has no pictures yet. Draw some, or evaluate it, and come back.</p>`}
    ${found.notes.map((one) => html`<p key=${one} class="faint">${one}.</p>`)}
  `;
}

/** @param {Props<{ run: Api.RunAnswer, asked: Api.HubFolderBody, found: Api.HubFolder }>} props */
function Upload({ run, asked, found }) {
  const [name, setName] = useState(nameOfRun(run).replace(/[^\w.-]+/g, "-"));
  const [isPublic, setPublic] = useState(false);
  const [isAsked, setAsked] = useState(false);
  const [done, setDone] = useState(null);
  const [error, setError] = useState(null);
  if (!found.can_upload)
    return html`<p class="faint">
      To upload it from here, log in with the hub's own program on this computer: <code>${"hf auth login"}</code>
    </p>`;
  const upload = async () => {
    setError(null);
    try {
      const body = { repository: name.trim(), folder: asked, told: Object.keys(found.told), public: isPublic };
      setDone(await post(["runs", run.id, "hub-upload"], body));
    } catch (failure) {
      setError(failure);
    }
    setAsked(false);
  };
  return html`
    <h3>Upload it</h3>
    ${
      done
        ? html`<p role="status">
          ${done.is_private ? t`Only you see it:` : t`Everybody sees it:`} <a href=${done.address} target="_blank"
            rel="noopener noreferrer">${done.repository}</a>
        </p>`
        : html`
          <${Field} label="Repository" help="A name, or owner/name.">
            ${(attributes) => html`<input ...${attributes} type="text" maxlength="96" value=${name}
              onInput=${(event) => setName(event.currentTarget.value)} />`}
          <//>
          <label class="check">
            <input type="checkbox" checked=${isPublic}
              onChange=${(event) => setPublic(event.currentTarget.checked)} />
            <span>Let everybody see it</span>
          </label>
          <${Problem} error=${error} />
          ${
            isAsked
              ? html`<p>${
                  isPublic
                    ? t`${whole(found.files.length)} files go to the hub, where everybody sees them.`
                    : t`${whole(found.files.length)} files go to the hub, where only you see them.`
                }</p>
              <div class="actions end" ref=${shown}>
                <${Button} onClick=${() => setAsked(false)}>Not now<//>
                <${Button} kind="primary" onClick=${upload} busyText="Uploading…">Yes, upload them<//>
              </div>`
              : html`<div class="actions end">
                <${Button} disabled=${!name.trim()} onClick=${() => setAsked(true)}>Upload…<//>
              </div>`
          }
        `
    }
  `;
}
