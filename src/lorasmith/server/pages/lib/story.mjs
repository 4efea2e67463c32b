// The events of a run, gathered into what the page shows. Events may come twice and are then the same.

import { count } from "./words.mjs";

const RECENT_STEPS = 30; // from which the speed is taken

export function emptyStory() {
  return {
    preparation: [], started: null, steps: [], validations: new Map(), previews: new Map(), saves: new Map(),
    notes: new Map(), drawing: null, finished: null, plan: null,
  };
}

/** Adds an event of `events.jsonl`, or of the preparation, to a story. */
export function tell(story, event) {
  switch (event.event) {
    case "RunStarted":
      story.started = event;
      story.finished = null;
      break;
    case "Resumed":
      note(story, event);
      break;
    case "StepDone":
      story.steps[event.step] = { loss: event.loss, at: event.at, rate: event.learning_rate };
      story.drawing = null;
      break;
    case "Validated":
      story.validations.set(event.step, event);
      break;
    case "Previewed":
      event.paths.forEach((path, index) => {
        const strength = event.strength;
        const prompt = event.prompts[index] ?? "";
        story.previews.set(`${event.step} ${strength} ${index}`, { step: event.step, strength, prompt, index, file: path });
      });
      story.drawing = null;
      break;
    case "Drawing":
      story.drawing = event.done < event.total ? event : null;
      break;
    case "StateSaved":
      story.saves.set(event.step, event);
      break;
    case "RolledBack":
      story.steps.length = Math.min(story.steps.length, event.to_step + 1);
      note(story, event, "fair");
      break;
    case "Shrunk":
      note(story, event, "fair");
      break;
    case "Warned":
      note(story, event);
      break;
    case "Planned":
      story.plan = event;
      break;
    case "RunFinished":
      story.finished = event;
      story.drawing = null;
      break;
    default:
      prepared(story, event);
  }
  return story;
}

function note(story, event, mood = "faint") {
  if (event.message) story.notes.set(`${event.at} ${event.message}`, { at: event.at, text: event.message, mood });
}

/** What an event before the first step says; empty if it is none of these. */
function preparationWords(event) {
  const progress = `${event.done} of ${event.total}`;
  switch (event.event) {
    case "ImagesFound":
      return `${count(event.images, "photo")} found${event.captions ? `; captions: ${event.captions}` : ""}`;
    case "ModelLoading":
      return `Loading ${event.model}…`;
    case "RunPlanned":
      return `${event.trained ?? `${count(event.steps, "step")} planned`}`;
    case "ImageEncoded":
      return `Photos prepared: ${progress}${event.cached ? `, ${event.cached} of them earlier` : ""}`;
    case "CaptionEncoded":
      return `Captions prepared: ${progress}`;
    case "ClassImageDrawn":
      return `Pictures of the class drawn: ${progress}`;
    default:
      return "";
  }
}

function prepared(story, event) {
  const text = preparationWords(event);
  if (!text) return;
  const line = { kind: event.event, text };
  const at = story.preparation.findIndex((one) => one.kind === line.kind);
  if (at >= 0) story.preparation[at] = line;
  else story.preparation.push(line);
}

/** [[step], [loss]] of the steps that are known. */
export function lossColumns(story) {
  const xs = [];
  const ys = [];
  story.steps.forEach((step, index) => {
    xs.push(index);
    ys.push(Number.isFinite(step.loss) ? step.loss : null);
  });
  return [xs, ys];
}

/** Exponential mean without the pull of its start; `weight` 0 leaves the values as they are. */
export function smoothed(values, weight) {
  let mean = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

/** Seconds of a step from the last ones (their median: previews and validations lie between some), or null. */
export function secondsPerStep(story) {
  const times = story.steps.map((step) => step.at).filter(Number.isFinite).slice(-RECENT_STEPS - 1);
  if (times.length < 3) return null;
  const gaps = times.slice(1).map((at, index) => at - times[index]).filter((gap) => gap >= 0).sort((a, b) => a - b);
  return gaps[Math.floor(gaps.length / 2)] ?? null;
}

export const stepsDone = (story) => Math.max(0, story.steps.length - 1);
