// How thoroughly to train: three choices with their time and memory, and every setting for those who want them.
import { get, post } from "../lib/api.mjs";
import { useDraft } from "../lib/drafts.mjs";
import { html, useEffect, useState } from "../lib/html.mjs";
import { t } from "../lib/language.mjs";
import { isNameless, KINDS, kindOf, unchanged } from "../lib/kinds.mjs";
import { go, link } from "../lib/router.mjs";
import { useStore, work } from "../lib/stores.mjs";
import { capital, cardFor, count, duration, nameWords, slug, sum, valueWords, whole } from "../lib/words.mjs";
import { Button, Choices, Field, Fold, Loading, Notice, Problem, useLoaded } from "../parts/basics.mjs";
import { isActive } from "../parts/jobs.mjs";
import { AllSettings, inWords, shownInvalid } from "../parts/all_settings.mjs";
import { DraftText } from "../parts/photo_panel.mjs";
import { nameOfRun } from "../parts/run_card.mjs";
import { NextBar, Stepper } from "../parts/stepper.mjs";
import { Distilled } from "./model.mjs";
import { useCovers } from "./sets.mjs";
import { NO_TRIES, TryValues, gridOf, runsOf } from "./sweep.mjs";

const PLAN_AFTER_MS = 500;
const HELD_OUT = 0.2; // share of the photos that judge several runs, where none would be kept aside
const OWN_FIELDS = new Set(["trigger"]); // asked for elsewhere

