// The server's API. Paths are relative, so that the page works behind a proxy's prefix too.

const login = document.querySelector("#login");
let key = sessionStorage.getItem("fastldm.key");
let asked = null; // all calls that were refused wait for one answer

/** An answer that is an error; `field` is the API's name of what is wrong, if it is one thing. */
export class Refused extends Error {
  constructor(status, { message, param = null, code = "" }) {
    super(message);
    this.status = status;
    this.field = param;
    this.code = code;
  }
}

/** The JSON of an answer. Asks for a key where the server does; Refused for all other errors. */
export async function call(path, { method = "GET", json, form } = {}) {
  for (;;) {
    const used = key;
    const headers = used ? { authorization: `Bearer ${used}` } : {};
    if (json !== undefined) headers["content-type"] = "application/json";
    const body = form ?? (json === undefined ? undefined : JSON.stringify(json));
    let answer;
    try {
      answer = await fetch(path, { method, headers, body });
    } catch {
      throw new Refused(0, { message: "The server does not answer. Does it still run?" });
    }
    if (answer.status === 401) {
      if (used === key) {
        asked ??= askForKey(used !== null).finally(() => (asked = null));
        await asked;
      }
      continue;
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) {
      throw new Refused(answer.status, content.error ?? { message: `The server answered ${answer.status}.` });
    }
    return content;
  }
}

function askForKey(wasWrong) {
  const input = login.querySelector("input");
  login.querySelector(".error").hidden = !wasWrong;
  input.value = "";
  return new Promise((resolve) => {
    login.addEventListener("cancel", (event) => event.preventDefault());
    login.querySelector("form").onsubmit = () => {
      key = input.value.trim();
      sessionStorage.setItem("fastldm.key", key);
      resolve();
    };
    login.showModal();
  });
}

/** A picture of an answer, as something that an <img> and a download can have. */
export function toUrl(base64, type = "image/png") {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type }));
}

/** The base64 of a file or blob. */
export function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
