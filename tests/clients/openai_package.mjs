// OpenAI's JavaScript package against a running engine. Usage: node openai_package.mjs URL MODEL
// Prints one line for each check that holds, and ends with an exception at the first that does not.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the for statement?" }];
const Vote = z.object({ choice: z.enum(["yes", "no"]), weight: z.number().int().min(0).max(9) });
const count = {
  type: "function",
  function: {
    name: "count",
    strict: true,
    parameters: {
      type: "object",
      properties: { number: { enum: [1, 2, 3] } },
      required: ["number"],
      additionalProperties: false,
    },
  },
};

const checks = {
  async models() {
    const ids = [];
    for await (const each of client.models.list()) ids.push(each.id);
    assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async completions() {
    const request = { model, prompt: "The for statement", max_tokens: 12, temperature: 0 };
    const whole = await client.completions.create(request);
    let text = "";
    for await (const chunk of await client.completions.create({ ...request, stream: true })) text += chunk.choices[0].text;
    assert.equal(whole.usage.completion_tokens, 12);
    assert.equal(text, whole.choices[0].text);
  },

  async chat_completions() {
    const request = { model, messages, temperature: 0, max_completion_tokens: 200 };
    const whole = await client.chat.completions.create({ ...request, logprobs: true, top_logprobs: 2 });
    assert.ok(whole.choices[0].logprobs.content.every((row) => row.top_logprobs.length === 2));
    const stream = client.chat.completions.stream({ ...request, stream_options: { include_usage: true } });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const final = await stream.finalChatCompletion();
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(final.choices[0].message.content, text);
    assert.equal((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);
  },

  async parsed_output() {
    const response_format = zodResponseFormat(Vote, "vote");
    const chat = await client.chat.completions.parse({ model, messages, response_format, max_tokens: 200 });
    assert.ok(Vote.parse(chat.choices[0].message.parsed));
    const text = { format: zodTextFormat(Vote, "vote") };
    const response = await client.responses.parse({ model, input: "Vote!", text, max_output_tokens: 200 });
    assert.ok(Vote.parse(response.output_parsed));
  },

  async tools() {
    const request = { model, messages, tools: [count], tool_choice: "required", parallel_tool_calls: false };
    const { choices } = await client.chat.completions.create({ ...request, max_tokens: 200 });
    assert.equal(choices[0].finish_reason, "tool_calls");
    const [call] = choices[0].message.tool_calls;
    assert.ok([1, 2, 3].includes(JSON.parse(call.function.arguments).number));
    const result = { role: "tool", tool_call_id: call.id, content: "counted" };
    const again = await client.chat.completions.create({
      model, messages: [...messages, choices[0].message, result], tools: [count], max_tokens: 200,
    });
    assert.ok(again.usage.completion_tokens > 0);

    // The package calls the function itself, and sends the result back.
    const called = [];
    const runner = client.chat.completions.runTools({
      model, messages, max_tokens: 200, parallel_tool_calls: false,
      tool_choice: { type: "function", function: { name: "count" } },
      tools: [{
        type: "function",
        function: { ...count.function, parse: JSON.parse, function: (given) => called.push(given.number) && "counted" },
      }],
    });
    await runner.done();
    assert.ok(called.length > 0 && called.every((number) => [1, 2, 3].includes(number)));
  },

  async responses() {
    const request = { model, temperature: 0, max_output_tokens: 20 };
    const first = await client.responses.create({ ...request, input: "What is a class?" });
    const stream = client.responses.stream({ ...request, input: "And?", previous_response_id: first.id });
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    const second = await stream.finalResponse();
    assert.equal(second.output_text, text);
    assert.ok(second.usage.input_tokens > first.usage.total_tokens);
  },

  async errors() {
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: 3 }), OpenAI.BadRequestError);
    await assert.rejects(client.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
    const late = client.chat.completions.create({ model, messages, deadline_s: 1e-6 });
    await assert.rejects(late, (error) => error instanceof OpenAI.APIError && error.status === 408);
  },

  async a_stream_that_is_aborted() {
    const request = { model, messages, max_tokens: 900, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(request);
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 3) break;
    assert.ok(stream.controller.signal.aborted);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
