// A run and what came of it; one that is still running is shown live.
import { address, fileOfRun, get, post, sentence } from "../lib/api.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { go, link, replace } from "../lib/router.mjs";
import { say, useStore, work } from "../lib/stores.mjs";
import { bytes, moment, valueWords, whole } from "../lib/words.mjs";
import { Advice, findingOf, trainAgain } from "../parts/advice.mjs";
import { Button, Command, Field, Fold, Loading, Problem, Question, State, useLoaded } from "../parts/basics.mjs";
import { Film } from "../parts/film.mjs";
import { Gallery } from "../parts/gallery.mjs";
import { CONTINUED, act, jobsOfRuns } from "../parts/jobs.mjs";
import { LikenessCurves, LiveRun, LossCurves, useView } from "../parts/live_run.mjs";
import { EditMarks, Star, removeRun } from "../parts/marks.mjs";
import { Lightbox, Previews } from "../parts/pictures.mjs";
import { nameOfRun } from "../parts/run_card.mjs";
import { Stepper } from "../parts/stepper.mjs";
import { TryIt } from "../parts/try_it.mjs";
import { WhichStep } from "../parts/which_step.mjs";

const SAID_ELSEWHERE = new Set(["LoRA file"]); // its size stands on the button that downloads it
const MORE_STEPS = 0.5; // "train on" suggests this share of the steps on top

