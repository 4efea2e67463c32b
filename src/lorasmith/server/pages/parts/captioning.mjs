// Captions by a captioner: which one, for which photos; how far it is; and what it wrote, which can be undone.
import { get, post, sentence } from "../lib/api.mjs";
import { isOnItsWay, useDownloads } from "../lib/downloads.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { useEvents } from "../lib/live.mjs";
import { announcement, say, useStore, work } from "../lib/stores.mjs";
import { did } from "../lib/undo.mjs";
import { bytes, count } from "../lib/words.mjs";
import { Button, Dialog, Loading, Notice, Problem, Progress, useLoaded } from "./basics.mjs";
import { act } from "./jobs.mjs";
import { GetDialog, Getting } from "./shelf.mjs";

/** @param lacking number of photos without a caption */
export function CaptionDialog({ dataset, number, lacking, trigger, onClose }) {
  const [found, error, reload] = useLoaded((signal) => get(["captioners"], {}, signal), []);
  const [downloads, lookAgain] = useDownloads(reload);
  const [wanted, setWanted] = useState(null);
  const [chosen, setChosen] = useState(null);
  const [overwrite, setOverwrite] = useState(!lacking);
  const [isNamed, setNamed] = useState(Boolean(trigger.trim()));
  const [failure, setFailure] = useState(null);
  if (wanted)
    return html`<${GetDialog} wanted=${{ kind: "captioner", name: wanted }} onStarted=${lookAgain}
      onClose=${() => setWanted(null)} />`;
  const here = (found?.captioners ?? []).filter((one) => one.found);
  const offered = (found?.captioners ?? []).filter((one) => !one.found);
  const name = here.some((one) => one.name === chosen) ? chosen : here[0]?.name;
  const start = async () => {
    setFailure(null);
    try {
      const job = await post(["datasets", dataset, "captioning"], {
        captioner: name,
        overwrite,
        trigger: isNamed ? trigger : "",
      });
      awaited.add(job.id);
      // What was heard of it since is newer than the answer.
      work.set((before) => ({
        queue: { pending: 0, running: 0 },
        ...before,
        jobs: new Map([[job.id, job], ...(before?.jobs ?? [])]),
      }));
      announcement.set(t`The captions are being written.`);
      onClose();
    } catch (refused) {
      setFailure(refused);
    }
  };
  return html`<${Dialog} title="Write captions" onClose=${onClose} wide>
    <p>
      A captioner looks at each photo and says what it shows. Read what it writes: a wrong caption is learnt, too.
    </p>
    ${!found && !error && html`<${Loading} what="captioners" />`}
    <${Problem} error=${error} onRetry=${reload} />
    ${found?.notes.map((one) => html`<${Notice} mood="fair" key=${one}><p>${sentence(one)}</p><//>`)}
    ${
      here.length > 0 &&
      html`
        <fieldset class="choices">
          <legend>Captioner</legend>
          ${here.map(
            (one) => html`<label key=${one.name} class=${`choice ${one.name === name ? "chosen" : ""}`}>
              <input type="radio" name="captioner" value=${one.name} checked=${one.name === name}
                onChange=${() => setChosen(one.name)} />
              <span class="choice-body">
                <span class="choice-title">${one.title}</span>
                ${one.about && html`<span class="faint">${translated(one.about)}</span>`}
              </span>
            </label>`,
          )}
        </fieldset>
        <fieldset>
          <legend>Photos</legend>
          ${
            lacking > 0 &&
            html`
              <label class="check">
                <input type="radio" name="which" checked=${!overwrite} onChange=${() => setOverwrite(false)} />
                The ${count(lacking, "photo")} without a caption
              </label>
              <br />
            `
          }
          <label class="check">
            <input type="radio" name="which" checked=${overwrite} onChange=${() => setOverwrite(true)} />
            ${number === 1 ? t`The photo` : t`All ${number} photos`}: captions that are there are replaced, and can be
            brought back
          </label>
          ${
            trigger.trim() &&
            html`
              <br />
              <label class="check">
                <input type="checkbox" checked=${isNamed}
                  onChange=${(event) => setNamed(event.currentTarget.checked)} /> Put “${trigger.trim()}” in front
                where it is missing
              </label>
            `
          }
        </fieldset>
      `
    }
    ${
      offered.length > 0 &&
      html`<details class="get-captioners"
          open=${
            !here.length ||
            offered.some((one) =>
              downloads.some((each) => each.subject === `captioner:${one.name}` && isOnItsWay(each)),
            )
          }>
        <summary>${here.length ? t`Get another captioner` : t`Get a captioner`}</summary>
        <ul class="releases" aria-label="Captioners to get">
          ${offered.map(
            (one) => html`<${Offer} key=${one.name} captioner=${one}
              download=${downloads.find((each) => each.subject === `captioner:${one.name}`)}
              onGet=${() => setWanted(one.name)} onChange=${lookAgain} />`,
          )}
        </ul>
      </details>`
    }
    <${Problem} error=${failure} />
    <div class="actions end">
      <${Button} onClick=${onClose}>Cancel<//>
      <${Button} kind="primary" disabled=${!name} busyText="Starting…" onClick=${start}>
        Write ${count(overwrite ? number : lacking, "caption")}
      <//>
    </div>
  <//>`;
}

