// Several runs that try different values: their list, the table of one, and the form that starts one.
import { get, post } from "../lib/api.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { go, link } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { count, duration, measured, nameWords, stateWords, valueWords, whole } from "../lib/words.mjs";
import { Button, Field, Loading, Notice, Problem, State, useLoaded } from "../parts/basics.mjs";
import { Queue } from "../parts/jobs.mjs";

const AGAIN_MS = 10000; // a sweep of the command line sends no events

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
  return html`
    <section aria-labelledby="sweep">
      <p class="kicker"><a href=${link("runs")}>Runs</a></p><h1 id="sweep">${id}</h1>
      <${Problem} error=${error} onRetry=${reload} />
      ${!found && !error && html`<${Loading} what="the sweep" />`}
      ${
        found &&
        !found.comparable &&
        html`<p class="faint">
          The runs were judged by different held-out images, so they are ranked by the change against the base model.
        </p>`
      }
      ${
        found &&
        html`<div class="scroll" tabindex="0" role="region" aria-label=${`Runs of ${id}, the best first`}>
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

/** Starts a sweep: up to two of the declared settings, each with values to try. `base` makes the body of a job. */
export function TryValues({ groups, base, seconds }) {
  const [rows, setRows] = useState([
    { name: "rank", text: "" },
    { name: "", text: "" },
  ]);
  const [error, setError] = useState(null);
  const change = (index, part) => setRows((all) => all.map((row, at) => (at === index ? { ...row, ...part } : row)));
  const chosen = rows.filter((row) => row.name && row.text.trim());
  const number = chosen.reduce((all, row) => all * values(row.text).length, chosen.length ? 1 : 0);
  async function start() {
    setError(null);
    const grid = Object.fromEntries(chosen.map((row) => [row.name, values(row.text)]));
    const body = base();
    const own = Object.fromEntries(Object.entries(body.settings).filter(([name]) => !(name in grid)));
    try {
      const sweep = await post(["sweeps"], { ...body, settings: own, grid });
      go("sweeps", sweep.id);
    } catch (problem) {
      setError(problem);
    }
  }
  return html`<section class="all-settings">
    <details>
      <summary><h2>Try several values</h2></summary>
      <p class="faint">
        Trains it several times, so that you can pick the best. Separate values by commas, such as 8, 16.
      </p>
      <div class="fields">
        ${rows.map(
          (row, index) => html`<div class="fields two" key=${index} role="group"
              aria-label=${index ? "Second setting" : "First setting"}>
            <${Field} label="Setting" optional=${index > 0}>
              ${(attributes) => html`<select ...${attributes} value=${row.name}
                  onChange=${(event) => change(index, { name: event.currentTarget.value })}>
                <option value="">none</option>
                <optgroup label="The most important">
                  ${groups.flatMap((group) => group.settings.filter((one) => one.main)).map(option)}
                </optgroup>
                ${groups.map(
                  (group) => html`<optgroup key=${group.title} label=${group.title}>
                    ${group.settings.filter((one) => !one.main).map(option)}
                  </optgroup>`,
                )}
              </select>`}
            <//>
            <${Field} label="Values">
              ${(attributes) => html`<input ...${attributes} type="text" autocomplete="off" spellcheck=${false}
                value=${row.text} onInput=${(event) => change(index, { text: event.currentTarget.value })} />`}
            <//>
          </div>`,
        )}
      </div>
      <div class="tools">
        <${Button} disabled=${number < 2} busyText="Starting…" onClick=${start}>
          ${number < 2 ? "Train each" : `Train ${number} runs`}
        <//>
        ${
          number > 1 &&
          seconds &&
          html`<span class="faint">Takes ${duration(seconds * number, { about: true })} for all ${number}</span>`
        }
      </div>
      <${Problem} error=${error} />
    </details>
  </section>`;
}

const option = (one) => html`<option key=${one.name} value=${one.name}>${one.label || nameWords(one.name)}</option>`;

/** Numbers and on/off as JSON, everything else as text. */
function values(text) {
  return text
    .split(",")
    .map((one) => one.trim())
    .filter(Boolean)
    .map((one) => {
      if (one === "on" || one === "off") return one === "on";
      return one !== "" && Number.isFinite(Number(one)) ? Number(one) : one;
    });
}

/** Loads again when a job has ended, and from time to time while something runs. */
function useAgain(busy, reload) {
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
