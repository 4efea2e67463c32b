// Icons as outlines of a square of 24, in the colour of the words beside them.
import { html } from "../lib/html.mjs";

const OUTLINES = {
  back: "M15 5l-7 7 7 7",
  brush: "M4 20c3 0 5-1 5-4a3 3 0 0 1 4-3l7-9-9 7a3 3 0 0 0-3 4c-3 0-4 2-4 5z",
  check: "M5 12.5l4.5 4.5L19 7.5",
  clip: "M4 6h11v12H4zM15 10l5-3v10l-5-3",
  close: "M6 6l12 12M18 6L6 18",
  crop: "M7 3v14h14M3 7h14v14",
  dice: "M5 5h14v14H5zM9 9h.01M15 9h.01M12 12h.01M9 15h.01M15 15h.01",
  down: "M6 9l6 6 6-6",
  download: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  edit: "M4 5h7v14H4zM13 5h7v14h-7z",
  engineer: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  forward: "M9 5l7 7-7 7",
  graph: "M4 4h6v6H4zM14 14h6v6h-6zM10 7h4a3 3 0 0 1 3 3v4",
  help: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM9.5 10a2.5 2.5 0 1 1 3.6 2.2c-.7.4-1.1.8-1.1 1.8M12 17h.01",
  language: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM3.5 12h17M12 3c4 4 4 14 0 18M12 3c-4 4-4 14 0 18",
  menu: "M4 7h16M4 12h16M4 17h16",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  person: "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM5 20c0-4 3-6 7-6s7 2 7 6",
  pet: "M5 4l4 3h6l4-3v8c0 5-3 8-7 8s-7-3-7-8zM9.5 12h.01M14.5 12h.01",
  play: "M8 5l11 7-11 7z",
  plus: "M12 5v14M5 12h14",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l4.5 4.5",
  settings: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  share: "M12 15V4M8 7.5l4-4 4 4M5 12v8h14v-8",
  slider: "M3 12h6M15 12h6M12 15a3 3 0 1 0 0-6 3 3 0 0 0 0 6z",
  star: "M12 4l2.5 5.2 5.7.8-4.1 4 1 5.7-5.1-2.7-5.1 2.7 1-5.7-4.1-4 5.7-.8z",
  style: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  swap: "M4 9h15l-4-4M20 15H5l4 4",
  thing: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  undo: "M8 5L4 9l4 4M4 9h10a5 5 0 0 1 0 10h-3",
  up: "M6 15l6-6 6 6",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
};

/**
 * An icon beside words, or in a button with an `aria-label`.
 *
 * @param {Props<{ name: keyof typeof OUTLINES, filled?: boolean }>} props
 */
export function Icon({ name, filled = false }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" fill=${filled ? "currentColor" : "none"}
      stroke="currentColor" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round">
    <path d=${OUTLINES[name]} />
  </svg>`;
}
