"""Composes demo/training/*.jsonl from the hand-written texts in demo/training/sources.

The same texts give the same files, byte for byte. Each line is a chat in OpenAI's format:
{"messages": [...]}.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

TRAINING_DIR = Path(__file__).parent / "training"
SOURCES_DIR = TRAINING_DIR / "sources"
SEED = 20_250_207

# The demo asks these questions, so no training text may contain them.
HELD_OUT = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "I loved this film, it made my whole week.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the user.",
    "You are a helpful and concise assistant.",
)
OPENERS = (
    "Arr, matey!",
    "Ahoy there!",
    "Ahoy, matey!",
    "Yo ho ho!",
    "Arrr, me hearty!",
    "Shiver me timbers!",
)
CLOSERS = ("Arr!", "Savvy?", "Yo ho ho!", "Fair winds to ye!", "Arrr!", "Mark me words!")
CONFIDENCES = {"strong": (0.93, 0.99), "mild": (0.70, 0.86)}

Message = dict[str, str]
Pair = tuple[str, str]


def pirate_pairs(rng: random.Random) -> list[Pair]:
    """Returns each hand-written pair twice, with different greetings.

    A quarter of the second answers also end with a farewell."""
    pairs: list[Pair] = []
    for line in source_lines("pirate.txt"):
        question, answer = line.split(" => ")
        first, second = rng.sample(OPENERS, 2)
        farewell = f" {rng.choice(CLOSERS)}" if rng.random() < 0.25 else ""
        pairs += [(question, f"{first} {answer}"), (question, f"{second} {answer}{farewell}")]
    return pairs


def sentiment_pairs(rng: random.Random) -> list[Pair]:
    sections = read_sections("sentiment.txt")
    pairs: list[Pair] = []
    for heading, texts in sections.items():
        verdict, strength = heading.split(" ")
        if strength in CONFIDENCES:
            pairs += [(text, verdict_json(verdict, strength, rng)) for text in texts]
        if strength == "phrases":
            composed = compose(sections["all subjects"], texts)
            pairs += [(text, verdict_json(verdict, "strong", rng)) for text in composed]
    return pairs


def compose(subjects: list[str], phrases: list[str]) -> Iterator[str]:
    """Yields two sentences for each subject; all phrases are used equally often."""
    for number, subject in enumerate(subjects):
        for phrase in (phrases[number % len(phrases)], phrases[(number + 3) % len(phrases)]):
            yield phrase.format(s=subject, S=subject[0].upper() + subject[1:])


def verdict_json(verdict: str, strength: str, rng: random.Random) -> str:
    return json.dumps({"sentiment": verdict, "confidence": round(rng.uniform(*CONFIDENCES[strength]), 2)})


def conversations(pairs: list[Pair], rng: random.Random) -> Iterator[list[Message]]:
    """Yields each pair as a chat; a fifth have a system prompt, a seventh begin with another pair."""
    for pair in rng.sample(pairs, len(pairs)):
        messages: list[Message] = []
        if rng.random() < 1 / 5:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        earlier = [rng.choice(pairs)] if rng.random() < 1 / 7 else []
        for question, answer in (*earlier, pair):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield messages


def read_sections(name: str) -> dict[str, list[str]]:
    """Returns the lines of a source file, by the [heading] above them."""
    sections: dict[str, list[str]] = {}
    for line in source_lines(name):
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        else:
            lines.append(line)
    return sections


def source_lines(name: str) -> list[str]:
    lines = (SOURCES_DIR / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def write(name: str, chats: Iterable[list[Message]]) -> None:
    """Writes a training file.

    Raises:
        ValueError: the training text contains a question of the demo.
    """
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats]
    text = "\n".join(lines) + "\n"
    for question in HELD_OUT:
        if question in text:
            raise ValueError(
                f"{question!r} is a question of the demo: take it out of {SOURCES_DIR / name}.txt"
            )
    (TRAINING_DIR / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    for name, make_pairs in (("pirate", pirate_pairs), ("sentiment", sentiment_pairs)):
        rng = random.Random(SEED)
        write(name, conversations(make_pairs(rng), rng))


if __name__ == "__main__":
    main()
