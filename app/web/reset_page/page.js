"use strict";

const find = (id) => document.getElementById(id);
const form = find("form"), password = find("password"), problem = find("problem"), send = find("send"), said = find("said");
let token = "";

// Out of the address bar and the history at once. Opened again in the same tab, only the fragment is new.
function begin() {
  token = location.hash.slice(1) || token;
  history.replaceState(null, "", location.pathname);
  if (!token) {
    end("This link is not complete", ["Open it from the mail once more, or copy all of it into the address bar."]);
    return;
  }
  said.hidden = true;
  form.hidden = false;
  title("Choose a password");
  password.focus();
}

function title(text) {
  document.title = text;
  find("title").textContent = text;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

// In place of the form; a screen reader reads on from the title.
function end(heading, paragraphs, list = [], last = "") {
  title(heading);
  form.hidden = true;
  password.value = "";
  const items = document.createElement("ul");
  items.append(...list.map((text) => element("li", text)));
  const parts = paragraphs.map((text) => element("p", text));
  said.replaceChildren(...parts, ...(list.length ? [items] : []), ...(last ? [element("p", last)] : []));
  said.hidden = false;
  find("title").focus();
}

function refuse(text) {
  problem.textContent = "";
  problem.textContent = text;
  password.setAttribute("aria-invalid", "true");
  password.setAttribute("aria-describedby", "problem rules");
  password.focus();
}

function waiting(is) {
  send.disabled = is;
  send.textContent = is ? "One moment…" : "Set the password";
}

async function ask() {
  const answer = await fetch("v1/password-resets/confirm", {
    method: "POST",
    headers: { "Content-Type": "application/json", Prefer: "wait=10" },
    body: JSON.stringify({ token, password: password.value, revoke: find("revoke").checked ? ["app_passwords"] : [] }),
    credentials: "omit",
    cache: "no-store",
    redirect: "error",
    referrerPolicy: "no-referrer",
  });
  return [answer.status, await answer.json(), Number(answer.headers.get("Retry-After"))];
}

function succeeded(body) {
  token = "";
  const names = body.app_passwords.map((each) => each.name);
  const ended = body.ready ? "was signed out" : "is being signed out, within a few seconds";
  end(
    "The new password is set",
    [
      `It opens the mailbox ${body.address} from now on. Whatever was signed in with the old one ${ended}: sign in again wherever ` +
        "you read your mail.",
      ...(names.length ? ["These app passwords were left as they are, and still open the mailbox:"] : []),
    ],
    names,
    names.length ? "If you do not know one of them, ask for another link, and choose there to end them too." : "",
  );
}

async function submit() {
  const length = [...password.value.normalize("NFC")].length, minimum = Number(form.dataset.minimum);
  if (length < minimum) {
    refuse(length ? `It has ${length} characters, and needs at least ${minimum}.` : "Write the new password first.");
    return;
  }
  waiting(true);
  try {
    const [status, body, seconds] = await ask();
    if (status === 200 || status === 202) succeeded(body);
    else if (status === 410) end("This link is not good any more", [body.remedy ?? body.detail]);
    else if (status === 429) refuse(`Too many tries from your network. Wait ${seconds || 60} seconds, then try again.`);
    else if (status === 503) refuse("The mail service cannot be reached just now. Your password is as it was: try again in a minute.");
    else refuse((body.errors ?? []).map((each) => each.detail).join(" ") || body.detail || body.title);
  } catch {
    refuse("There was no answer. Perhaps you are not connected; try again.");
  } finally {
    waiting(false);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!send.disabled) submit();
});

password.addEventListener("input", () => {
  problem.textContent = "";
  password.removeAttribute("aria-invalid");
  password.setAttribute("aria-describedby", "rules");
});

find("show").addEventListener("click", (event) => {
  const shown = password.type === "text";
  password.type = shown ? "password" : "text";
  event.currentTarget.textContent = shown ? "Show" : "Hide";
  event.currentTarget.setAttribute("aria-pressed", String(!shown));
});

addEventListener("hashchange", begin);
begin();
