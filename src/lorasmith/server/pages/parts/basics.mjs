// Small parts that every view is made of.
import { html, useEffect, useId, useRef, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { announcement, connection, toast, useStore } from "../lib/stores.mjs";
import { stateWords } from "../lib/words.mjs";
import { Icon } from "./icons.mjs";

/** A button: `kind` "primary", "plain" or "danger". While an async `onClick` runs, it cannot be pressed again. */
export function Button({ kind = "plain", onClick, children, disabled, busyText, ...rest }) {
  const [busy, setBusy] = useState(false);
  const shown = useRef(true);
  useEffect(() => () => (shown.current = false), []);
  const press = async (event) => {
    if (busy || disabled) return;
    const result = onClick?.(event);
    if (!(result instanceof Promise)) return;
    setBusy(true);
    try {
      await result;
    } finally {
      if (shown.current) setBusy(false);
    }
  };
  // aria-disabled instead of disabled keeps the focus where it is.
  return html`<button type="button" ...${rest} class=${`button ${kind} ${rest.class ?? ""}`} onClick=${press}
      aria-disabled=${busy || disabled ? "true" : undefined}>
    ${busy && busyText ? busyText : children}
  </button>`;
}

/** A failure as its sentence, with a button to try again where that can help. */
export function Problem({ error, onRetry }) {
  if (!error) return null;
  // The page says why, once.
  if (error.kind === "offline") return html`<p class="faint loading" role="status">Waiting for the server…</p>`;
  if (error.status === 503) return html`<p class="faint loading" role="status">${error.message} Trying again…</p>`;
  return html`<div class="notice bad-notice" role="alert">
    <p>${error.message ?? String(error)}</p>
    ${onRetry && html`<${Button} onClick=${onRetry}>Try again<//>`}
  </div>`;
}

/** A part that is folded up until it is opened, and made then. */
export function Fold({ title, children, id }) {
  const [isOpen, setOpen] = useState(false);
  return html`<details class="fold"
      onToggle=${(event) => event.currentTarget === event.target && setOpen(event.currentTarget.open)}>
    <summary><h2 id=${id}>${title}</h2></summary>${isOpen && children}
  </details>`;
}

export const Notice = ({ mood = "faint", children }) => html`<div class=${`notice ${mood}-notice`}>${children}</div>`;

export function State({ state, kind = "train" }) {
  const [word, mood] = stateWords(state, kind);
  return html`<span class=${`status ${mood}`}>${word}</span>`;
}

/** A labelled field; `children` is called with the attributes that tie the control to label, help and error. */
export function Field({ label, help, error, optional, class: extra = "", children }) {
  const id = useId();
  const described = [help && `${id}h`, error && `${id}e`].filter(Boolean).join(" ");
  return html`<div class=${`field ${extra}`}>
    <label for=${id}>${label}${optional && html` <span class="faint">(optional)</span>`}</label>
    ${children({ id, "aria-describedby": described || undefined, "aria-invalid": error ? "true" : undefined })}
    ${error && html`<p class="field-error" id=${`${id}e`}>${error}</p>`}
    ${help && html`<p class="help" id=${`${id}h`}>${help}</p>`}
  </div>`;
}

/** What was changed elsewhere while something else was typed here: `there` is the text that is stored. */
export const Elsewhere = ({ there, onChoose, what }) => html`<div class="conflict" role="alert">
  <p>It was changed elsewhere, so your text is not stored. The ${what} is now:</p>
  <p class="there">${there || t`(no ${what})`}</p>
  <div class="actions">
    <button type="button" class="button small" onClick=${() => onChoose(true)}>Keep mine</button>
    <button type="button" class="button small" onClick=${() => onChoose(false)}>Use that one</button>
  </div>
</div>`;

/** A progress bar with a name. */
export const Progress = ({ value, max, label }) =>
  html`<progress value=${value ?? undefined} max=${max || 1} aria-label=${label}></progress>`;

/**
 * A dialog that holds the focus until it is closed (Escape, its cross, or `onClose`); `wide` may be the class of a
 * wider one.
 */
export function Dialog({ title, onClose, children, wide }) {
  const box = useRef(null);
  const id = useId();
  useEffect(() => {
    const before = /** @type {HTMLElement | null} */ (document.activeElement);
    box.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog ref=${box} class=${wide === true ? "wide-dialog" : wide || ""} aria-labelledby=${id}
      onCancel=${(event) => {
        event.preventDefault();
        onClose();
      }} onClick=${(event) => event.target === box.current && onClose()}>
    <div class="dialog-body">
      <div class="dialog-head">
        <h2 id=${id}>${title}</h2>
        <button type="button" class="icon-button" aria-label="Close" onClick=${onClose}>
          <${Icon} name="close" />
        </button>
      </div>
      ${children}
    </div>
  </dialog>`;
}

/** A dialog at the edge of the window, for what is looked up beside pictures. */
export const Drawer = (props) => html`<${Dialog} ...${props} wide="drawer" />`;

/**
 * What stands beside pictures (in a `.with-panel`); on a phone it is pulled up from the lower edge by its title.
 *
 * @param {Props<{ title: string }>} props
 */
export function Panel({ title, children }) {
  const [isUp, setUp] = useState(false);
  return html`<aside class=${`panel ${isUp ? "up" : ""}`} aria-label=${title}>
    <button type="button" class="panel-handle" aria-expanded=${isUp} onClick=${() => setUp(!isUp)}>
      ${title}<${Icon} name="up" />
    </button>
    <div class="panel-body">${children}</div>
  </aside>`;
}

/**
 * One of a few, as tiles: `options` are {value, title, note, icon}; `icons` puts small ones into three columns.
 *
 * @param {Props<{ label: string, options: { value: any, title: any, note?: any, icon?: any }[], value: any }>} props
 */
export function Choices({ label, options, value, onChange, icons = false, name = "" }) {
  const own = useId();
  return html`<div role="radiogroup" aria-label=${label} class=${`choices ${icons ? "icons" : ""}`}>
    ${options.map(
      (one) => html`<label key=${one.value} class=${`choice ${one.value === value ? "chosen" : ""}`}>
        <input type="radio" name=${name || own} value=${one.value} checked=${one.value === value}
          onChange=${() => onChange(one.value)} />
        ${one.icon && html`<${Icon} name=${one.icon} />`}<b>${one.title}</b>
        ${one.note && html`<span class="faint">${one.note}</span>`}
      </label>`,
    )}
  </div>`;
}

/** A slider with its name and its value in words; `onInput` and `onChange` get the number. */
export function Slider({ label, value, min, max, step, words, onInput, onChange, unseen = false }) {
  const id = useId();
  const given = (call) => call && ((event) => call(Number(event.currentTarget.value)));
  return html`<div class="slider">
    <label for=${id} class=${unseen ? "unseen" : ""}>${label}</label>
    <input id=${id} type="range" min=${min} max=${max} step=${step} value=${value} aria-valuetext=${words}
      style=${{ "--share": `${(100 * (value - min)) / (max - min || 1)}%` }}
      onInput=${given(onInput)} onChange=${given(onChange)} />
    ${words && html`<output for=${id}>${words}</output>`}
  </div>`;
}

/** How far something is, around a number. */
export const Ring = ({ share, label, children }) => html`<span class="ring" role="img" aria-label=${label}>
  <svg viewBox="0 0 60 60" aria-hidden="true">
    <circle cx="30" cy="30" r="26" />
    <circle cx="30" cy="30" r="26" pathLength="100" stroke-dasharray=${`${100 * Math.min(1, share)} 100`} />
  </svg>
  <span aria-hidden="true">${children}</span>
</span>`;

/** A question with two answers; closed when `onYes` has ended well. */
export function Question({ title, children, yes, kind = "primary", disabled, onYes, onClose }) {
  const [error, setError] = useState(null);
  const confirm = async () => {
    try {
      await onYes();
      onClose();
    } catch (failure) {
      setError(failure);
    }
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    ${children}
    <${Problem} error=${error} />
    <div class="actions end">
      <${Button} onClick=${onClose}>Cancel<//><${Button} kind=${kind} disabled=${disabled} onClick=${confirm}>${yes}<//>
    </div>
  <//>`;
}

/** Text in a box with a button that copies it. */
export function Command({ label, text }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    if (await copyText(text)) {
      setCopied(true);
      announcement.set(t`Copied.`);
      setTimeout(() => setCopied(false), 2000);
    }
  };
  return html`<figure class="command">
    <figcaption>${label}</figcaption>
    <div class="copyable">
      <pre tabindex="0"><code>${text}</code></pre>
      <button type="button" class="button small" onClick=${copy} aria-label=${t`Copy: ${label}`}>
        ${copied ? t`Copied` : t`Copy`}
      </button>
    </div>
  </figure>`;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https, browsers give no clipboard but the old way still works.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** What is said at the edge of the page: lost connection, short messages; and to screen readers. */
export function Messages() {
  const { lost } = useStore(connection);
  const message = useStore(toast);
  const spoken = useStore(announcement);
  return html`
    <div class="messages">
      <div role="alert">
        ${
          lost &&
          html`<div class="toast">
            <span class="dot"></span>The connection to the server is lost. If it was stopped, start it again with:
            lorasmith serve. Trying to reach it again…
          </div>`
        }
      </div>
      <div role="status">
        ${
          message &&
          html`<div class="toast">
            ${message.mood !== "good" && html`<${Icon} name="warning" />`}<span>${message.text}</span>
            ${
              message.undo &&
              html`<button type="button" class="button small"
                  onClick=${() => {
                    message.undo?.();
                    toast.set(null);
                  }}>
                Undo
              </button>`
            }
          </div>`
        }
      </div>
    </div>
    <div class="unseen" role="status" aria-live="polite">${spoken}</div>
  `;
}

const AGAIN_MS = 2000;
/** Whether an error passes by itself: the server starts (503), or does not answer (0). */
export const isPassing = (error) => error?.status === 503 || error?.status === 0;

/**
 * Loads a value and loads it again when `keys` change, and until it is there if the server is not.
 *
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} load
 * @param {unknown[]} keys
 * @returns {[T | null, any, () => void]} value, error, reload
 */
export function useLoaded(load, keys) {
  const [state, setState] = useState(/** @type {{ value: T | null, error: any }} */ ({ value: null, error: null }));
  const [round, setRound] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    load(stop.signal).then(
      (value) => !stop.signal.aborted && setState({ value, error: null }),
      (error) => {
        if (stop.signal.aborted) return;
        setState((before) => ({ ...before, error }));
        if (isPassing(error)) timer = setTimeout(() => setRound((number) => number + 1), AGAIN_MS);
      },
    );
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [...keys, round]);
  return [state.value, state.error, () => setRound((number) => number + 1)];
}

export const Loading = ({ what }) => html`<p class="faint loading" role="status">Loading ${what}…</p>`;