export function SettingsView({ dataset }) {
  const [draft, change] = useDraft(dataset);
  const [photos] = useLoaded((signal) => get(["datasets", dataset], {}, signal), [dataset]);
  const images = photos?.images?.length ?? null;
  const [declared, error, reload] = useLoaded(
    async (signal) => inWords(await get(["settings"], { images }, signal)),
    [images],
  );
  const [failure, setFailure] = useState(null);
  const covers = useCovers(dataset);
  const presets = declared?.presets ?? [];
  const preset =
    presets.find((one) => one.name === draft.preset) ?? presets.find((one) => one.name === "balanced") ?? presets[0];
  // A run that is trained again may have settings that are not for pages, such as the state that it continued from.
  const offered = new Set((declared?.groups ?? []).flatMap((group) => group.settings.map((one) => one.name)));
  const own = Object.fromEntries(
    Object.entries(draft.settings).filter(([name]) => offered.has(name) && !OWN_FIELDS.has(name)),
  );
  const [plans, planErrors, replan] = usePlans(dataset, draft, presets, own);
  const plan = plans[preset?.name];
  // A step of another choice takes about as long: the rank costs little.
  const stepSeconds =
    plan?.seconds_per_step ?? Object.values(plans).find((one) => one?.seconds_per_step)?.seconds_per_step ?? null;
  const kind = kindOf(draft, draft.pairs ?? false);
  const lacksName = kind !== "edit" && photos !== null && isNameless(draft, photos.images);
  const [asksName, setAsksName] = useState(false); // still while it is typed
  useEffect(() => {
    if (lacksName) setAsksName(true);
  }, [lacksName]);
  const planError = planErrors[preset?.name];
  const measuring = useMeasurement(draft, change, preset, plan, stepSeconds, own, replan);
  const [tries, setTries] = useState(NO_TRIES);
  const grid = gridOf(tries, declared?.groups ?? []);
  const runs = runsOf(grid);
  const base = { ...preset?.settings, ...plan?.recipe };

  const body = () => ({
    dataset,
    model: draft.model ?? "",
    edit: draft.edit,
    trigger: draft.trigger.trim(),
    name: draft.name.trim() || slug(draft.trigger) || dataset,
    preset: preset.name,
    teaches: draft.teaches,
    settings: { ...plan?.memory_settings, ...own },
  });
  async function start() {
    if (shownInvalid()) return;
    setFailure(null);
    try {
      const [view, { id }] = runs > 1 ? ["sweeps", await startTries()] : ["jobs", await startOne()];
      change({ measurement: null, again: "" });
      go(view, id);
    } catch (problem) {
      setFailure(problem);
    }
  }
  const single = () => Object.fromEntries(Object.entries(grid).map(([name, [value]]) => [name, value]));
  function startOne() {
    const job = body();
    return post(["jobs"], { kind: "train", evaluate: true, ...job, settings: { ...job.settings, ...single() } });
  }
  /** The runs are ranked by photos that are held out; of few photos none are, unless it is asked for. */
  function startTries() {
    const job = body();
    const judged = plan?.held_out ? {} : { validation_share: HELD_OUT };
    const others = Object.entries({ ...judged, ...job.settings }).filter(([name]) => !(name in grid));
    return post(["sweeps"], { ...job, settings: Object.fromEntries(others), grid });
  }

  if (!draft.model) {
    return html`
      <${Stepper} at="settings" dataset=${dataset} />
      <section>
        <h1>Settings</h1><p>Choose a model first.</p>
        <a class="button primary" href=${link("new", dataset, "model")}>Choose a model</a>
      </section>
    `;
  }
  return html`
    <${Stepper} at="settings" dataset=${dataset} />
    <div class="learnt" aria-hidden="true">
      ${covers.map((src) => html`<img key=${src} src=${src} alt="" loading="lazy" />`)}
    </div>
    <section>
      <h1>How thoroughly?</h1>
      ${
        draft.again &&
        declared &&
        html`<${Again} id=${draft.again} draft=${draft} images=${images} groups=${declared.groups}
          values=${{ ...preset?.settings, ...plan?.recipe, ...own }} />`
      }
      ${
        asksName &&
        html`<${Field} class="asked" label="What should I draw?" help=${(KINDS[kind] ?? KINDS.thing).help}>
          ${(attributes) => html`<${DraftText} dataset=${dataset} name="trigger" what="trigger word"
            attributes=${{
              ...{ ...attributes, maxlength: 200, autocapitalize: "off", "aria-required": "true" },
              placeholder: (KINDS[kind] ?? KINDS.thing).such,
            }} />`}
        <//>`
      }
      <${Problem} error=${error} onRetry=${reload} />
      ${!declared && !error && html`<${Loading} what="settings" />`}
      <${Choices} label="How thoroughly" name="preset" value=${preset?.name}
        onChange=${(name) => change({ preset: name })}
        options=${presets.map((one) => ({
          value: one.name,
          title: one.title,
          note: html`
            <${Estimate} plan=${plans[one.name]} stepSeconds=${stepSeconds} error=${planErrors[one.name]} />
            ${one.summary}
          `,
        }))} />
      ${
        kind
          ? html`<p>${KINDS[kind].follows} <a href=${link("new", dataset, "photos")}>Change this</a></p>`
          : html`<h2>What do the photos teach?</h2><${Teaches} draft=${draft} change=${change} plan=${plan} />`
      }
      <${Measure} measuring=${measuring} plan=${plan} />
      ${
        plan?.fits === false &&
        html`<${Notice} mood="fair">
          <p>
            Too large for this machine: needs ${cardFor(plan.memory_bytes)}. Choose a smaller model, or a lower rank or
            resolution in all settings.
          </p>
        <//>`
      }
      <${Distilled} plan=${plan} adapter=${own.training_adapter}
        onAdapter=${(name) => change({ settings: { ...draft.settings, training_adapter: name ?? undefined } })} />
      ${
        plan?.notes?.length > 0 &&
        html`<ul class="findings">${plan.notes.map((note) => html`<li key=${note}>${note}</li>`)}</ul>`
      }
      ${
        planError &&
        planError.status !== 503 &&
        html`
          <${Problem} error=${planError} />
          <p class="alone"><a href=${link("new", dataset, "photos")}>Look at the photos</a></p>
        `
      }
      ${
        plan &&
        html`<${Fold} title="What will happen, in numbers" id="numbers">
          <dl class="facts">
          <${Fact} label="Photos"
            value=${plan.held_out ? t`${plan.images} (${plan.held_out} held out)` : plan.images} />
          <${Fact} label="Photos seen" value=${t`${whole(plan.seen)} in ${count(plan.steps, "step")}`} />
          <${Fact} label="Each photo is seen"
            value=${t`${plan.epochs >= 10 ? Math.round(plan.epochs) : Number(plan.epochs.toFixed(1))} times`} />
          <${Fact} label="Resolution" value=${`${plan.resolution} px`} />
          <${Fact} label="Rank" value=${plan.rank} />
          <${Fact} label="Trained parameters" value=${millions(plan.parameters)} />
        </dl>
          ${
            plan.fits !== false &&
            Object.keys(plan.memory_settings ?? {}).length > 0 &&
            html`<p class="faint">So that it fits into memory, it runs with ${words(plan.memory_settings)}.</p>`
          }
        <//>`
      }
    </section>
    ${
      declared &&
      html`<${AllSettings} groups=${declared.groups} hidden=${OWN_FIELDS}
        base=${base} own=${own} given=${unchanged(draft, kind, base)}
        error=${planError} onChange=${(settings) => change({ settings })} />`
    }
    ${
      declared &&
      preset &&
      html`<${TryValues} groups=${declared.groups} hidden=${OWN_FIELDS} tries=${tries} onChange=${setTries}
        note=${runs > 1 && !plan?.held_out && t`A fifth of the photos is kept aside to judge them.`} />`
    }
    <${NextBar} note=${lacksName ? t`Say first what I should draw.` : noteOf(plan, stepSeconds, grid, runs)}>
      <a class="button" href=${link("new", dataset, "model")}>Back</a>
      <${Button} kind="primary" busyText="Starting…" onClick=${start}
          disabled=${!preset || lacksName || (planError && planError.status !== 503)}>
        ${runs > 1 ? t`Train ${runs} runs` : t`Start training`}
      <//>
    <//>
    ${failure && html`<div class="beside-bar"><${Problem} error=${failure} /></div>`}
  `;
}

/** Which run is trained again, and what differs from it. */
function Again({ id, draft, images, groups, values }) {
  const [run] = useLoaded((signal) => get(["runs", id], {}, signal), [id]);
  if (!run) return null;
  const own = groups
    .flatMap((group) => group.settings)
    .filter((one) => !OWN_FIELDS.has(one.name))
    .map((one) => [nameWords(one.name), run.changed[one.name] ?? one.default, values[one.name] ?? one.default]);
  const differing = [
    [t`Photos`, run.images.length, images],
    [t`Model`, run.model, draft.model],
    [t`Trigger`, run.trigger, draft.trigger.trim()],
    ...own,
  ].filter(([, before, now]) => valueWords(before) !== valueWords(now));
  return html`<p>
    ${html`<a href=${link("runs", id)}>${nameOfRun(run)}</a>`} again, with ${
      differing.length
        ? differing
            .map(([name, before, now]) => t`${name} ${valueWords(now)} (${valueWords(before)} before)`)
            .join(", ")
        : t`nothing changed yet`
    }.
  </p>`;
}

const Fact = ({ label, value }) => html`<div><dt>${label}</dt><dd>${value}</dd></div>`;
const words = (settings) =>
  Object.entries(settings)
    .map(([name, value]) => `${nameWords(name).toLowerCase()} ${value}`)
    .join(", ");
const millions = (number) => (number >= 1e6 ? t`${Number((number / 1e6).toPrecision(3))} million` : whole(number));
const timeOf = (plan, stepSeconds) =>
  plan && !plan.seconds && stepSeconds
    ? stepSeconds * plan.steps * (plan.slowdown ?? 1)
    : (plan?.estimated_seconds ?? plan?.seconds ?? null);
/** The time that a plan takes, of each run of a grid where there are several. */
function noteOf(plan, stepSeconds, grid, runs) {
  const seconds = timeOf(plan, stepSeconds);
  if (!seconds) return plan ? count(plan.seen, "photo seen", "photos seen") : "";
  const share = Object.entries(grid).reduce((all, [name, values]) => all * timesAs(plan, name, values), 1);
  const why = plan.slowdown > 1 ? t`, as other programs keep the processor busy` : "";
  return t`Takes ${duration(seconds * share, { about: true })}${runs > 1 ? t` for all ${runs} runs` : ""}${why}`;
}

/** How often the time of a plan the runs with these values take. */
const timesAs = (plan, name, values) =>
  name === "steps"
    ? sum(values) / plan.steps
    : name === "resolution"
      ? sum(values.map((one) => one ** 2)) / plan.resolution ** 2
      : values.length;

/** @param {Props<{ plan: Api.PlanAnswer | null | undefined }>} props */
function Teaches({ draft, change, plan }) {
  const guessed = plan?.teaches_because ? plan.teaches : "";
  const chosen = draft.teaches || plan?.teaches || "subject";
  return html`<${Choices} label="What the photos teach" name="teaches" value=${chosen}
      onChange=${(name) => change({ teaches: name })}
      options=${Object.entries(TAUGHT).map(([name, one]) => ({ value: name, ...one }))} />
    ${guessed && html`<p class="faint">Guessed: ${plan?.teaches_because}.</p>`}`;
}

const TAUGHT = {
  subject: { title: t`Subject`, note: t`A person, an animal or a thing that all photos show.` },
  style: { title: t`Style`, note: t`How they are drawn or taken, whatever they show.` },
};

function Estimate({ plan, stepSeconds, error }) {
  if (error && error.status !== 503) return null;
  if (!plan) return html`<span class="estimate">Estimating…</span>`;
  const seconds = timeOf(plan, stepSeconds);
  return html`<span class="estimate">
    ${seconds ? capital(duration(seconds, { about: true })) : count(plan.seen, "photo seen", "photos seen")}
  </span>`;
}

/** The plan of each choice, made again when something that it depends on has settled: [plans, errors, again]. */
function usePlans(dataset, draft, presets, own) {
  const [plans, setPlans] = useState({});
  const [errors, setErrors] = useState({});
  const [round, setRound] = useState(0);
  const names = presets.map((one) => `${one.name} ${JSON.stringify(one.settings)}`).join();
  useEffect(() => {
    if (!presets.length || !draft.model) return undefined;
    let current = true;
    let timer = setTimeout(
      async function ask() {
        const chosenFirst = [...presets].sort(
          (a, b) => Number(b.name === draft.preset) - Number(a.name === draft.preset),
        );
        let again = false;
        for (const one of chosenFirst) {
          try {
            const plan = await post(["plans"], {
              dataset,
              model: draft.model,
              edit: draft.edit,
              trigger: draft.trigger,
              preset: one.name,
              teaches: draft.teaches,
              settings: own,
            });
            if (!current) return;
            setPlans((all) => ({ ...all, [one.name]: plan }));
            setErrors((all) => ({ ...all, [one.name]: null }));
          } catch (error) {
            if (!current) return;
            again ||= error.status === 503;
            setPlans((all) => ({ ...all, [one.name]: null }));
            setErrors((all) => ({ ...all, [one.name]: error }));
          }
        }
        if (again && current) timer = setTimeout(ask, 2000);
      },
      Object.keys(plans).length ? PLAN_AFTER_MS : 0,
    );
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [dataset, draft.model, draft.edit, draft.trigger, draft.teaches, names, JSON.stringify(own), round]);
  return [plans, errors, () => setRound((number) => number + 1)];
}

/** A measured step of this model on this machine: started by itself while nothing else runs, else on request. */
function useMeasurement(draft, change, preset, plan, stepSeconds, own, replan) {
  const known = useStore(work);
  const [error, setError] = useState(null);
  const job = draft.measurement ? known?.jobs.get(draft.measurement) : null;
  const idle = known && known.queue.pending + known.queue.running === 0;
  const needed = plan && stepSeconds === null;
  const measure = async () => {
    setError(null);
    try {
      const added = await post(["measurements"], {
        model: draft.model,
        settings: { ...plan?.memory_settings, ...plan?.recipe, ...own },
      });
      change({ measurement: added.id });
    } catch (failure) {
      setError(failure);
    }
  };
  const [tried, setTried] = useState("");
  useEffect(() => {
    if (!needed || !idle || tried === draft.model || (job && job.state !== "completed")) return;
    setTried(draft.model);
    measure();
  }, [needed, idle, draft.model]);
  useEffect(() => {
    if (job?.state === "completed") replan();
  }, [job?.state, draft.measurement]);
  return { job, error, needed, measure };
}

/** @param {Props<{ plan: Api.PlanAnswer | null | undefined }>} props */
function Measure({ measuring, plan }) {
  const { job, error, needed, measure } = measuring;
  if (!plan) return null;
  if (job && isActive(job)) {
    return html`<p class="measure" role="status">
      <progress aria-label="Measuring"></progress> ${
        job.state === "pending"
          ? t`A measurement waits for its turn.`
          : t`A few steps are being measured on this machine, for the time that it takes…`
      } You can start already.
    </p>`;
  }
  if (!needed) return null;
  return html`<div class="measure">
    <p class="faint">
      ${
        job?.state === "failed"
          ? t`The measurement failed. ${job.error?.message ?? ""}`
          : t`The time is not known yet: no step was measured on this machine.`
      }
    </p>
    <${Button} class="small" onClick=${measure}>Measure a step<//><${Problem} error=${error} />
  </div>`;
}
