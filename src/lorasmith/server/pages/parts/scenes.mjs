// Scenes of a run: what was drawn for one prompt from one noise, without the LoRA and with it, by step and strength.

/**
 * @typedef {{
 *   key: string, kind: "previews" | "grid" | "evaluation" | "try", prompt: string, base: string | null,
 *   cells: { step: number | null, strength: number, file: string }[], given: { title: string, file: string }[],
 *   note?: string,
 * }} Scene
 */

/** Pictures of the training itself, a scene for each of its prompts. */
export function previewScenes(previews, pairs = []) {
  /** @type {Map<number, Scene>} */
  const scenes = new Map();
  for (const { number, prompt, step, strength, file } of previews) {
    const given = pairs.filter((one) => one.number === number);
    if (!scenes.has(number))
      scenes.set(number, { key: `previews ${number}`, kind: "previews", prompt, base: null, cells: [], given });
    const scene = /** @type {Scene} */ (scenes.get(number));
    if (strength === 0) scene.base = file;
    else scene.cells.push({ step, strength, file });
  }
  return [...scenes.entries()].sort(([a], [b]) => a - b).map(([, scene]) => scene);
}

/** @param {Api.Grid[]} grids */
export const gridScenes = (grids) =>
  grids.map(({ prompt, base, cells }) => scene("grid", prompt, prompt, base, [...cells]));

/**
 * @param {Api.Evaluation} evaluation
 * @param {string} folder
 */
export function evaluationScenes({ prompts, base, loras, strengths, verdict }, folder) {
  const at = (file) => `${folder}/${file}`;
  const best = verdict.best === null ? null : loras[verdict.best].step;
  return prompts.map((prompt, place) => {
    const cells = loras.map(({ step, pictures }) => ({ step, strength: 1, file: at(pictures[place]) }));
    const strip = strengths
      .filter((row) => row.strength !== 1 && row.pictures[place])
      .map((row) => ({ step: best, strength: row.strength, file: at(row.pictures[place]) }));
    return scene("evaluation", prompt, prompt, at(base[place]), [...cells, ...strip]);
  });
}

/** What somebody had drawn: `tries` as of `useTries`. */
export const tryScenes = (tries) =>
  tries
    .filter((one) => one.files.length > 1)
    .map(({ id, prompt, step, strengths, files, control, note }) => {
      const [base, ...drawn] = files;
      const cells = drawn.map((file, index) => ({ step, strength: strengths[index], file }));
      const given = control ? [{ title: "before", file: `tried/${control}` }] : [];
      return { ...scene("try", id, prompt, base, cells), given, note };
    });

/** @returns {Scene} */
const scene = (kind, key, prompt, base, cells) => ({ key: `${kind} ${key}`, kind, prompt, base, cells, given: [] });

/** @param {Scene} scene */
export const stepsOf = (scene) => [...new Set(scene.cells.map((one) => one.step))].sort((a, b) => (a ?? 0) - (b ?? 0));

/** The strengths of a step, with 0 for the base model, in order. */
export const strengthsOf = (scene, step) =>
  [
    ...new Set([
      ...(scene.base ? [0] : []),
      ...scene.cells.filter((one) => one.step === step).map((one) => one.strength),
    ]),
  ].sort((a, b) => a - b);

/** The file of a step at a strength; 0 is the base model. */
export const pictureAt = (scene, step, strength) =>
  strength === 0
    ? scene.base
    : (scene.cells.find((one) => one.step === step && one.strength === strength)?.file ?? null);

/** Of some numbers in order, the one that is nearest. */
export const nearest = (numbers, wanted) =>
  numbers.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best), numbers[0]);

/** What is shown between the strengths that were drawn: the two beside one, and the share of the second. */
export function between(strengths, amount) {
  const above = strengths.find((one) => one >= amount) ?? strengths.at(-1);
  const below = strengths.findLast((one) => one <= amount) ?? strengths[0];
  return { below, above, share: above === below ? 0 : (amount - below) / (above - below) };
}
