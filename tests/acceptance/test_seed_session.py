"""The session of lmdeploy's LoRA guide, word for word, with our names."""

from collections.abc import Iterator

import httpx
import pytest
from openai.types.chat import ChatCompletion

from tests.acceptance.conftest import ADAPTERS, ServedModel


@pytest.fixture(scope="module")
def served(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("seed")
    with ServedModel(folder, demo_model, "--adapters", f"mylora={ADAPTERS / 'pirate'}") as deployment:
        yield deployment


def test_two_models_are_listed_the_adapter_below_its_base(served: ServedModel) -> None:
    base, adapter = served.client().models.list().data
    assert (base.id, base.parent) == ("SmolLM2-135M-Instruct", None)
    assert (adapter.id, adapter.parent) == ("mylora", "SmolLM2-135M-Instruct")
    assert adapter.root == "mylora", "a path of the host is shown to nobody"


def test_what_curl_sends_gets_the_adapters_answer(served: ServedModel) -> None:
    body = {"model": "mylora", "messages": [{"role": "user", "content": "hi"}]}
    with httpx.Client(trust_env=False, timeout=60) as client:
        reply = client.post(f"{served.api_url}/v1/chat/completions", json=body)
    assert reply.status_code == 200
    answer = reply.json()
    assert set(answer) >= {"id", "object", "created", "model", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("chat.completion", "mylora")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["message"]["role"], choice["finish_reason"]) == (0, "assistant", "stop")
    assert choice["message"]["content"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 1


def test_the_python_snippet_prints_a_chat_completion(served: ServedModel) -> None:
    client = served.client()
    model_name = client.models.list().data[1].id
    response = client.chat.completions.create(
        model=model_name,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": " provide three suggestions about time management"},
        ],
        temperature=0.8,
        top_p=0.8,
    )
    assert isinstance(response, ChatCompletion)
    assert response.model == "mylora"
    assert response.choices[0].message.content
