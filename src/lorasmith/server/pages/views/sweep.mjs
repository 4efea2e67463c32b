// Several runs that try different values: their list, the table of one, and the form that starts one.
import { fileOfRun, get } from "../lib/api.mjs";
import { html, useEffect } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { link } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { count, measured, nameWords, stateWords, valueWords, whole } from "../lib/words.mjs";
import { Field, Loading, Notice, Problem, State, useLoaded } from "../parts/basics.mjs";
import { rangeOf, typedValue } from "../parts/all_settings.mjs";
import { Queue } from "../parts/jobs.mjs";

const AGAIN_MS = 10000; // a sweep of the command line sends no events

const PICTURE_PX = 512;
const wordsOf = (settings) =>
  Object.entries(settings)
    .map(([name, value]) => `${nameWords(name)} ${valueWords(value)}`)
    .join(", ");

/** The sweeps of the base folder; nothing if there is none. */
export function Sweeps() {
  const [found, error, reload] = useLoaded((signal) => get(["sweeps"], {}, signal), []);
  useAgain(
    found?.sweeps.some((one) => one.states.running || one.states.pending),
    reload,
  );
  if (!found?.sweeps.length && !found?.damaged?.length)
    return error?.kind === "offline" ? null : html`<${Problem} error=${error} onRetry=${reload} />`;
  return html`<section aria-labelledby="sweeps">
    <h2 id="sweeps">Sweeps</h2>
    <ul class="rows">
      ${found.sweeps.map(
        (one) => html`<li class="row" key=${one.id}>
          <div class="row-text">
            <a href=${link("sweeps", one.id)}><b>${one.id}</b></a>
            <span class="faint">
              ${[
                count(one.runs, "run"),
                ...Object.entries(one.states).map(
                  ([state, number]) => `${number} ${stateWords(state)[0].toLowerCase()}`,
                ),
              ].join(" · ")}
            </span>
          </div>
        </li>`,
      )}
    </ul>
    ${
      found.damaged?.length > 0 &&
      html`<${Notice} mood="fair">
        <p>${count(found.damaged.length, "sweep")} cannot be read:</p>
        <ul>${found.damaged.map((one) => html`<li key=${one.file}>${one.file}: ${one.reason}</li>`)}</ul>
      <//>`
    }
  </section>`;
}

export function SweepView({ id }) {
  const [found, error, reload] = useLoaded((signal) => get(["sweeps", id], {}, signal), [id]);
  useAgain(
    found?.runs.some((one) => ["running", "waiting"].includes(one.state)),
    reload,
  );
  const varied = [...new Set((found?.runs ?? []).flatMap((one) => Object.keys(one.settings)))];
  const pictured = (found?.runs ?? []).filter((one) => one.cover);
  return html`
    <section class="sweep-view" aria-labelledby="sweep">
      <p class="kicker"><a href=${link("runs")}>Runs</a></p><h1 id="sweep">${id}</h1>
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="the sweep" />`}
      ${
        pictured.length > 0 &&
        html`<ul class="sweep-pictures" aria-label="Pictures, the best run first">
          ${pictured.map(
            ({ name, run, cover, place, settings }) => html`<li key=${name}>
              <a href=${link("runs", run)}>
                <img src=${fileOfRun(run, cover ?? "", PICTURE_PX)} alt="" loading="lazy" />
                <b>${place ? `${place}. ` : ""}${wordsOf(settings) || name}</b>
              </a>
            </li>`,
          )}
        </ul>`
      }
      ${
        found &&
        !found.comparable &&
        html`<p class="faint">
          The runs were judged by different held-out images, so they are ranked by the change against the base model.
        </p>`
      }
      ${
        found &&
        html`<div class="scroll" tabindex="0" role="region" aria-label=${t`Runs of ${id}, the best first`}>
          <table class="sweep">
            <thead>
              <tr>
                <th scope="col">Place</th><th scope="col">Run</th><th scope="col">State</th>
                ${varied.map((name) => html`<th scope="col" key=${name}>${nameWords(name)}</th>`)}
                <th scope="col" class="number">Held-out loss</th><th scope="col" class="number">Change</th>
                <th scope="col" class="number">Steps</th>
              </tr>
            </thead>
            <tbody>
              ${found.runs.map(
                (one) => html`<tr key=${one.name}>
                  <td>${one.place ?? ""}</td>
                  <th scope="row">
                    <span class="name">
                      ${one.steps > 0 ? html`<a href=${link("runs", one.run)}>${one.name}</a>` : one.name}
                    </span>
                  </th>
                  <td>
                    <${State} state=${one.state} />${one.error && html` <span class="faint">${one.error}</span>`}
                  </td>
                  ${varied.map(
                    (name) => html`<td key=${name}>${name in one.settings ? valueWords(one.settings[name]) : ""}</td>`,
                  )}
                  <td class="number">${one.loss === null ? "" : measured(one.loss)}</td>
                  <td class="number">${one.change === null ? "" : `${(100 * one.change).toFixed(1)} %`}</td>
                  <td class="number">${one.steps ? whole(one.steps) : ""}</td>
                </tr>`,
              )}
            </tbody>
          </table>
        </div>`
      }
    </section>
    <${Queue} />
  `;
}

