// Chat completions of this server, as they stream.  Knows nothing of the page.

export class RequestFailed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;  // HTTP; 0 when the stream had begun or nobody answered
  }
}

export async function servedModel(key) {
  const response = await answered(fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data[0].id;
}

// Yields the stream's chunks.  Throws RequestFailed; an AbortError when `signal` says so.
export async function* completion(body, key, signal) {
  const options = { include_usage: true, continuous_usage_stats: true, include_details: true };
  const response = await answered(fetch("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: options }),
    signal,
  }));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestFailed(chunk.error.message, 0);
    yield chunk;
  }
  throw new RequestFailed("The answer broke off: the server closed the connection.", 0);
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function answered(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new RequestFailed(body?.error?.message ?? `HTTP ${response.status}`, response.status);
}

// The data of each server-sent event; comments are left out.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice("data: ".length);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
