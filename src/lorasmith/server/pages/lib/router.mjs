// Addresses of views in the fragment of the URL, so that links survive a reload.
import { useEffect, useState } from "./html.mjs";

/** The address of a view: its name, then its arguments. */
export const link = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

export function go(...parts) {
  location.hash = link(...parts);
}

export function replace(...parts) {
  history.replaceState(null, "", link(...parts));
  dispatchEvent(new HashChangeEvent("hashchange"));
}

/** The parts of the current address; the first names the view. */
function route() {
  return location.hash
    .replace(/^#\/?/, "")
    .split("/")
    .filter(Boolean)
    .map((part) => {
      try {
        return decodeURIComponent(part);
      } catch {
        return part;
      }
    });
}

export function useRoute() {
  const [parts, setParts] = useState(route);
  useEffect(() => {
    const changed = () => setParts(route());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return parts;
}
