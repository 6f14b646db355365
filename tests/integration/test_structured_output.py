"""Answers with a form through OpenAI's client; alone, the tiny model's letters have no form at all."""

import json
import re
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.deployment import Deployment

MESSAGES = [{"role": "user", "content": "hi"}]


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: Annotated[int, Field(ge=10, le=99)]
    tame: bool | None
    toys: Annotated[list[Literal["ball", "mouse"]], Field(max_length=3)]


def test_the_official_client_parses_every_answer_as_its_pydantic_model(served: Deployment) -> None:
    client = served.client()
    for model in ("tiny", "a"):
        reply = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Pet, max_tokens=200, n=2
        )
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Pet)


def test_a_stream_of_chunks_is_the_same_json(served: Deployment) -> None:
    with served.client().chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Pet, max_tokens=200
    ) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Pet)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_grammar": 'start: "a" ("b" | "c"){4}'}, "a[bc]{4}"),
    ],
    ids=str,
)
def test_vllms_fields_bind_the_answer_too(served: Deployment, form: dict[str, object], pattern: str) -> None:
    reply = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=40, extra_body=form
    )
    assert re.fullmatch(pattern, reply.choices[0].message.content)
    assert reply.choices[0].finish_reason == "stop"


def test_json_that_is_cut_by_max_tokens_says_so(served: Deployment) -> None:
    schema = {"type": "string", "minLength": 50}
    reply = served.client().chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, extra_body={"guided_json": schema}
    )
    assert reply.choices[0].message.content.startswith('"')
    assert reply.choices[0].finish_reason == "length"


def test_a_schema_that_cant_be_enforced_is_refused_before_it_is_queued(served: Deployment) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    error = json.loads(caught.value.response.text)["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "uniqueItems" in error["message"]
