"""Real `rq worker` processes and a real uvicorn on a tiny model, with the official client."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import redis
from rq import Queue, Worker
from rq.job import Job
from rq.serializers import JSONSerializer

from lorelay.status import read_status
from shared.queue.names import queue_name
from tests.compiled import need_kernels
from tests.deployment import BIN, ROOT, Deployment
from tests.redis_server import RedisServer
from tests.streams import BlockingApi, make_request
from tests.tiny_models import build_adapter, build_model
from tests.waiting import wait_until

MODELS = ("tiny", "a", "b")
Deploy = Callable[..., Deployment]


def ask(client: openai.OpenAI, model: str, prompt: str, max_tokens: int = 24) -> str:
    """The greedy answer, not streamed."""
    messages = [{"role": "user", "content": prompt}]
    reply = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=max_tokens
    )
    assert reply.model == model
    assert reply.usage.completion_tokens == max_tokens
    return reply.choices[0].message.content


def ask_streaming(client: openai.OpenAI, model: str, prompt: str, max_tokens: int = 24) -> str:
    """The greedy answer, put together from its chunks."""
    messages = [{"role": "user", "content": prompt}]
    chunks = list(
        client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_tokens, stream=True
        )
    )
    assert chunks[-1].choices[0].finish_reason == "length"
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.fixture
def rq_queues(connection: redis.Redis) -> Callable[[], dict[str, int]]:
    def depths() -> dict[str, int]:
        return {queue.name: queue.count for queue in Queue.all(connection, serializer=JSONSerializer)}

    return depths


def test_the_base_and_each_adapter_answer_in_their_own_way(served: Deployment) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == list(MODELS)
    answers = {model: ask(client, model, "hi") for model in MODELS}
    assert len(set(answers.values())) == 3
    assert answers == {model: ask_streaming(client, model, "hi") for model in MODELS}


def test_many_fields_of_a_generation_work_together_in_a_body_and_in_a_stream(served: Deployment) -> None:
    client = served.client()
    asked = {
        **{"model": "a", "messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 5},
        **{"max_tokens": 12, "logprobs": True, "top_logprobs": 2, "frequency_penalty": 0.5},
        **{"logit_bias": {"40": -100}, "extra_body": {"min_p": 0.001, "repetition_penalty": 1.1}},
    }
    choices = client.chat.completions.create(**asked).choices
    texts, positions = ["", "", ""], [[], [], []]
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        positions[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in choices]
    for choice, streamed in zip(choices, positions, strict=True):
        # Other prompts in the cache change the last bits of the logits.
        whole = choice.logprobs.content
        assert [position.bytes for position in whole] == [position.bytes for position in streamed]
        assert [one.logprob for one in whole] == pytest.approx([one.logprob for one in streamed])
        assert [len(position.top_logprobs) for position in streamed] == [2] * 12
        written = bytes(byte for position in streamed for byte in position.bytes)
        assert written.decode(errors="replace").startswith(choice.message.content)
    stopped = client.chat.completions.create(
        **(asked | {"n": 1, "extra_body": {"stop_token_ids": list(range(4, 260))}})
    )
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(**(asked | {"logit_bias": {"99999": 1}}))


def test_a_message_is_continued_and_each_chunk_counts_the_tokens(served: Deployment) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    usages = [
        [
            chunk.usage
            for chunk in served.client().chat.completions.create(
                model="tiny",
                messages=messages,
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
                extra_body={"ignore_eos": True, "continue_final_message": continues},
            )
        ]
        for continues in (False, True)
    ]
    for counts in usages:
        assert all(usage.prompt_tokens == counts[-1].prompt_tokens for usage in counts)
        completion_tokens = [usage.completion_tokens for usage in counts]
        assert completion_tokens == sorted(completion_tokens)
        assert (completion_tokens[0], completion_tokens[-1]) == (1, 4)
    anew, continued = (counts[-1].prompt_tokens for counts in usages)
    assert continued < anew


def test_a_completion_continues_texts_and_tokens_without_a_chat_template(served: Deployment) -> None:
    client = served.client()
    options = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    texts = ["Once upon", "a time"]
    alone = [client.completions.create(model="a", prompt=text, **options) for text in texts]
    together = client.completions.create(model="a", prompt=texts, echo=True, **options)
    assert [choice.text for choice in together.choices] == [
        text + answer.choices[0].text for text, answer in zip(texts, alone, strict=True)
    ]
    assert together.usage.completion_tokens == 2 * 16
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(model="a", prompt=texts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [answer.choices[0].text for answer in alone]
    with pytest.raises(openai.BadRequestError, match="a token id that the model lacks") as caught:
        client.completions.create(model="a", prompt=[5, 10**6])
    assert caught.value.param == "prompt"


def test_adapters_that_take_turns_on_one_slot_answer_as_when_each_has_its_own(
    served: Deployment, deploy: Deploy, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    client = served.client()
    work = [(MODELS[i % 3], f"turn {i}") for i in range(12)]
    alone = [ask(client, model, prompt) for model, prompt in work]
    gone = shutil.copytree(tiny_adapters["a"], tmp_path / "gone")
    adapters = " ".join(f"{name}={path}" for name, path in {**tiny_adapters, "gone": gone}.items())
    deployment = deploy(
        adapters=adapters, max_resident_adapters="1", max_cached_adapter_bytes="1", max_wait_s="0.2"
    )
    deployment.start_worker()
    deployment.start_api()
    client = deployment.client(max_retries=0)
    shutil.rmtree(gone)
    with ThreadPoolExecutor(16) as pool:
        broken = [pool.submit(ask, client, "gone", "hi") for _ in range(2)]
        assert list(pool.map(lambda item: ask_streaming(client, *item), work)) == alone
        for answer in broken:
            with pytest.raises(openai.InternalServerError, match="'gone' can't be loaded") as caught:
                answer.result()
            assert caught.value.code == "adapter_error"


def test_32_streams_over_base_and_adapters_get_what_each_gets_alone_from_one_worker_and_from_two(
    served: Deployment,
) -> None:
    client = served.client()
    work = [(MODELS[i % 3], f"question {i}") for i in range(32)]
    alone = [ask(client, model, prompt) for model, prompt in work]
    with ThreadPoolExecutor(32) as pool:

        def ask_together() -> list[str]:
            return list(pool.map(lambda item: ask_streaming(client, *item), work))

        assert ask_together() == alone
        second = served.start_worker()
        assert ask_together() == alone
    assert second.stop() == 0


@pytest.mark.timeout(300)
def test_a_worker_that_has_compiled_its_forward_pass_answers_as_before(
    served: Deployment, connection: redis.Redis, deploy: Deploy
) -> None:
    need_kernels()
    plain = served.client()
    work = [(MODELS[i % 3], f"compiled {i}") for i in range(6)]
    answers = [ask(plain, model, prompt) for model, prompt in work]
    deployment = deploy(compile="graph")
    worker = deployment.start_worker()
    deployment.start_api()
    # The compiler has the lowest priority, so other tests may take most of its time.
    worker.wait_for("forward pass: compiled", 240)
    client = deployment.client()
    wait_until(lambda: [found.forward for found in read_status(connection).workers] == ["compiled"])
    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(lambda item: ask_streaming(client, *item), work)) == answers
    assert "not compiled" not in worker.output
    assert worker.stop() == 0


def test_a_seeded_sample_is_the_same_again_and_another_seed_differs(served: Deployment) -> None:
    client = served.client()

    def sample(seed: int) -> str:
        reply = client.chat.completions.create(
            model="a",
            messages=[{"role": "user", "content": "hi"}],
            temperature=0.8,
            top_p=0.8,
            max_tokens=24,
            seed=seed,
        )
        return reply.choices[0].message.content

    assert sample(1) == sample(1) != sample(2)


def test_rq_shows_the_worker_busy_and_counts_right_while_it_works(
    deploy: Deploy, connection: redis.Redis
) -> None:
    deployment = deploy(step_delay_s="0.05")  # so that the request doesn't end before it is looked at
    deployment.start_worker()
    deployment.start_api()
    client = deployment.client()
    stream = client.chat.completions.create(
        model="b",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    (worker,) = Worker.all(connection=connection, serializer=JSONSerializer)
    assert worker.get_state() == "busy"
    assert worker.queue_names() == ["tiny", "tiny-a", "tiny-b"]
    (execution,) = worker.get_current_executions()
    job = Job.fetch(execution.job_id, connection, JSONSerializer)
    assert (job.get_status(), job.origin) == ("started", "tiny-b")
    info = subprocess.run(
        [BIN / "rq", "info", "-u", deployment.redis_url, "--raw"], capture_output=True, text=True, check=True
    ).stdout
    assert "busy" in info
    assert "queue tiny-b 0" in info
    stream.close()
    wait_until(lambda: job.get_status() == "canceled", what="the end of the aborted job")
    wait_until(lambda: worker.refresh() or worker.get_state() == "idle", what="an idle worker")


def test_a_worker_given_a_model_name_serves_only_its_queue(
    deploy: Deploy, rq_queues: Callable[[], dict[str, int]]
) -> None:
    with deploy() as deployment:
        deployment.start_worker("a")
        deployment.start_api(queue_time_limit_s="1")
        client = deployment.client()
        assert ask(client, "a", "hi")
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, "tiny", "hi")
        assert refused.value.code == "no_worker"
        assert rq_queues()["tiny"] == 0


def test_a_worker_given_an_unknown_model_refuses_to_start(deploy: Deploy) -> None:
    worker = deploy().start_worker("nobody", wait=False)
    assert worker.wait() == 2
    assert "'nobody', which is no model of this worker: tiny, a, b" in worker.output


def test_a_worker_whose_two_urls_differ_refuses_to_start(deploy: Deploy) -> None:
    worker = deploy().start_worker(wait=False, redis_url="redis://localhost:1")
    assert worker.wait() == 2
    assert "LORELAY_REDIS_URL and rq worker's -u name different servers" in worker.output


@pytest.mark.parametrize("broken", ["missing", "other base", "unknown model"])
def test_what_can_not_be_served_is_refused_at_start_with_path_and_reason(
    deploy: Deploy, tmp_path: Path, tiny_model: Path, broken: str
) -> None:
    path = tmp_path / "broken"
    settings = {"adapters": f"bad={path}"}
    reason = str(path)
    if broken == "other base":
        other = build_model(tmp_path / "other", hidden_size=96)
        build_adapter(path, other)
        reason = "another base"
    elif broken == "unknown model":
        settings = {"model": str(path)}
    worker = deploy(**settings).start_worker(wait=False)
    assert worker.wait(60) == 2
    assert reason in worker.output
    assert str(path) in worker.output
    assert "Traceback" not in worker.output


def test_a_name_registered_with_other_weights_is_refused_at_start(
    deploy: Deploy, tmp_path: Path, tiny_model: Path
) -> None:
    deployment = deploy()
    deployment.start_worker()
    other = build_adapter(tmp_path / "other", tiny_model, seed=7)
    worker = deployment.start_worker(wait=False, adapters=f"a={other}")
    assert worker.wait(60) == 2
    assert "model 'a' is registered as version" in worker.output


def test_options_of_rq_that_make_no_sense_here_are_refused(deploy: Deploy) -> None:
    worker = deploy().start_worker("--with-scheduler", wait=False)
    assert worker.wait() == 1
    assert "LoraWorker does not take --with-scheduler" in worker.output


def test_the_log_level_holds_for_workers_and_their_own_flags_win(deploy: Deploy) -> None:
    deployment = deploy(log_level="WARNING")
    quiet = deployment.start_worker("--burst", wait=False)
    loud = deployment.start_worker("--burst", "--logging_level", "INFO", wait=False)
    assert [quiet.wait(60), loud.wait(60)] == [0, 0]
    assert "serving" not in quiet.output
    assert "KV cache" not in quiet.output
    assert "serving" in loud.output


def test_sigterm_lets_running_streams_finish_and_exits_with_0(deploy: Deploy) -> None:
    deployment = deploy()
    deployment.start_api()
    worker = deployment.start_worker()
    stream = deployment.client().chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=300,
        stream=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert worker.stop() == 0
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert "handed" not in worker.output


def test_a_sigterm_while_loading_is_not_lost(deploy: Deploy) -> None:
    deployment = deploy()
    command = [str(BIN / "rq"), "worker", "-u", deployment.redis_url]
    worker = deployment.start([*command, "-w", "tests.integration.stopped_worker.StoppedWhileLoading"])
    assert worker.wait(60) == 0
    assert "Exception ignored in" in worker.output


def test_a_worker_stopped_while_it_registers_is_not_listed_any_more(
    deploy: Deploy, connection: redis.Redis
) -> None:
    deployment = deploy()
    command = [str(BIN / "rq"), "worker", "-u", deployment.redis_url]
    worker = deployment.start([*command, "-w", "tests.integration.stopped_worker.StoppedWhileRegistering"])
    assert worker.wait(60) == 0
    assert Worker.all(connection) == []


def test_a_second_worker_of_a_name_leaves_the_first_one_listed(
    deploy: Deploy, connection: redis.Redis
) -> None:
    deployment = deploy()
    deployment.start_worker("--name", "twin")
    second = deployment.start_worker("--name", "twin", wait=False)
    assert second.wait(60) == 1
    assert "active worker named 'twin'" in second.output
    assert [worker.name for worker in Worker.all(connection)] == ["twin"]
    assert not connection.hexists("rq:worker:twin", "death")


def test_a_burst_worker_answers_what_waits_and_ends(
    deploy: Deploy, redis_server: RedisServer, connection: redis.Redis
) -> None:
    ids = [BlockingApi(redis_server.url).enqueue(make_request("a")) for _ in range(3)]
    assert deploy().start_worker("--burst").wait(60) == 0
    for request_id in ids:
        assert Job.fetch(request_id, connection, JSONSerializer).get_status() == "finished"


def test_a_stock_worker_says_which_worker_to_start(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    request_id = BlockingApi(redis_server.url).enqueue(make_request())
    command = [str(BIN / "rq"), "worker", "-u", redis_server.url, "-S", "json", "--burst"]
    subprocess.run([*command, queue_name("tiny", None)], cwd=ROOT, check=True, capture_output=True)
    job = Job.fetch(request_id, connection, JSONSerializer)
    assert "start this queue with -w worker.LoraWorker" in job.latest_result().exc_string


def test_the_worker_class_is_imported_without_torch() -> None:
    code = "import sys, worker.engine.engine, worker.lora_worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
