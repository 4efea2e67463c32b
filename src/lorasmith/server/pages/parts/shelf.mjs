// Models to get: cards of released ones, what the hub says before the first byte, downloads, and files that one has.
import { get, post, put, remove } from "../lib/api.mjs";
import { isOnItsWay, sendModel } from "../lib/downloads.mjs";
import { html, useEffect, useRef, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { announcement, said, say } from "../lib/stores.mjs";
import { canDrop } from "../lib/uploads.mjs";
import { bytes, capital, cardFor, duration, sum } from "../lib/words.mjs";
import { Button, Dialog, Field, Notice, Problem, Progress, useLoaded } from "./basics.mjs";

/**
 * Cards of released models that are not whole in the model folders.
 *
 * @param {Props<{ downloads: Api.DownloadAnswer[] }>} props
 *   `downloads`: of the server
 *   `onGet`: called with {kind, name} of what to get
 *   `onChange`: called when a download was cancelled or forgotten
 *   `round`: changes when files may have arrived
 *   `suggests`: whether the one for this computer is named, as none that is here can be
 */
export function Shelf({ downloads, onGet, onChange, round, suggests }) {
  const [found, error, reload] = useLoaded((signal) => get(["shelf"], {}, signal), [round]);
  const memory = useMemory(found?.models);
  if (error) return html`<${Problem} error=${error} onRetry=${reload} />`;
  const offered = (found?.models ?? []).filter((one) => one.files.some((file) => !file.found));
  return html`<ul class="releases" aria-label="Models to get">
    ${offered.map(
      (one) => html`<${ReleaseCard} key=${one.name} release=${one} isBest=${suggests && one.best}
        memory=${memory[one.name]} onGet=${onGet} onChange=${onChange}
        download=${downloads.find((each) => each.subject === `release:${one.name}`)} />`,
    )}
  </ul>`;
}

/**
 * The memory that training each model needs, by its name. They are computed one after another, as each takes a
 * moment.
 */
function useMemory(models) {
  const [memory, setMemory] = useState({});
  const names = models?.map((one) => one.name).join(" ");
  useEffect(() => {
    const stop = new AbortController();
    const ask = async () => {
      for (const name of names?.split(" ") ?? []) {
        const found = await get(["shelf", name, "memory"], {}, stop.signal).catch(() => null);
        if (stop.signal.aborted) return;
        setMemory((before) => ({ ...before, [name]: found }));
      }
    };
    ask();
    return () => stop.abort();
  }, [names]);
  return memory;
}

const DAY_S = 86400;
/** How long a LoRA takes on this computer; nothing where that is not known. */
export const timeWords = (seconds) =>
  seconds === null || seconds === undefined
    ? null
    : seconds > DAY_S
      ? t`Not for this computer: days`
      : t`${capital(duration(seconds, { about: true }))} for a LoRA`;

/** What a model can do besides drawing pictures, and whether it is the one for this computer. */
export const Marks = ({ best, edits, clips }) => html`<span class="model-marks">
  ${best && html`<span class="tag">Suggested</span>`}
  ${edits && html`<span class="tag quiet">edits pictures</span>`}
  ${clips && html`<span class="tag quiet">makes clips</span>`}
</span>`;

function ReleaseCard({ release, isBest, memory, download, onGet, onChange }) {
  const missing = release.files.filter((one) => !one.found);
  const kept = sum(missing.map((one) => one.kept_bytes));
  const here = release.files.filter((one) => one.found);
  return html`<li class="release">
    <h3>${release.title}</h3>
    <${Marks} best=${isBest} edits=${release.edits} clips=${release.clips} />
    <p>${translated(release.about)}</p>
    <p class=${memory && memory.fits === false ? "fair" : "faint"}>${needWords(release, memory)}</p>
    <p class="faint">${bytes(sum(missing.map((one) => one.size_bytes)))} to download</p>
    <p class="faint">
      <a href=${release.card} target="_blank" rel="noreferrer">${release.licence}</a>
      ${release.gated ? t` (to be accepted first)` : ""}
    </p>
    ${
      here.length > 0 &&
      html`<p class="faint">
        Here already: ${here.map((one) => partWords(one.part)).join(", ")}.
        Missing: ${missing.map((one) => partWords(one.part)).join(", ")}.
      </p>`
    }
    <${Getting} download=${download} onChange=${onChange} of=${`: ${release.title}`}
      what=${kept ? t`Continue` : t`Get it`}
      onGet=${() => onGet({ kind: "release", name: release.name })}>
      ${kept > 0 && html`<span class="faint">${bytes(kept)} are here</span>`}
    <//>
  </li>`;
}

const partWords = (part) =>
  part === "denoiser" ? t`model` : part === "vae" ? t`autoencoder` : part.replaceAll("_", " ");

function needWords({ seconds, least_memory_bytes: least }, memory) {
  if (memory?.fits === false) return t`Too large for this machine: needs ${cardFor(memory.memory_bytes)}`;
  const slow = memory?.encoders_fit === false ? t`; captions take seconds each` : "";
  const time = timeWords(seconds);
  if (seconds > DAY_S && least) return t`${time}. Needs ${cardFor(least)}`;
  return time ? time + slow : memory?.fits ? t`Fits into the memory of this machine${slow}` : "";
}

/** A button that starts a download, how far it is, or why it ended. */
export const Getting = ({ download, what, of, class: extra = "", onGet, onChange, children }) => html`
  ${(isOnItsWay(download) || download?.error) && html`<${DownloadState} download=${download} onChange=${onChange} />`}
  ${
    !isOnItsWay(download) &&
    html`<div class=${`actions ${extra}`}>
      <${Button} onClick=${onGet} aria-label=${`${what}${of}`}>${what}<//>
      ${children}
    </div>`
  }
`;

/**
 * How far a download is, or why it ended.
 *
 * @param {Props<{ download: Api.DownloadAnswer }>} props
 */
function DownloadState({ download, onChange }) {
  const { id, title, state, file, error } = download;
  const act = (request) => async () => {
    await said(request);
    onChange();
  };
  if (error) {
    return html`<${Notice} mood="bad">
      <p role="alert">${capital(error)}</p>
      ${
        download.accept &&
        html`<p class="alone"><a href=${download.accept} target="_blank" rel="noreferrer">${download.accept}</a></p>`
      }
      <${Button} class="small" onClick=${act(() => remove(["downloads", id]))}>Close<//>
    <//>`;
  }
  const total = download.total_bytes;
  const doing =
    state === "waiting"
      ? t`Waits for another download`
      : !total
        ? t`Asking the hub`
        : download.is_checking
          ? t`Checking ${file}`
          : t`${bytes(download.done_bytes)} of ${bytes(total)}` +
            (download.bytes_per_s ? t` · ${bytes(download.bytes_per_s)} a second` : "");
  return html`<div class="download">
    <${Progress} value=${total ? download.done_bytes : null} max=${total} label=${t`Download of ${title}`} />
    <div class="actions spread">
      <span class="faint">${doing}</span>
      <${Button} class="small" onClick=${act(() => post(["downloads", id, "cancel"]))}
          aria-label=${t`Cancel the download of ${title}`}>
        Cancel
      <//>
    </div>
  </div>`;
}

/** What the hub says of a download, and the question whether to begin. `wanted` is {kind, name}. */
export function GetDialog({ wanted, onStarted, onClose }) {
  const [found, error, reload] = useLoaded(() => post(["downloads", "check"], wanted), [wanted.kind, wanted.name]);
  const [failure, setFailure] = useState(null);
  const start = async () => {
    try {
      await post(["downloads"], wanted);
    } catch (refused) {
      setFailure(refused);
      return;
    }
    announcement.set(t`The download has started.`);
    onStarted();
    onClose();
  };
  const left = sum((found?.files ?? []).map((one) => one.size_bytes - one.kept_bytes));
  const isFull = found && left > found.free_bytes;
  return html`<${Dialog} title=${found ? t`Get ${found.title}` : t`Get a model`} onClose=${onClose}>
    ${
      !found &&
      !error &&
      html`<p class="faint loading" role="status">Asking the hub (huggingface.co) what there is to download…</p>`
    }
    ${
      error?.kind === "GatedError"
        ? html`<${Gated} error=${error} onAgain=${reload} />`
        : error?.kind === "NoNetworkError"
          ? html`<${NoNetwork} files=${error.details.files} onAgain=${reload} />`
          : html`<${Problem} error=${error ?? failure} onRetry=${error ? reload : undefined} />`
    }
    ${
      found &&
      html`
        <ul class="rows">
          ${found.files.map(
            (one) => html`<li class="row" key=${one.file}>
              <span class="row-text">
                <b>${one.file}</b><span class="faint">${one.repository}, into ${one.folder}</span>
              </span>
              <span class="nowrap">
                ${
                  one.kept_bytes
                    ? t`${bytes(one.size_bytes - one.kept_bytes)} of ${bytes(one.size_bytes)}`
                    : bytes(one.size_bytes)
                }
              </span>
            </li>`,
          )}
        </ul>
        <p class=${isFull ? "fair" : "faint"}>
          ${
            isFull
              ? t`${bytes(left)} do not fit: the disk has ${bytes(found.free_bytes)} free.`
              : html`The disk has ${bytes(found.free_bytes)} free.
                Each file is checked against the hub's SHA-256 before it is used.`
          }
        </p>
        <div class="actions end">
          <${Button} onClick=${onClose}>Cancel<//>
          <${Button} kind="primary" disabled=${isFull} onClick=${start} busyText="Starting…">
            Download ${bytes(left)}
          <//>
        </div>
      `
    }
  <//>`;
}

/**
 * What can be done without the hub.
 *
 * @param {Props<{ files: { file: string, page: string, folder: string }[] }>} props
 */
const NoNetwork = ({ files, onAgain }) => html`
  <div role="alert">
    <p>No internet just now. Try again, or add the files yourself:</p>
    <ul>
      ${files.map(({ file, page, folder }) => {
        const source = html`<a href=${page} target="_blank" rel="noreferrer">${page}</a>`;
        return html`<li key=${`${page} ${file}`}>
            ${html`<b>${file}</b>`} of ${source} into ${html`<code>${folder}</code>`}
          </li>`;
      })}
    </ul>
  </div>
  <div class="actions end"><${Button} kind="primary" onClick=${onAgain}>Try again<//></div>
`;

/** Where to accept a licence, and where the token goes. */
function Gated({ error, onAgain }) {
  const [token, setToken] = useState("");
  const [failure, setFailure] = useState(null);
  const { accept, has_token: hasToken } = error.details ?? {};
  const store = async () => {
    setFailure(null);
    try {
      await put(["hub-token"], { token });
      setToken("");
      onAgain();
    } catch (refused) {
      setFailure(refused);
    }
  };
  return html`
    <ol>
      <li>
        Accept the licence, with an account of the
        hub: <a href=${accept} target="_blank" rel="noreferrer">${accept}</a>
      </li>
      <li>
        ${
          hasToken
            ? t`Use the token of that account: the one that is stored has no access yet.`
            : t`Make an access token there (Settings, Access Tokens, Read), and paste it here.`
        }
      </li>
    </ol>
    <${Field} label="Access token"
        help="Stored on the machine of the server where the hub's own programs keep it, and sent to the hub alone."
        error=${failure?.message}>
      ${(attributes) => html`<input type="password" autocomplete="off" ...${attributes} value=${token}
        onInput=${(event) => setToken(event.currentTarget.value)} />`}
    <//>
    <div class="actions end">
      <${Button} onClick=${onAgain}>I have accepted: ask again<//>
      <${Button} kind="primary" disabled=${!token.trim()} onClick=${store} busyText="Storing…">Store the token<//>
    </div>
  `;
}

/** A place for a model file that one has already: dropped or chosen, it is copied to the folder for what it holds. */
export function OwnFile({ place, onAdded }) {
  const input = useRef(null);
  const [over, setOver] = useState(false);
  const [share, setShare] = useState(null);
  const [error, setError] = useState(null);
  const send = async (file) => {
    if (!file || share !== null) return;
    setError(null);
    setShare(0);
    try {
      const added = await sendModel(file, setShare);
      say(t`${added.file} is in ${added.place}.`);
      onAdded();
    } catch (failure) {
      setError(failure);
    } finally {
      setShare(null);
    }
  };
  const dragged = (isOver) => (event) => {
    event.preventDefault();
    setOver(isOver);
  };
  const dropped = (event) => {
    event.preventDefault();
    setOver(false);
    send(event.dataTransfer?.files[0]);
  };
  return html`
    <div class=${`drop-zone ${over ? "over" : ""}`} onDragEnter=${dragged(true)} onDragOver=${dragged(true)}
        onDragLeave=${dragged(false)} onDrop=${dropped}>
      <p>
        <b>
          I have a file
        </b> <span class="faint">
          ${
            share === null
              ? canDrop
                ? t`Drop a checkpoint or a part of a model here (.safetensors, .gguf)`
                : t`A checkpoint or a part of a model (.safetensors, .gguf)`
              : share < 1
                ? t`${Math.round(100 * share)} % are copied`
                : t`Looking what it holds…`
          }
        </span>
      </p>
      <div class="actions">
        <${Button} disabled=${share !== null} onClick=${() => input.current.click()}>Choose a file<//>
      </div>
      <input ref=${input} type="file" accept=".safetensors,.sft,.gguf" hidden
        onChange=${(event) => {
          send(event.currentTarget.files[0]);
          event.currentTarget.value = "";
        }} />
    </div>
    ${share !== null && html`<${Progress} value=${share} max=${1} label="Copying the model" />`}
    <${Problem} error=${error} />
    <p class="faint">
      It is copied into the model folders. Without a copy: put it
      into ${html`<code>${place}</code>`} yourself, and look again.
    </p>
  `;
}
