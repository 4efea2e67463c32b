// Downloads of the server, and model files that are sent to it.
import { ApiError, address, get, sentence } from "./api.mjs";
import { useEffect, useRef, useState } from "./html.mjs";
import { t } from "./language.mjs";

const PAUSE_MS = 1000;
export const isOnItsWay = (download) => download?.state === "waiting" || download?.state === "running";

/**
 * All downloads since the server started, the last first, and a function that looks again: [downloads, refresh].
 * They are looked at each second while one is on its way.
 *
 * @param {() => void} onEnded called when one has ended
 * @returns {[Api.DownloadAnswer[], () => void]}
 */
export function useDownloads(onEnded) {
  const [all, setAll] = useState(/** @type {Api.DownloadAnswer[]} */ ([]));
  const [round, setRound] = useState(0);
  const known = useRef(null); // ids of those that have ended
  const end = useRef(onEnded);
  end.current = onEnded;
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    const look = async () => {
      let found;
      try {
        found = (await get(["downloads"], {}, stop.signal)).downloads;
      } catch {
        if (!stop.signal.aborted) timer = setTimeout(look, PAUSE_MS);
        return;
      }
      if (stop.signal.aborted) return;
      setAll(found);
      const ended = new Set(found.filter((one) => !isOnItsWay(one)).map((one) => one.id));
      const isNew = known.current !== null && [...ended].some((id) => !known.current.has(id));
      known.current = ended;
      if (isNew) end.current();
      if (found.some(isOnItsWay)) timer = setTimeout(look, PAUSE_MS);
    };
    look();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [round]);
  return [all, () => setRound((number) => number + 1)];
}

/** Sends a model file; `onProgress` is called with the share that is sent. The answer says where it is. */
export function sendModel(file, onProgress) {
  const body = new FormData();
  body.append("file", file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not say how much is sent
    request.open("POST", address(["models"]));
    request.responseType = "json";
    request.upload.onprogress = (event) => onProgress(event.total ? event.loaded / event.total : 0);
    request.onerror = () =>
      reject(new ApiError("offline", t`The file could not be sent. Look whether the server runs, and send it again.`));
    request.onload = () => {
      if (request.status < 300) return resolve(request.response);
      const { kind = "error", message = t`The server answered with an error (${request.status}).` } =
        request.response?.error ?? {};
      return reject(new ApiError(kind, sentence(message), request.status));
    };
    request.send(body);
  });
}
