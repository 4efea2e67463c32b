// Everything of a run in numbers, commands and paths, in one drawer.
import { address, fileOfRun, get, sentence } from "../lib/api.mjs";
import { html, useState } from "../lib/html.mjs";
import { t, translated } from "../lib/language.mjs";
import { say } from "../lib/stores.mjs";
import { bytes, measured, moment, valueWords, whole } from "../lib/words.mjs";
import { findingOf } from "./advice.mjs";
import { Button, Command, Drawer } from "./basics.mjs";
import { Curves } from "./curves.mjs";
import { nameOfRun } from "./run_card.mjs";
import { pictureAt, stepsOf, strengthsOf } from "./scenes.mjs";

const SAID_ELSEWHERE = new Set(["LoRA file"]); // its size stands where it is downloaded

/**
 * @param {Props<{ run: Api.RunAnswer | null, found: Api.EvaluationAnswer | null }>} props
 *   `view`: of a run that trains
 *   `scene`: what is shown in the room
 */
export function Engineers({ run, view, scene, found, onClose, children }) {
  const source = (file) => fileOfRun(run?.id ?? "", file);
  const facts = view
    ? view.metrics.map((one) => [one.label, one.text])
    : Object.entries(run?.facts ?? {}).filter(([name]) => !SAID_ELSEWHERE.has(name));
  const points = view?.curve ?? run?.losses.map(([step, loss], index) => [step, loss, run.smooth[index][1]]) ?? [];
  const saves = [...(view?.saves ?? run?.saves ?? [])].sort((a, b) => a.step - b.step);
  const remarks = view?.notes.filter((one) => !one.is_warning || one.kind === "Note") ?? [];
  return html`<${Drawer} title="For engineers" onClose=${onClose}>
    ${view && html`<p class="faint">${view.status}</p>`}
    ${
      run &&
      !view &&
      html`<p>
        ${sentence(run.verdict)} ${!run.advice.length && run.advice_summary ? sentence(run.advice_summary) : ""}
      </p>`
    }
    ${
      facts.length > 0 &&
      html`<dl class="facts">
        ${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
      </dl>`
    }
    ${
      points.length > 0 &&
      html`
        <${LossCurves} points=${points} validations=${(view ?? run).validations} best=${(view ?? run).best_step}
          verdict=${view?.verdict} />
        <${LikenessCurves} points=${(view ?? run).likenesses} />
      `
    }
    ${found?.evaluation && html`<${Measured} found=${found} source=${source} />`}
    ${children}
    ${scene && run && html`<${Table} scene=${scene} source=${source} />`}
    ${
      saves.length > 0 &&
      html`
        <h3 id="saves">LoRAs of single steps</h3>
        <ul class="rows">
          ${saves.map(
            (one) => html`<li class="row" key=${one.file}>
              <div class="row-text">
                <b>Step ${whole(one.step)}</b>${one.best && html` <span class="tag">the best</span>`}
              </div>
              <a class="button small" href=${source(one.file)} download
                  aria-label=${t`Download step ${whole(one.step)}${one.bytes ? ` (${bytes(one.bytes)})` : ""}`}>
                Download${one.bytes ? ` (${bytes(one.bytes)})` : ""}
              </a>
            </li>`,
          )}
        </ul>
      `
    }
    ${
      remarks.length > 0 &&
      html`
        <h3 id="remarks">Notes</h3>
        <ul class="remarks">
          ${remarks.map(
            (note) => html`<li key=${note.at + note.text} class="faint">
              <span class="nowrap">${moment(note.at)}</span> ${sentence(note.text)}
            </li>`,
          )}
        </ul>
      `
    }
    ${
      Object.keys(run?.use ?? {}).length > 0 &&
      html`
        <h3 id="use">How to use it</h3>
        ${Object.entries(run?.use ?? {}).map(
          ([program, [what, text]]) => html`<div class="program" key=${program}>
            <h4>${program}</h4><p>${what}</p>${text && html`<${Command} label=${t`For ${program}`} text=${text} />`}
          </div>`,
        )}
      `
    }
    ${run && html`<${TrainedOn} run=${run} /><${Details} run=${run} />`}
  <//>`;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function TrainedOn({ run }) {
  const pictures = run.images.filter((one) => one.thumbnail);
  if (!pictures.length) return null;
  const remark = (one) =>
    [one.use === "trained" ? "" : sentence(one.use), findingOf(run, one.file)].filter(Boolean).join(" ");
  return html`
    <h3>Trained on</h3>
    <ul class="thumbs">
      ${pictures.map(
        (one) => html`<li key=${one.file}>
          <img src=${fileOfRun(run.id, one.thumbnail ?? "")} alt=${one.caption || one.file} title=${one.file}
            loading="lazy" />
          ${remark(one) && html`<span class="faint">${remark(one)}</span>`}
        </li>`,
      )}
    </ul>
  `;
}

/** All pictures of a scene by strength and step. */
function Table({ scene, source }) {
  const steps = stepsOf(scene);
  const strengths = [...new Set(scene.cells.map((one) => one.strength))].sort((a, b) => a - b);
  const shown = scene.base && strengths[0] < 0 ? [...strengths, 0].sort((a, b) => a - b) : strengths;
  const rows = scene.base && strengths[0] >= 0 ? [0, ...shown] : shown;
  return html`
    <h3>All pictures of “${scene.prompt || t`no prompt`}”</h3>
    <div class="scroll" tabindex="0" role="region" aria-label="Pictures by strength and step">
      <table class="pictures">
        <thead>
          <tr>
            <th scope="col">Strength</th>
            ${steps.map((step) => html`<th scope="col" key=${step}>Step ${step ?? "?"}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${rows.map(
            (strength) => html`<tr key=${strength}>
              <th scope="row">${strength === 0 ? t`Base model` : strength}</th>
              ${(strength === 0 ? steps.slice(0, 1) : steps).map((step) => {
                const file = strengthsOf(scene, step).includes(strength) && pictureAt(scene, step, strength);
                return html`<td key=${step}>
                  ${
                    file
                      ? html`<a href=${source(file)} target="_blank" rel="noopener">
                        <img src=${source(file)} loading="lazy"
                          alt=${`${strength === 0 ? t`Base model` : t`Step ${step}, ${strength}`}: ${scene.prompt}`} />
                      </a>`
                      : html`<span class="missing">–</span>`
                  }
                </td>`;
              })}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  `;
}

/** @param {Props<{ found: Api.EvaluationAnswer }>} props */
function Measured({ found, source }) {
  const { loras, sentence: reason, notes, training } = /** @type {Api.Evaluation} */ (found.evaluation);
  const text = (value) => (typeof value === "number" ? value.toFixed(2) : "–");
  return html`
    <h3>Evaluation</h3>
    <p>${reason}</p>
    <table>
      <thead><tr><td></td><th scope="col">Likeness</th><th scope="col">Prompts followed</th></tr></thead>
      <tbody>
        ${loras.map(
          (one) => html`<tr key=${one.file}>
            <th scope="row">${one.label}</th>
            <td>${text(one.measures.likeness)}</td><td>${text(one.measures.adherence)}</td>
          </tr>`,
        )}
        <tr>
          <th scope="row">your photos among themselves</th><td>${text(training.self_likeness)}</td><td>–</td>
        </tr>
      </tbody>
    </table>
    ${notes.map((note) => html`<p class="faint" key=${note}>${note}</p>`)}
    <p class="alone">
      <a href=${source(`${found.folder}/contact sheet.png`)} target="_blank" rel="noopener">Contact sheet</a>
    </p>
  `;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function Details({ run }) {
  const commands = Object.entries(run.commands ?? {});
  const changed = Object.entries(run.changed ?? {});
  const groups = [...Map.groupBy(run.settings ?? [], (one) => one.group)];
  const sentences = (run.sentences ?? []).filter((text) => sentence(text) !== sentence(run.verdict));
  const [graph, setGraph] = useState(null);
  const show = async () => {
    try {
      setGraph(JSON.stringify(await get(["runs", run.id, "graph"]), null, 2));
    } catch (error) {
      say(error.message, { mood: "bad" });
    }
  };
  return html`
    <h3 id="same">The same by other ways</h3>
    ${
      commands.length
        ? commands.map(([purpose, text]) => html`<${Command} key=${purpose} label=${purpose} text=${text} />`)
        : run.command && html`<${Command} label="The command that does the same" text=${run.command} />`
    }
    ${
      graph
        ? html`<${Command} label="The graph for ComfyUI (API format)" text=${graph} />`
        : html`<div class="actions">
          <${Button} onClick=${show}>Show the graph for ComfyUI<//>
          <a class="button" href=${address(["runs", run.id, "graph"])} download=${`${nameOfRun(run)}.json`}>
            Download the graph
          </a>
        </div>`
    }
    ${sentences.length > 0 && html`<ul>${sentences.map((text) => html`<li key=${text}>${sentence(text)}</li>`)}</ul>`}
    ${
      changed.length > 0 &&
      html`
        <h3>Settings that were changed</h3>
        <dl>
          ${changed.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${valueWords(value)}</dd></div>`)}
        </dl>
      `
    }
    ${
      groups.length > 0 &&
      html`<details>
        <summary>All settings of this run</summary>
        ${groups.map(
          ([group, settings]) => html`
            <h3 key=${group}>${translated(group)}</h3>
            <dl>
              ${settings.map(
                (one) => html`<div key=${one.name}><dt>${one.name}</dt><dd>${valueWords(one.value)}</dd></div>`,
              )}
            </dl>
          `,
        )}
      </details>`
    }
    ${
      run.left_out?.length > 0 &&
      html`<details>
        <summary>Files that were left out</summary>
        <ul>${run.left_out.map((one) => html`<li key=${one.file}>${one.file}: ${one.reason}</li>`)}</ul>
      </details>`
    }
    ${
      run.files?.length > 0 &&
      html`<details>
        <summary>Files in ${run.folder}</summary>
        <ul>${run.files.map((file) => html`<li key=${file}><a href=${fileOfRun(run.id, file)}>${file}</a></li>`)}</ul>
      </details>`
    }
  `;
}

/**
 * The loss of each step, the loss of the run after each, and the losses on held-out images.
 *
 * @param points [[step, loss, mean]]
 */
function LossCurves({ points, validations, best, verdict = "" }) {
  const [xs, ys, means] = [0, 1, 2].map((column) => points.map((point) => point[column]));
  const held = validations.filter((one) => Number.isFinite(one.loss));
  const base = held.length ? held[0].base_loss : null;
  const lines = [
    { label: t`Loss`, xs, ys, color: "--raw", width: 1 },
    { label: t`Mean`, xs, ys: means, color: "--smooth", width: 2 },
    ...(held.length
      ? [
          {
            label: t`Held out`,
            xs: held.map((one) => one.step),
            ys: held.map((one) => one.loss),
            color: "--held-out",
            width: 2,
            points: true,
          },
        ]
      : []),
    ...(Number.isFinite(base)
      ? [
          {
            label: t`Held out, base model`,
            xs: [0, Math.max(xs.at(-1) ?? 1, held.at(-1)?.step ?? 1)],
            ys: [base, base],
            color: "--held-out",
            width: 1,
            dash: [4, 4],
          },
        ]
      : []),
  ];
  const heldOut = held.length ? t`; held-out loss ${measured(held.at(-1).loss)}, lowest at step ${best}` : "";
  return html`
    <h3 id="curves">Loss</h3>
    <${Curves} lines=${lines}
      marks=${best ? [{ x: best, label: t`lowest held-out loss, step ${whole(best)}` }] : []}
      label=${t`Training loss over ${xs.at(-1) ?? 0} steps, last ${measured(means.at(-1) ?? NaN)}${heldOut}`} />
    ${verdict && html`<p class="verdict-line">${sentence(verdict)}</p>`}
  `;
}

/** How alike previews are to the training pictures, and how well they follow prompts where that is watched. */
function LikenessCurves({ points }) {
  if (points.length < 2) return null;
  const xs = points.map((one) => one.step);
  const { own, likeness } = points.at(-1);
  const lines = [
    { label: t`Previews`, xs, ys: points.map((one) => one.likeness), color: "--smooth", width: 2, points: true },
    ...(Number.isFinite(own)
      ? [
          {
            label: t`Photos to one another`,
            xs: [0, xs.at(-1)],
            ys: [own, own],
            color: "--smooth",
            width: 1,
            dash: [4, 4],
          },
        ]
      : []),
    ...(points.some((one) => Number.isFinite(one.adherence))
      ? [
          {
            label: t`Prompts followed`,
            xs,
            ys: points.map((one) => one.adherence),
            color: "--held-out",
            width: 2,
            points: true,
          },
        ]
      : []),
  ];
  return html`
    <h3>Likeness to the photos</h3>
    <${Curves} lines=${lines} axis="Likeness"
      label=${t`Likeness of previews to the training photos, ${measured(likeness)} at step ${xs.at(-1)}`} />
  `;
}
