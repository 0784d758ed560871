// What stands behind the page: a server, a notebook's Python, or nothing.

import { BundleError } from "./errors";

type Behind = "server" | "notebook" | "notebook-model";

export function behind(): Behind | undefined {
  return document.getElementById("explorer")?.dataset.served as Behind | undefined;
}

/** Whether the model answers: text of one's own, interventions. */
export function hasModel(): boolean {
  return behind() === "server" || behind() === "notebook-model";
}

export function inNotebook(): boolean {
  return behind()?.startsWith("notebook") ?? false;
}

let asked = 0;

/** Ask the server or the notebook's Python; an answer that says why there is none is an error. */
export async function ask<T>(question: string, values: object): Promise<T> {
  const found = inNotebook() ? await askNotebook(question, values) : await askServer(question, values);
  if (found.error) throw new BundleError(found.error);
  return found as T;
}

async function askServer(question: string, values: object): Promise<any> {
  try {
    const answer = await fetch(`api/${question}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(values),
    });
    return await answer.json();
  } catch {
    throw new BundleError("The server that runs the model does not answer: is it still running?");
  }
}

const PATIENCE = 120_000; // milliseconds: Python answers after the cell that it is running

function askNotebook(question: string, values: object): Promise<any> {
  // Several views of one widget hear the same answers.
  const id = `${++asked}.${Math.random()}`;
  return new Promise((resolve, reject) => {
    const stop = setTimeout(() => {
      removeEventListener("message", heard);
      reject(new BundleError("The notebook does not answer: is its kernel running, and free?"));
    }, PATIENCE);
    const heard = ({ source, data }: MessageEvent) => {
      if (source !== parent || data?.tlBilinear !== "answer" || data.id !== id) return;
      clearTimeout(stop);
      removeEventListener("message", heard);
      resolve(data.answer);
    };
    addEventListener("message", heard);
    parent.postMessage({ tlBilinear: "ask", id, question, asked: plain(values) }, "*");
  });
}

/** Plain values: what Svelte watches cannot be posted. */
function plain(values: object): object {
  return JSON.parse(JSON.stringify(values)) as object;
}
