// Where the documentation describes each view. Its site (tools/site.py) has these pages, and links back to the views.

/** Pages and anchors by the name of a view, and for the steps of a new LoRA by that of the step. */
const PAGES = {
  "": "serve.html#from-photos-to-a-lora",
  compare: "previews.html#which-checkpoint-is-good",
  jobs: "serve.html#from-photos-to-a-lora",
  models: "serve.html#getting-a-model",
  "new/model": "cards.html#which-model-fits",
  "new/photos": "serve.html#photos-and-captions",
  "new/settings": "training.html#how-many-pictures-how-many-steps",
  photos: "serve.html#photos-and-captions",
  runs: "serve.html#which-step",
  sweeps: "sweep.html#ranking",
};

/**
 * The page about a view, below the address of the documentation.
 *
 * @param {string[]} parts of the view's address
 */
export const helpPage = ([name = "", , step = "photos"]) => PAGES[name === "new" ? `new/${step}` : name] ?? PAGES[""];
