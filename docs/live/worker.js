// A worker that runs one Python program: its files come with the message, its lines go back.
import { ConsoleStdout, File, OpenFile, PreopenDirectory, WASI } from "./wasi/index.js";

const HOME = "/home";
const PROGRAM = "import runpy, sys; sys.path.insert(0, '/home/minilora.zip');"
  + "sys.argv = ['run', '/home']; runpy.run_module('run', run_name='__main__')";

onmessage = async ({ data: { module, library, files } }) => {
  const file = (content) => new File(typeof content === "string" ? new TextEncoder().encode(content) : content);
  const lines = (kind) => ConsoleStdout.lineBuffered((line) => postMessage({ kind, line }));
  const home = new Map(Object.entries(files).map(([name, content]) => [name, file(content)]));
  const descriptors = [
    new OpenFile(file("")),
    lines("line"),
    lines("printed"),
    new PreopenDirectory("/usr/local/lib", new Map([["python315.zip", file(library)]])),
    new PreopenDirectory(HOME, home),
  ];
  const environment = [`HOME=${HOME}`, "NO_COLOR=1", "PYTHONDONTWRITEBYTECODE=1", "OPENBLAS_NUM_THREADS=1"];
  const wasi = new WASI(["python", "-c", PROGRAM], environment, descriptors, { debug: false });
  let instance, failure = "";
  try {
    instance = await WebAssembly.instantiate(module, {
      wasi_snapshot_preview1: wasi.wasiImport,
      host: { call: () => -1 },
    });
    wasi.initialize(instance);
    instance.exports.run();
  } catch (error) {
    failure = String(error);
  }
  postMessage({ kind: "done", failure, memory: instance?.exports.memory.buffer.byteLength ?? 0 });
};
