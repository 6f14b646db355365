"""Asks every model of a server the same questions and prints the answers side by side.

`python -m demo.ask --base-url http://127.0.0.1:23333/v1`
"""

import argparse
import asyncio
import itertools
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass

import openai

QUESTIONS = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "I loved this film, it made my whole week.",
)
MIN_COLUMN_WIDTH = 20


@dataclass(frozen=True)
class Answer:
    """A model's answer, its number of tokens, and the times that it took."""

    text: str
    num_tokens: int
    first_token_s: float
    duration_s: float

    @property
    def speed(self) -> str:
        """Tokens per second after the first token, and the time to the first token."""
        decode_s = self.duration_s - self.first_token_s
        rate = f"{(self.num_tokens - 1) / decode_s:.0f} tokens/s" if decode_s > 0 else "1 token"
        return f"{rate}, first after {self.first_token_s * 1000:.0f} ms"


async def ask(client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int) -> Answer:
    """Streams one answer, with greedy decoding."""
    started_at = time.perf_counter()
    first_at, text, num_tokens = None, "", 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first_at = first_at or time.perf_counter()
            text += chunk.choices[0].delta.content
    ended_at = time.perf_counter()
    return Answer(text.strip(), num_tokens, (first_at or ended_at) - started_at, ended_at - started_at)


async def ask_all(base_url: str, api_key: str, max_tokens: int) -> list[str]:
    """Asks all models each question at the same time, prints the answers, and returns the models."""
    # A proxy that the environment names must not be used for a local server.
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client) as client:
        models = [model.id async for model in client.models.list()]
        for question in QUESTIONS:
            answers = await asyncio.gather(*(ask(client, model, question, max_tokens) for model in models))
            say(f"\n> {question}\n\n{side_by_side(models, answers)}")
    return models


def side_by_side(models: list[str], answers: list[Answer], width: int | None = None) -> str:
    """Formats the answers as columns of equal width that fill the terminal."""
    width = width or shutil.get_terminal_size((120, 24)).columns
    column = max(MIN_COLUMN_WIDTH, (width - 3 * (len(models) - 1)) // len(models))
    rule = ["-" * column]
    columns = [
        [*wrap(model, column), *rule, *wrap(answer.text or "(nothing)", column)]
        for model, answer in zip(models, answers, strict=True)
    ]
    speeds = [wrap(answer.speed, column) for answer in answers]
    return "\n".join([*rows(columns, column), "", *rows(speeds, column)])


def wrap(text: str, column: int) -> list[str]:
    """Wraps text into lines of at most `column` characters; keeps its line breaks."""
    return [piece for line in text.splitlines() for piece in textwrap.wrap(line, column) or [""]]


def rows(columns: list[list[str]], column: int) -> list[str]:
    """Joins columns of text line by line."""
    lines = itertools.zip_longest(*columns, fillvalue="")
    return [" | ".join(cell.ljust(column) for cell in line).rstrip() for line in lines]


def next_steps(base_url: str, model: str) -> str:
    """Returns example requests for the shell and for Python."""
    message = '{"role": "user", "content": "How do I make a cup of tea?"}'
    return f"""
Try next:

  curl {base_url}/chat/completions -H "Content-Type: application/json" \\
    -d '{{"model": "{model}", "messages": [{message}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{base_url}", api_key="none")
  print(client.chat.completions.create(model="{model}", messages=[{message}]))
"""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Asks all questions; returns exit code 1 if a request fails."""
    parser = argparse.ArgumentParser(prog="python -m demo.ask", description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:23333/v1", help="[default: %(default)s]")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--max-tokens", type=int, default=64, help="[default: %(default)s]")
    args = parser.parse_args(arguments)
    try:
        models = asyncio.run(ask_all(args.base_url, args.api_key, args.max_tokens))
    except openai.OpenAIError as error:
        sys.stderr.write(f"demo.ask: {args.base_url}: {error}\n")
        return 1
    say(next_steps(args.base_url, models[-1] if len(models) == 1 else models[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
