// Reads one stream with the official client: a line of JSON for each chunk, and one for an error that was sent.
import OpenAI from "openai";

const { baseURL, mode, body, headers, path } = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const MODES = {
  create: () => client.chat.completions.create(body, { headers }),
  helper: () => client.chat.completions.stream(body, { headers }),
  resume: () => client.get(path, { headers, stream: true }),
};
try {
  for await (const chunk of await MODES[mode]()) {
    console.log(JSON.stringify(chunk));
  }
} catch (error) {
  if (!(error instanceof OpenAI.APIError) || !error.error) throw error;
  console.log(JSON.stringify({ error: error.error }));
}