export function RunView({ id }) {
  const [run, error, reload] = useLoaded((signal) => get(["runs", id], {}, signal), [id]);
  const known = useStore(work);
  const job =
    jobsOfRuns(known).get(id) ??
    [...(known?.jobs.values() ?? [])].filter((one) => one.run === id).sort((a, b) => b.created - a.created)[0];
  const isRunning = run?.state === "running";
  const isWatched = isRunning && Boolean(run.job);
  useEffect(() => {
    if (isWatched) replace("jobs", run.job); // where it is controlled, too
  }, [isWatched]);
  if (error && !run) {
    return html`<section>
      <h1>${id.split("/").pop()}</h1><${Problem} error=${error} onRetry=${reload} />
      <p><a href=${link("runs")}>All runs</a></p>
    </section>`;
  }
  if (!run) return html`<section><${Loading} what="the run" /></section>`;
  return html`
    <${Stepper} at=${isRunning ? "training" : "result"} dataset=${run.dataset} addresses=${{}} />
    <section aria-labelledby="run">
      <p class="kicker"><a href=${link("runs")}>Runs</a>${nameOfRun(run) !== id.split("/").pop() && ` / ${id}`}</p>
      <div class="head">
        <h1 id="run">${nameOfRun(run)}</h1>
        <div class="actions">
          <${Star} run=${run} onChange=${reload} />
          <${State} state=${isRunning ? run.state : (jobsOfRuns(known).get(id)?.state ?? run.state)} />
        </div>
      </div>
      ${!isRunning && html`<p class="verdict plain">${run.recommended?.sentence ?? sentence(run.verdict)}</p>`}
      ${run.note && html`<p key="note" class="note">${run.note}</p>`}
      <p class="summary">
        ${[run.trigger && `Write “${run.trigger}” in prompts`, run.model, moment(run.started)]
          .filter(Boolean)
          .join(" · ")}
      </p>
      ${!isRunning && html`<${Actions} key="actions" run=${run} job=${job} reload=${reload} />`}
    </section>
    ${isRunning ? html`<${Watched} run=${run} onEnd=${reload} />` : html`<${Results} run=${run} reload=${reload} />`}
    <section>
      <${Fold} title=${isRunning ? "Settings and files" : "Details"}>
        ${!isRunning && html`<${Numbers} run=${run} />`}<${Details} run=${run} />
      <//>
    </section>
  `;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function Watched({ run, onEnd }) {
  const view = useView(`runs/${run.id}`);
  useEffect(() => {
    if (!view?.outcome) return undefined;
    const timer = setTimeout(onEnd, 1500); // the files of the end are written after its event
    return () => clearTimeout(timer);
  }, [view?.outcome]);
  return html`<${LiveRun} view=${view} run=${run} isRunning />`;
}

/** @param {Props<{ run: Api.RunAnswer, job: Api.JobAnswer | undefined }>} props */
function Actions({ run, job, reload }) {
  const [dialog, setDialog] = useState(null);
  const close = () => setDialog(null);
  const canContinue = job && CONTINUED.includes(job.state);
  const { recommended: best } = run;
  return html`
    <div class="actions">
      ${
        best &&
        html`
          <a class="button primary large-button" href=${fileOfRun(run.id, best.file)} download>
            ${best.step ? `Download step ${whole(best.step)}` : "Download"} (${bytes(best.bytes)})
          </a>
          <${Button} onClick=${() => setDialog("install")}>
            ${run.lora?.installed ? "Copied to ComfyUI" : "Copy to ComfyUI"}
          <//>
        `
      }
      ${
        best &&
        (best.is_judged || run.previews.length > 0) &&
        html`<a class="button" href=${address(["runs", run.id, "card"])} download=${`${nameOfRun(run)}.png`}>
          Share card
        </a>`
      }
      ${
        canContinue &&
        html`<${Button} kind=${run.lora ? "plain" : "primary"}
            onClick=${() => act(job, "continue").then((done) => done && go("jobs", job.id))}>
          Continue
        <//>`
      }
      ${run.dataset && html`<${Button} onClick=${() => trainAgain(run)}>Train again with changes<//>`}
    </div>
    <details class="more">
      <summary>More</summary>
      <div class="actions">
        ${run.is_trainable_on && html`<${Button} onClick=${() => setDialog("on")}>Train it further<//>`}
        <a class="button" href=${address(["runs", run.id, "report"])} target="_blank" rel="noopener">Report</a>
        <a class="button" href=${`editor/?run=${encodeURIComponent(run.id)}`}>Open in editor</a>
        <${Button} onClick=${() => setDialog("marks")}>Name and note<//>
        <${Button} kind="danger"
            onClick=${() => removeRun(run, (isBack) => go(...(isBack ? ["runs", run.id] : ["runs"])))}>
          Delete
        <//>
      </div>
    </details>
    ${dialog === "marks" && html`<${EditMarks} run=${run} onClose=${close} onDone=${reload} />`}
    ${dialog === "install" && html`<${Install} run=${run} onClose=${close} onDone=${reload} />`}
    ${dialog === "on" && html`<${TrainOn} run=${run} onClose=${close} />`}
  `;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function Install({ run, onClose, onDone }) {
  const last = run.saves.length ? Math.max(...run.saves.map((one) => one.step)) : null;
  const choices = run.saves.filter((one) => one.step !== last || one.best);
  const [step, setStep] = useState("");
  const [name, setName] = useState("");
  const install = async () => {
    const body = { step: step === "" ? null : Number(step), name: name.trim() };
    const { installed, was_there: wasThere } = await post(["runs", run.id, "install"], body);
    say(wasThere ? `${installed} was there already.` : `Copied to models/loras as ${installed}.`);
    onDone();
  };
  return html`<${Question} title="Copy to ComfyUI" yes="Copy" onYes=${install} onClose=${onClose}>
    <p>
      The LoRA is copied into <code>models/loras</code>, where ComfyUI finds
      it.${run.lora?.installed ? html` It is there already as <b>${run.lora?.installed}</b>.` : ""}
    </p>
    ${
      choices.length > 0 &&
      html`<${Field} label="Which one">
        ${(attributes) => html`<select ...${attributes} value=${step}
            onChange=${(event) => setStep(event.currentTarget.value)}>
          <option value="">The last one</option>
          ${choices.map(
            (one) => html`<option key=${one.step} value=${one.step}>
              Step ${whole(one.step)}${one.best ? " (the best)" : ""}
            </option>`,
          )}
        </select>`}
      <//>`
    }
    <${Field} label="Name" optional>
      ${(attributes) => html`<input ...${attributes} type="text" maxlength="100" value=${name}
        placeholder=${run.lora?.file.split("/").pop()} onInput=${(event) => setName(event.currentTarget.value)} />`}
    <//>
  <//>`;
}

/** @param {Props<{ run: Api.RunAnswer }>} props */
function TrainOn({ run, onClose }) {
  const done = run.step ?? run.steps ?? 0;
  const [steps, setSteps] = useState(String(Math.max(10, Math.round((done * MORE_STEPS) / 10) * 10)));
  const more = Number(steps);
  const isGood = Number.isInteger(more) && more > 0;
  const start = async () => go("jobs", (await post(["runs", run.id, "train-on"], { steps: done + more })).id);
  return html`<${Question} title="Train it further" yes=${`Train ${isGood ? whole(more) : ""} more steps`}
      disabled=${!isGood} onYes=${start} onClose=${onClose}>
    <p>It continues after step ${whole(done)}, as if the run had been longer from its start.</p>
    <${Field} label="More steps" error=${isGood ? null : "Must be a whole number of at least 1."}>
      ${(attributes) => html`<input ...${attributes} type="text" inputmode="numeric" value=${steps}
        onInput=${(event) => setSteps(event.currentTarget.value)} />`}
    <//>
  <//>`;
}