/** @param {Props<{ captioner: Api.CaptionerRow, download: Api.DownloadAnswer | undefined }>} props */
function Offer({ captioner, download, onGet, onChange }) {
  const { title, about, licence, card, size_bytes: size, kept_bytes: kept } = captioner;
  return html`<li class="release">
    <h3>${title}</h3><p>${translated(about)}</p>
    <p class="faint">About ${bytes(size)} · <a href=${card} target="_blank" rel="noreferrer">${licence}</a></p>
    <${Getting} download=${download} onChange=${onChange} of=${`: ${title}`}
      what=${kept ? t`Continue` : t`Get it`}
      onGet=${onGet} />
  </li>`;
}

const awaited = new Set(); // jobs that this page has started or seen at work, and whose end it has not shown

/**
 * How far the captions of a folder are.
 *
 * @param onUndo called with {file: {caption, before}} of what is to be taken back
 */
export function CaptioningState({ dataset, onUndo }) {
  const known = useStore(work);
  const [done, setDone] = useState(null);
  const [ended, setEnded] = useState(null); // outputs of the last one
  const own = [...(known?.jobs.values() ?? [])].filter(
    (one) => one.kind === "caption" && (one.dataset ?? one.name) === dataset,
  );
  const active = own.find((one) => one.state === "pending" || one.state === "running");
  const job = active ?? own.find((one) => awaited.has(one.id));
  const isActive = Boolean(active);
  if (active) awaited.add(active.id);
  useEvents(job?.state === "running" ? `jobs/${job.id}` : null, { progress: setDone });
  useEffect(() => {
    setDone(null);
    if (isActive) setEnded(null);
    if (!job || isActive) return;
    awaited.delete(job.id);
    get(["jobs", job.id]).then(
      ({ outputs, state, error }) => {
        const { written = {}, changed = [], empty = [], failed = {} } = outputs;
        const number = Object.keys(written).length;
        setEnded({
          changed,
          empty,
          failed: Object.entries(failed),
          error: state === "failed" || state === "interrupted" ? (error?.message ?? t`It ended.`) : "",
        });
        if (number) did(dataset, t`${count(number, "caption was", "captions were")} written.`, () => onUndo(written));
      },
      (failure) => say(failure.message, { mood: "bad" }),
    );
  }, [job?.id, job?.state]);
  if (active) {
    const isPending = active.state === "pending";
    const isWaiting = isPending && [...(known?.jobs.values() ?? [])].some((one) => one.state === "running");
    return html`<div class="notice captioning" role="group" aria-label="Captions">
      <${Progress} label="Captions" value=${done?.value} max=${done?.maximum} />
      <div class="actions spread">
        <span role="status">
          ${
            isWaiting
              ? t`The captions wait for the job that runs.`
              : done && !isPending
                ? t`${done.value} of ${done.maximum} captions`
                : t`Loading the captioner…`
          }
        </span>
        <${Button} class="small" aria-label="Stop writing captions"
            onClick=${() => act(active, "cancel", { pause: false })}>
          Stop
        <//>
      </div>
    </div>`;
  }
  if (!ended || !(ended.error || ended.changed.length || ended.empty.length || ended.failed.length)) return null;
  return html`<${Notice} mood=${ended.error ? "bad" : "fair"}>
    ${ended.error && html`<p role="alert">${sentence(ended.error)}</p>`}
    ${
      ended.changed.length > 0 &&
      html`<p>
        ${count(ended.changed.length, "caption was", "captions were")} changed meanwhile and
        kept: ${named(ended.changed)}
      </p>`
    }
    ${ended.empty.length > 0 && html`<p>The captioner said nothing of ${named(ended.empty)}</p>`}
    ${ended.failed.slice(0, 4).map(([file, why]) => html`<p key=${file}>${file} ${why.replace(/\.?$/, ".")}</p>`)}
    ${ended.failed.length > 4 && html`<p>And ${count(ended.failed.length - 4, "other")} failed.</p>`}
    <${Button} class="small" onClick=${() => setEnded(null)}>Close<//>
  <//>`;
}

const named = (files) => `${files.slice(0, 3).join(", ")}${files.length > 3 ? t` and ${files.length - 3} more` : ""}.`;
