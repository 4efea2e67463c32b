// Preact and htm, bound to each other: the only place that names the vendored files. Texts of
// templates are in the language of the page.
import { Fragment, createElement, render } from "../vendor/preact.mjs";
import htm from "../vendor/htm.mjs";
import { ofElements } from "./language.mjs";

export { useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-hooks.mjs";
export { Fragment, render };
export const html = ofElements(htm.bind(createElement));