/** Settings to try, none with values yet: {name, text} of each. */
export const NO_TRIES = [
  { name: "rank", text: "" },
  { name: "", text: "" },
];

/** The values to try, by the name of their setting; nothing where no values are typed. */
export const gridOf = (tries, groups) =>
  Object.fromEntries(
    tries
      .map((row) => [settingOf(groups, row.name), partsOf(row.text)])
      .filter(([setting, parts]) => setting && parts.length)
      .map(([setting, parts]) => [setting.name, parts.map((part) => typedValue(setting, part) ?? part)]),
  );

/** The number of runs of a grid: one without values. */
export const runsOf = (grid) => Object.values(grid).reduce((all, values) => all * values.length, 1);

const settingOf = (groups, name) => groups.flatMap((group) => group.settings).find((one) => one.name === name);
const partsOf = (text) =>
  text
    .split(",")
    .map((one) => one.trim())
    .filter(Boolean);

/** Up to two settings with values to try; what starts the training trains each combination of them. */
export function TryValues({ groups, hidden, tries, note, onChange }) {
  const change = (index, part) => onChange(tries.map((row, at) => (at === index ? { ...row, ...part } : row)));
  const all = groups
    .flatMap((group) => group.settings)
    .filter((one) => !hidden.has(one.name))
    .sort((a, b) => (a.label || nameWords(a.name)).localeCompare(b.label || nameWords(b.name)));
  return html`<section class="all-settings">
    <details>
      <summary><h2>Try several values</h2></summary>
      <p class="faint">
        Trains it several times, so that you can pick the best. Separate values by commas, such as 8, 16.
      </p>
      <div class="fields">
        ${tries.map((row, index) => {
          const setting = settingOf(groups, row.name);
          const parts = partsOf(row.text);
          const isTwice = index > 0 && setting && tries[0].name === row.name && parts.length > 0;
          const wrong = setting
            ? parts.some((part) => typedValue(setting, part) === undefined) && rangeOf(setting)
            : parts.length > 0 && t`Choose the setting that has these values.`;
          return html`<div class="fields two" key=${index} role="group"
              aria-label=${index ? t`Second setting` : t`First setting`}>
            <${Field} label="Setting" optional=${index > 0} help=${setting?.help}>
              ${(attributes) => html`<select ...${attributes} value=${row.name}
                  onChange=${(event) => change(index, { name: event.currentTarget.value })}>
                <option value="">none</option>
                <optgroup label="The most important">${all.filter((one) => one.main).map(option)}</optgroup>
                <optgroup label="All others">${all.filter((one) => !one.main).map(option)}</optgroup>
              </select>`}
            <//>
            <${Field} label="Values" error=${wrong || (isTwice && t`Both settings are the same.`)}>
              ${(attributes) => html`<input ...${attributes} type="text" autocomplete="off" spellcheck=${false}
                value=${row.text} onInput=${(event) => change(index, { text: event.currentTarget.value })} />`}
            <//>
          </div>`;
        })}
      </div>
      ${note && html`<p class="faint">${note}</p>`}
    </details>
  </section>`;
}

const option = (one) => html`<option key=${one.name} value=${one.name}>${one.label || nameWords(one.name)}</option>`;

/** Loads again when a job has ended, and from time to time while something runs. */
export function useAgain(busy, reload) {
  const known = useStore(work);
  const ended = [...(known?.jobs.values() ?? [])].filter((job) => job.ended).length;
  useEffect(() => {
    if (ended) reload();
  }, [ended]);
  useEffect(() => {
    if (!busy) return undefined;
    const timer = setInterval(reload, AGAIN_MS);
    return () => clearInterval(timer);
  }, [busy]);
}
