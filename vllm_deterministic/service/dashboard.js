"use strict";
const KEPT = 60, POLL_MS = 4000;
const WORDS = {identical: "identical", diverged: "diverged", error: "could not run", interrupted: "stopped early", cancelled: "cancelled", running: "running", queued: "waiting"};
const watched = new Map();  // id of a verification that runs -> what its stream told last
const $ = id => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = {...options.headers, ...(token ? {Authorization: `Bearer ${token}`} : {})};
  const answer = await fetch(path, {...options, headers});
  if (answer.status === 401) throw Object.assign(new Error("The token is missing or wrong."), {locked: true});
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail || `The service answered ${answer.status}.`);
  return answer;
}
const read = async path => (await call(path)).json();

function notice(text) { $("notice").textContent = text; $("notice").hidden = !text; }

function act(work) {
  return async event => {
    const button = event.currentTarget;
    button.disabled = true;
    try { await work(); notice(""); await refresh(); } catch (error) { notice(error.message); } finally { button.disabled = false; }
  };
}

function ago(time) {
  const seconds = Math.max(0, (Date.now() - new Date(time)) / 1000);
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= length) return `${Math.floor(seconds / length)} ${unit} ago`;
  return `${Math.floor(seconds)} s ago`;
}
const listed = names => names.length > 4 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const duration = seconds => seconds >= 120 ? `${Math.round(seconds / 60)} min` : `${Number(seconds.toFixed(1))} s`;

// A run that ended before a target was asked speaks for the target with its own status.
const outcome = (run, target) => run.results.find(result => result.target === target) || {status: run.status, message: run.message, arms: [], fingerprints: []};
const judged = outcome => outcome && (outcome.status === "identical" || outcome.status === "diverged");

function showVerdict(targets, schedule, ended) {
  const last = targets.map(target => ended.map(run => run.targets.includes(target.name) && outcome(run, target.name)).find(Boolean));
  const names = status => targets.filter((_, place) => last[place]?.status === status).map(target => target.name).join(", ");
  const replicas = ended.find(run => run.replicas)?.replicas;
  let tone = "identical", headline = `${targets.length === 1 ? "The target answers" : "All targets answer"} identically`;
  if (names("diverged")) [tone, headline] = ["diverged", `Diverged: ${names("diverged")}`];
  else if (replicas?.status === "diverged") [tone, headline] = ["diverged", "The replicas differ from each other"];
  else if (names("error")) [tone, headline] = ["error", `Could not run: ${names("error")}`];
  else if (targets.some(target => !target.ready)) [tone, headline] = ["error", "A target does not answer"];
  else if (!last.every(judged)) [tone, headline] = ["waiting", "Not every target has been verified yet"];
  $("verdict").className = tone;
  $("headline").textContent = headline;
  document.title = `${headline} – vllm-deterministic`;
  const clock = schedule.every_s ? `Verified every ${duration(schedule.every_s)}, at most ${schedule.scheduled_concurrency} requests at a time on a target.` : "There is no schedule; verify by hand or start the service with --every.";
  $("subline").textContent = clock;
  $("replicas").hidden = !replicas;
  if (replicas) { $("replicas").textContent = `Between targets: ${replicas.message}`; $("replicas").className = replicas.status === "identical" && replicas.fingerprints_agree ? "soft" : "diverged status wide"; $("replicas").style.whiteSpace = "normal"; }
}

function targetRow(target, ended) {
  const mine = ended.filter(run => run.targets.includes(target.name)).slice(0, KEPT);
  const latest = mine[0] && outcome(mine[0], target.name);
  const diverged = mine.filter(run => outcome(run, target.name).status === "diverged").length;
  const strip = element("div", {className: "strip wide", role: "img"});
  strip.setAttribute("aria-label", `Last ${plural(mine.length, "verification")}: ${diverged} diverged`);
  for (let blank = mine.length; blank < KEPT; blank++) strip.append(element("i", {className: "none"}));
  for (const run of [...mine].reverse()) {
    const one = outcome(run, target.name);
    strip.append(element("i", {className: one.status, title: `${new Date(run.finished_at).toLocaleString()}: ${WORDS[one.status]}. ${one.message}`}));
  }
  const facts = [diverged ? `diverged in ${diverged} of the last ${plural(mine.length, "verification")}` : "", target.url, target.model, latest?.fingerprints.length ? `fingerprint ${latest.fingerprints.join(", ")}` : ""].filter(Boolean).join(" · ");
  const row = element("div", {className: `target ${latest ? latest.status : "waiting"}`},
    element("strong", {textContent: target.name}),
    element("span", {className: "status", textContent: latest ? `${WORDS[latest.status]}, ${ago(mine[0].finished_at)}` : "not verified yet"}),
    element("span", {className: "wide soft", textContent: facts}), strip);
  if (!target.ready) row.append(element("span", {className: "wide status error", style: "white-space: normal", textContent: `Does not answer: ${target.detail}`}));
  if (latest && latest.status !== "identical") row.append(element("span", {className: "wide", textContent: latest.message}));
  return row;
}

