// A bundle: its manifest and files, read from anywhere and checked before they are used.

/** A fault that the user can mend; its message is one line. */
export class UserError extends Error {}

const FORMAT_VERSION = 3; // 2 is proportional attention, 3 a first selection inside the vision tower
const FAMILY = "llava"; // one image size and a fixed number of tokens: what image.mjs can prepare

/**
 * Read and check the manifest. `read(name)` gives a file of the bundle as a Uint8Array.
 * The result's `bytes(name)` and `json(name)` check size and SHA-256 of each file they read.
 */
export async function readBundle(read) {
  const manifest = parseJson(await read("resprune.json"), "resprune.json");
  if (!Number.isInteger(manifest.format_version)) {
    throw new UserError("resprune.json is not the manifest of a bundle; export the bundle again");
  }
  if (manifest.format_version > FORMAT_VERSION) {
    throw new UserError(
      `the bundle has format version ${manifest.format_version} and this reads up to ${FORMAT_VERSION}; ` +
        "take a newer one",
    );
  }
  for (const key of ["family", "selection", "positions", "image_token_id", "context_length", "graphs", "files"]) {
    if (!(key in manifest)) throw new UserError(`resprune.json has no ${key}; export the bundle again`);
  }
  if (manifest.family !== FAMILY) {
    throw new UserError(`the bundle is of the family ${manifest.family}, and this runs ${FAMILY} only`);
  }
  if (manifest.optimize) {
    throw new UserError("the bundle is for newer ONNX Runtimes than those of JavaScript; export it without --optimize");
  }
  const bytes = async (name) => {
    const spec = manifest.files[name];
    if (!spec) throw new UserError(`the bundle has no ${name}; export it again`);
    const content = await read(name);
    if (content.byteLength !== spec.size) {
      throw new UserError(
        `${name} has ${content.byteLength} bytes where ${spec.size} were written; copy the bundle again`,
      );
    }
    if ((await sha256(content)) !== spec.sha256) {
      throw new UserError(`${name} was altered after the export (its SHA-256 differs); copy the bundle again`);
    }
    return content;
  };
  return {
    manifest,
    bytes,
    has: (name) => name in manifest.files,
    json: async (name) => parseJson(await bytes(name), name),
    /** Names of the files with a graph's weights; empty for a small graph. Bundles of old do not name them. */
    weights: (graph) => {
      const { file, weights = `${file}_data` } = manifest.graphs[graph];
      return weights in manifest.files ? [weights] : [];
    },
  };
}

/** A JSON file of the bundle, {} where the bundle has none of this name. */
export async function optionalJson(bundle, name) {
  return bundle.has(name) ? bundle.json(name) : {};
}

/** The settings of the bundle's image processor: transformers 5 nests them, and that goes first. */
export async function imageProcessorConfig(bundle) {
  const nested = (await optionalJson(bundle, "processor_config.json")).image_processor;
  return nested ?? bundle.json("preprocessor_config.json");
}

/** The ids that end an answer. */
export async function stopIds(bundle) {
  for (const name of ["generation_config.json", "config.json"]) {
    const config = await optionalJson(bundle, name);
    for (const table of [config, config.text_config ?? {}]) {
      const found = [table.eos_token_id ?? []].flat();
      if (found.length) return found;
    }
  }
  throw new UserError("the bundle does not say which token ends an answer; export it again");
}

async function sha256(content) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parseJson(content, name) {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch (error) {
    throw new UserError(`${name} is not valid JSON (${error.message}); copy the bundle again`);
  }
}
