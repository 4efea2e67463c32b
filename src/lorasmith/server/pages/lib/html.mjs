// Preact and htm, bound to each other: the only place that names the vendored files.
import { Fragment, createElement, render } from "../vendor/preact.mjs";
import htm from "../vendor/htm.mjs";

export { useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-hooks.mjs";
export { Fragment, render };
export const html = htm.bind(createElement);