const remark = (run, picture) =>
  [picture.use === "trained" ? "" : sentence(picture.use), findingOf(run, picture.file)].filter(Boolean).join(" ");

/** @param {Props<{ run: Api.RunAnswer }>} props */
function Results({ run, reload }) {
  const [large, setLarge] = useState(null);
  const source = (file) => fileOfRun(run.id, file);
  const pictures = run.images.filter((one) => one.thumbnail);
  const isStrip = run.previews.some((one) => one.strength < 0);
  return html`
    ${
      run.previews.length > 0 &&
      html`<section aria-labelledby="previews">
        <h2 id="previews">What it learnt</h2>
        ${
          isStrip
            ? html`<${Previews} previews=${run.previews} pairs=${run.pairs} source=${source}
              bestStep=${run.best_step} />`
            : html`<${Film} previews=${run.previews} pairs=${run.pairs} source=${source}
              bestStep=${run.recommended?.is_judged ? run.recommended.step : null} />`
        }
      </section>`
    }
    ${
      run.lora &&
      html`
        <${TryIt} run=${run} /><${Gallery} run=${run} /><${WhichStep} key=${run.id} run=${run} onDone=${reload} />
      `
    }
    <${Advice} run=${run} />
    ${
      pictures.length > 0 &&
      html`
        <section aria-labelledby="trained">
          <h2 id="trained">Trained on</h2>
          <ul class="thumbs">
            ${pictures.map(
              (one, index) => html`<li key=${one.file} class=${one.controls ? "pair-thumb" : ""}>
                <button type="button" class="picture" onClick=${() => setLarge(index)}>
                  <img src=${source(one.thumbnail)} alt=${one.caption || one.file} loading="lazy" />
                </button>
                ${remark(run, one) && html`<span class="faint">${remark(run, one)}</span>`}
              </li>`,
            )}
          </ul>
        </section>
        ${
          large !== null &&
          html`<${Lightbox} start=${large} source=${source} onClose=${() => setLarge(null)}
            shots=${pictures.map((one) => ({ file: one.thumbnail, title: one.file, prompt: one.caption }))} />`
        }
      `
    }
  `;
}

/**
 * What was measured, all pictures of the training, which programs apply what, and the LoRAs of single steps.
 *
 * @param {Props<{ run: Api.RunAnswer }>} props
 */
function Numbers({ run }) {
  const source = (file) => fileOfRun(run.id, file);
  const points = run.losses.map(([step, loss], index) => [step, loss, run.smooth[index][1]]);
  const saves = [...run.saves].sort((a, b) => a.step - b.step);
  return html`
    <p>
      ${sentence(run.verdict)}${!run.advice.length && run.advice_summary ? ` ${sentence(run.advice_summary)}` : ""}
    </p>
    ${
      Object.keys(run.facts).length > 0 &&
      html`<dl class="facts">
        ${Object.entries(run.facts)
          .filter(([name]) => !SAID_ELSEWHERE.has(name))
          .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
      </dl>`
    }
    ${
      run.losses.length > 0 &&
      html`
        <${LossCurves} points=${points} validations=${run.validations} best=${run.best_step} />
        <${LikenessCurves} points=${run.likenesses} />
      `
    }
    ${
      run.previews.length > 0 &&
      !run.previews.some((one) => one.strength < 0) &&
      html`
        <h3>All pictures</h3>
        <${Previews} previews=${run.previews} pairs=${run.pairs} source=${source} bestStep=${run.best_step} />
      `
    }
    ${
      Object.keys(run.use).length > 0 &&
      html`
        <h3 id="use">How to use it</h3>
        ${Object.entries(run.use).map(
          ([program, [what, text]]) => html`<div class="program" key=${program}>
            <h4>${program}</h4><p>${what}</p>${text && html`<${Command} label=${`For ${program}`} text=${text} />`}
          </div>`,
        )}
      `
    }
    ${
      saves.length > 1 &&
      html`
        <h3 id="saves">LoRAs of single steps</h3>
        <ul class="rows">
          ${saves.map(
            (one) => html`<li class="row" key=${one.file}>
              <div class="row-text">
                <b>Step ${whole(one.step)}</b>${one.best && html` <span class="tag">the best</span>`}
              </div>
              <a class="button small" href=${source(one.file)} download
                  aria-label=${`Download step ${whole(one.step)} (${bytes(one.bytes)})`}>
                Download (${bytes(one.bytes)})
              </a>
            </li>`,
          )}
        </ul>
      `
    }
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
            <h3 key=${group}>${group}</h3>
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
