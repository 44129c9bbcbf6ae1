// Live updates of Flask-GSession. Dispatches on document: gsession:ended, gsession:began,
// gsession:changed {keys, user}, gsession:devices, gsession:message {name, data}.
// One tab holds a lock and the stream, and forwards its news.
(() => {
  const {src: source, dataset: {state: shown}} = document.currentScript;
  const at = name => new URL(name, source).href;
  const lock = "gsession " + at(".");
  const channel = window.BroadcastChannel && new BroadcastChannel(lock);
  const share = news => channel && channel.postMessage(news);
  const sleep = ms => new Promise(done => setTimeout(done, ms));
  const tell = (name, detail) =>
    document.dispatchEvent(new CustomEvent("gsession:" + name, {detail}));
  let known = shown ? {every: 5, ...JSON.parse(shown)} : null;  // the last state
  let last = known && known.last;  // the id of the last message
  let open = false;  // whether a tab has a stream
  let leads = false;

  // A repeated state does no harm. null: unknown.
  const differing = (a = {}, b = {}) =>
    Object.keys({...a, ...b}).filter(key => a[key] !== null && a[key] !== b[key]);
  const take = state => {
    const was = known;
    known = {stream: was && was.stream, every: was ? was.every : 5, ...state};
    if (!was) return;
    const same = was.who === state.who;
    if (!same && (was.who || state.who === null)) tell("ended");
    if (!same && state.who) tell("began");
    if (state.who === null) return;
    const keys = differing(was.keys, state.keys);
    const user = same ? differing(was.user, state.user) : [];
    if (keys.length || user.length) tell("changed", {keys, user});
    if (same && was.devices !== state.devices) tell("devices");
  };
  const hear = ({id, name, data}) => {
    if (id <= last) return;
    last = id;
    tell("message", {name, data});
  };
  const check = async () => {
    try {
      const after = last === null ? "" : "?after=" + last;
      const answer = await fetch(at("state") + after, {cache: "no-cache"});
      if (!answer.ok) return;
      const {messages, last: newest, ...state} = await answer.json();
      if (last === null) last = newest;
      take(state);
      messages.forEach(hear);
      share({state});
    } catch { /* offline */ }
  };

  // Resolves to milliseconds until the next attempt.
  const stream = () => new Promise(done => {
    const events = new EventSource(at("stream") + "?after=" + last);
    const end = pause => {
      events.close();
      share({open: open = false});
      done(pause);
    };
    events.addEventListener("state", ({data}) => {
      const state = JSON.parse(data);
      // Another request may be about to bring a new token.
      if (state.who === null) return end(300);
      take(state);
      share({state, open: open = true});
    });
    events.addEventListener("message", ({data}) => {
      hear(JSON.parse(data));
      share({message: JSON.parse(data)});
    });
    events.onerror = () => events.readyState === EventSource.CLOSED && end(60000);
  });
  const lead = async () => {
    for (leads = true;; ) {
      const can = known && known.stream && known.who !== null;
      await sleep(can ? await stream() : 1000);
      if (can) await check();
    }
  };

  // Without a stream, each visible tab polls; rarely without a session.
  const poll = async round => {
    await sleep(1000 * (known ? known.every : 5));
    const rare = known && known.who === null && round % 12;
    if (!open && !document.hidden && !rare) await check();
    poll(round + 1);
  };
  const look = () => document.hidden || open || check();
  if (channel) channel.onmessage = ({data}) => {
    if (data.hello && leads) share({state: known, open});
    if ("open" in data) open = data.open;
    if (data.state) take(data.state);
    if (data.message) hear(data.message);
  };
  document.addEventListener("visibilitychange", look);
  addEventListener("pageshow", event => event.persisted && look());
  check().then(() => {
    share({hello: true});
    poll(1);
    if (navigator.locks && channel) navigator.locks.request(lock, lead);
  });
})();
