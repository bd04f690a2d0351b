// Use transformers.js on a folder: MODULES FOLDER SCRATCH. See run.py.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join } from 'node:path';

const [modules, folder, scratch] = process.argv.slice(2);
const { AutoTokenizer, env, pipeline } = createRequire(join(modules, 'x.js'))('@huggingface/transformers');
env.allowRemoteModels = false;
env.localModelPath = dirname(folder) + '/';
const name = basename(folder);
const question = JSON.parse(readFileSync(join(scratch, 'question.json'), 'utf8'));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const ids = question.lines.map((line) => Array.from(tokenizer.encode(line), Number));
const fill = await pipeline('fill-mask', name, { dtype: 'fp32', device: 'cpu' });
const words = [];
for (const text of question.questions) words.push((await fill(text, { top_k: 1 }))[0].token);
const extract = await pipeline('feature-extraction', name, { dtype: 'fp32', device: 'cpu' });
const rows = [];
for (const text of question.texts) rows.push(Array.from((await extract(text, { pooling: 'mean' })).data));
writeFileSync(join(scratch, 'answer.json'), JSON.stringify({ version: env.version, ids, words, rows }));
