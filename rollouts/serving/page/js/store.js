// Conversations in the browser's own database; they never leave this machine.
import { normalize } from "./conversation.js";

const NAME = "rollouts";
const TABLE = "conversations";
let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function withTable(mode, use) {
  const table = (await open()).transaction(TABLE, mode).objectStore(TABLE);
  return new Promise((resolve, reject) => {
    const request = use(table);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Every stored conversation, the latest first. */
export async function loadAll() {
  const stored = await withTable("readonly", (table) => table.getAll());
  return stored.map(normalize).sort((a, b) => b.updated - a.updated);
}

const removed = new Set(); // ids: a reply that ends later must not bring its conversation back

export async function save(conversation) {
  if (!removed.has(conversation.id)) await withTable("readwrite", (table) => table.put(structuredClone(conversation)));
}

export function remove(id) {
  removed.add(id);
  return withTable("readwrite", (table) => table.delete(id));
}

export function restore(conversation) {
  removed.delete(conversation.id);
  return save(conversation);
}

/** A preference, such as the theme; storage may be blocked. */
export function preference(name, value = undefined) {
  try {
    if (value === undefined) return localStorage.getItem(`rollouts.${name}`);
    localStorage.setItem(`rollouts.${name}`, value);
  } catch {
    // Then it lasts as long as the page.
  }
  return value ?? null;
}