function liveRow(run) {
  const cancel = element("button", {type: "button", textContent: "Cancel", onclick: act(() => call(`/v1/verifications/${run.id}`, {method: "DELETE"}))});
  const row = element("div", {className: `run ${run.status}`}, element("strong", {textContent: listed(run.targets)}), cancel,
    element("span", {className: "wide soft", textContent: run.status === "queued" ? "Waits for its turn." : `${run.trigger === "schedule" ? "By the clock" : "On request"}: ${run.request.arms.join(", ")}`}));
  for (const step of run.progress) row.append(element("div", {className: "bar wide"}, element("span", {textContent: step.target}),
    element("progress", {max: step.total || 1, value: step.done, ariaLabel: `${step.target}: ${step.arm}`}), element("span", {className: "soft", textContent: `${step.arm} ${step.done}/${step.total}`})));
  return row;
}

function runRow(run) {
  const reports = element("span", {className: "wide reports"}, run.results.length ? "Reports:" : "");
  for (const result of run.results) reports.append(element("button", {type: "button", className: "link", onclick: act(() => openReport(run.id, result.target)), textContent: result.target}));
  const took = run.started_at ? `, ${duration((new Date(run.finished_at) - new Date(run.started_at)) / 1000)}` : "";
  return element("div", {className: `run ${run.status}`},
    element("strong", {textContent: listed(run.targets)}), element("span", {className: "status", textContent: WORDS[run.status]}),
    element("span", {className: "wide soft", textContent: `${new Date(run.finished_at).toLocaleString()}, ${run.trigger === "schedule" ? "by the clock" : "on request"}${took}`}),
    element("span", {className: "wide", textContent: run.status === "identical" ? "" : run.message}), reports);
}

async function openReport(id, target) {
  const page = await (await call(`/v1/verifications/${id}/report?target=${encodeURIComponent(target)}`)).blob();
  const url = URL.createObjectURL(page);
  element("a", {href: url, target: "_blank", rel: "noopener"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function showLive() {
  $("live").hidden = watched.size === 0;
  $("running").replaceChildren(...[...watched.values()].map(liveRow));
}

async function watch(run) {
  watched.set(run.id, run);
  try {
    const reader = (await call(`/v1/verifications/${run.id}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "", {value, done} = await reader.read(); !done; {value, done} = await reader.read()) {
      const events = (text + value).split(/\r?\n\r?\n/);
      text = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5)).join("\n");
        if (data) watched.set(run.id, JSON.parse(data));
      }
      showLive();
    }
  } catch { /* the next poll tells what became of the service */ }
  watched.delete(run.id);
  showLive();
  refresh();
}

async function refresh() {
  try {
    const [targets, page] = await Promise.all([read("/v1/targets"), read("/v1/verifications?limit=100")]);
    const ended = page.items.filter(run => run.finished_at);
    $("login").hidden = true;
    $("content").hidden = $("verify").hidden = false;
    showVerdict(targets.items, targets, ended);
    $("targets").replaceChildren(...targets.items.map(target => targetRow(target, ended)));
    $("recent").replaceChildren(...ended.slice(0, 15).map(runRow));
    if (!ended.length) $("recent").replaceChildren(element("p", {className: "soft", textContent: "None has ended yet."}));
    for (const run of page.items.filter(run => !run.finished_at && !watched.has(run.id))) watch(run);
    showLive();
  } catch (error) {
    $("verdict").className = "error";
    $("headline").textContent = error.locked ? "Locked" : "The service does not answer";
    $("subline").textContent = error.locked && !sessionStorage.getItem("token") ? "" : error.message;
    if (error.locked) { $("login").hidden = false; $("content").hidden = $("verify").hidden = true; $("token").focus(); }
  }
}

$("verify").onclick = act(() => call("/v1/verifications", {method: "POST", headers: {"Content-Type": "application/json"}, body: "{}"}));
$("login").onsubmit = event => { event.preventDefault(); sessionStorage.setItem("token", $("token").value); $("token").value = ""; refresh(); };
setInterval(() => { if (!document.hidden && $("login").hidden) refresh(); }, POLL_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
