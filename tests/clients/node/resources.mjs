// Checks Kubernetes resources of gateways against the published schemas of their kinds. Those let unknown fields pass, so each name must also be a field that the package declares.
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseAllDocuments } from 'yaml';

const PACKAGES = { 'gateway.envoyproxy.io': 'envoy-gateway', 'gateway.networking.k8s.io': 'gateway-api', 'security.istio.io': 'istio', 'networking.istio.io': 'istio' };
// What belongs to every resource, and what an EnvoyFilter holds of Envoy's own.
const GENERAL = ['apiVersion', 'kind', 'metadata', 'spec', 'name', 'namespace', 'matchLabels', 'istio'];
const FREE = ['value'];

const modules = path.join(path.dirname(fileURLToPath(import.meta.url)), 'node_modules', '@kubernetes-models');

function declared(folder) {
  const found = new Set(GENERAL);
  for (const entry of fs.readdirSync(folder, { withFileTypes: true, recursive: true })) {
    if (!entry.name.endsWith('.d.ts')) continue;
    for (const match of fs.readFileSync(path.join(entry.parentPath ?? entry.path, entry.name), 'utf8').matchAll(/"([A-Za-z]+)"\??:/g)) found.add(match[1]);
  }
  return found;
}

function check(value, known, at) {
  if (Array.isArray(value)) return value.forEach((entry, index) => check(entry, known, `${at}[${index}]`));
  if (value === null || typeof value !== 'object') return;
  for (const [name, inner] of Object.entries(value)) {
    if (!known.has(name)) throw new Error(`${at}.${name}: there is no such field`);
    if (!FREE.includes(name)) check(inner, known, `${at}.${name}`);
  }
}

let count = 0;
for (const file of process.argv.slice(2)) {
  for (const document of parseAllDocuments(fs.readFileSync(file, 'utf8'), { strict: true })) {
    if (document.errors.length) throw document.errors[0];
    const resource = document.toJS();
    const [group, version] = resource.apiVersion.split('/');
    const folder = path.join(modules, PACKAGES[group]);
    const kind = (await import(path.join(folder, group, version, `${resource.kind}.js`)))[resource.kind];
    new kind(resource).validate();
    check(resource, declared(folder), `${path.basename(file)} ${resource.kind}`);
    count += 1;
  }
}
console.log(`${count} resources fit their schemas`);
