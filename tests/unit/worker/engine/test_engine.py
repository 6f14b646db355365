"""Requests in, events out: how a request ends, and what its events say."""

from collections.abc import Collection
from unittest.mock import patch

import pytest

from shared.errors import from_info
from shared.messages import FinishReason, SamplingParams, StreamEvent, TemplateInputs, Usage
from tests.block_checks import check_blocks
from tests.fakes import AllResident, FakeModel, FakeTokenizer, build_engine, encoded, spell
from tests.streams import make_request
from worker.engine.block_manager import BlockManager
from worker.engine.records import Output
from worker.engine.sequence import OutOfDeviceMemory


class Clock:
    """A clock that stands still until it is set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """An engine on fakes, with a clock to turn."""

    def __init__(self, runner: FakeModel | None = None) -> None:
        self.clock = Clock()
        self.runner = runner or FakeModel()
        self.blocks = BlockManager(32, 4)
        self.engine = build_engine(self.runner, self.blocks, clock=self.clock)

    def add(self, name: str = "r", events: tuple[StreamEvent, ...] = (), **values: object) -> list[Output]:
        sampling = values.pop("sampling", SamplingParams(temperature=0, max_tokens=4))
        text = values.pop("text", "hello")
        alone = values.pop("alone", False)
        request = make_request(
            request_id=name, messages=[{"role": "user", "content": text}], sampling=sampling, **values
        )
        return self.engine.add_request(request, encoded(self.engine, request), events, alone=alone)

    def finish(self) -> dict[str, list[StreamEvent]]:
        """Steps until nothing is left; the events of each request."""
        events: dict[str, list[StreamEvent]] = {}
        while self.engine.has_work:
            for append in self.engine.step():
                events.setdefault(append.request_id, []).append(append.event)
        return events


def test_the_chat_template_learns_whose_chat_it_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTokenizer, "encode_chat", lambda _self, _messages, _inputs, tenant: [len(tenant)])
    assert Bench().engine.encode(make_request(tenant="alice")) == [[5]]


def text_of(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events)


def sampling(**values: object) -> SamplingParams:
    return SamplingParams(temperature=0, **({"max_tokens": 20} | values))


def test_a_request_ends_with_stop_at_the_end_of_sequence_token() -> None:
    bench = Bench(FakeModel(spell("ahoy")))
    assert bench.add(sampling=sampling()) == []
    events = bench.finish()["r"]
    assert text_of(events) == "ahoy"
    assert [event.event_no for event in events] == [0, 1, 2, 3, 4]
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].usage == Usage(prompt_tokens=5, completion_tokens=5)
    assert not any(event.is_terminal for event in events[:-1])


def test_the_events_of_one_sequence_are_the_bytes_that_earlier_releases_read_and_write() -> None:
    bench = Bench(FakeModel(spell("aho")))
    bench.add(sampling=sampling())
    assert [event.encode() for event in bench.finish()["r"]] == [
        b'{"event_no":0,"token_ids":[97],"text":"a"}',
        b'{"event_no":1,"token_ids":[104],"text":"h"}',
        b'{"event_no":2,"token_ids":[111],"text":"o"}',
        b'{"event_no":3,"token_ids":[0],"finish_reason":"stop",'
        b'"usage":{"prompt_tokens":5,"completion_tokens":4,"cached_tokens":0}}',
    ]


def test_only_the_first_event_tells_the_counts_and_only_if_the_request_asks_for_them() -> None:
    bench = Bench(FakeModel(spell("aho")))
    bench.add(sampling=sampling(), continuous_usage=True)
    first, *others = bench.finish()["r"]
    assert first.usage_so_far == Usage(prompt_tokens=5, completion_tokens=1)
    assert not any(event.usage_so_far for event in others)


def test_the_chat_template_gets_the_inputs_of_the_request() -> None:
    bench = Bench(FakeModel(spell("aho")))
    bench.add(sampling=sampling(), template_inputs=TemplateInputs(variables={"mode": "x"}))
    assert bench.finish()["r"][-1].usage == Usage(prompt_tokens=len("modehello"), completion_tokens=4)


def test_a_request_ends_with_length_at_its_token_limit() -> None:
    bench = Bench(FakeModel(spell("ahoy there")))
    bench.add(sampling=sampling(max_tokens=4))
    events = bench.finish()["r"]
    assert (text_of(events), events[-1].finish_reason) == ("ahoy", FinishReason.LENGTH)


def test_without_a_token_limit_a_request_ends_at_the_end_of_the_context() -> None:
    bench = Bench(FakeModel(lambda seq: ord("x"), max_model_len=16))
    bench.add(sampling=sampling(max_tokens=None))
    events = bench.finish()["r"]
    assert (text_of(events), events[-1].finish_reason) == ("x" * 11, FinishReason.LENGTH)


def test_ignore_eos_goes_on_past_the_end_of_sequence_token() -> None:
    bench = Bench(FakeModel(spell("ahoy")))
    bench.add(sampling=sampling(max_tokens=6, ignore_eos=True))
    events = bench.finish()["r"]
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert events[-1].usage.completion_tokens == 6


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    bench = Bench(FakeModel(spell("one STOP two")))
    bench.add(sampling=sampling(stop=("STOP",)))
    events = bench.finish()["r"]
    assert (text_of(events), events[-1].finish_reason) == ("one ", FinishReason.STOP)


def test_text_held_back_for_a_stop_string_is_released_at_the_end() -> None:
    bench = Bench(FakeModel(spell("one STO")))
    bench.add(sampling=sampling(stop=("STOP",)))
    assert text_of(bench.finish()["r"]) == "one STO"


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"), [("<eos>", "hi", 3), ("i<eos>", "h", 3), ("<eos>\n<eos>", "hi", 5)]
)
@pytest.mark.parametrize("num_written", [0, 1, 2])
def test_a_stop_string_with_special_tokens_stops_there_also_after_a_resume(
    stop: str, text: str, num_tokens: int, num_written: int
) -> None:
    params = sampling(ignore_eos=True, stop=(stop,))
    benches = [Bench(FakeModel(spell("hi\0\n"))) for _ in range(2)]
    benches[0].add(sampling=params)
    whole = benches[0].finish()["r"]
    assert (text_of(whole), whole[-1].finish_reason) == (text, FinishReason.STOP)
    assert whole[-1].usage.completion_tokens == num_tokens
    benches[1].add(events=tuple(whole[:num_written]), sampling=params)
    assert text_of([*whole[:num_written], *benches[1].finish()["r"]]) == text


def test_a_special_token_that_no_stop_string_contains_stops_nothing() -> None:
    bench = Bench(FakeModel(spell("hi\0.<e>")))
    bench.add(sampling=sampling(ignore_eos=True, stop=("eos", "."), min_tokens=4))
    assert text_of(bench.finish()["r"]) == "hi.<e>"


def test_min_tokens_keeps_the_end_of_sequence_token_from_ending() -> None:
    bench = Bench(FakeModel(lambda seq: 0 if seq.num_output_tokens in (1, 4) else ord("x")))
    bench.add(sampling=sampling(min_tokens=3))
    assert bench.finish()["r"][-1].usage.completion_tokens == 5


def test_min_tokens_keeps_a_stop_string_from_ending() -> None:
    bench = Bench(FakeModel(spell("a.b.c.d")))
    bench.add(sampling=sampling(min_tokens=3, stop=(".",)))
    assert text_of(bench.finish()["r"]) == "a.b"


def test_requests_of_different_adapters_share_a_batch_and_keep_their_own_text() -> None:
    alone = {}
    for adapter_name in (None, "a", "b"):
        bench = Bench()
        bench.add("r", adapter_name=adapter_name)
        alone[adapter_name] = text_of(bench.finish()["r"])
    bench = Bench()
    for adapter_name in alone:
        bench.add(f"r-{adapter_name}", adapter_name=adapter_name)
    together = bench.finish()
    assert {name: text_of(together[f"r-{name}"]) for name in alone} == alone
    assert len(set(alone.values())) == 3
    assert len(bench.runner.batches[1]) == 3


def test_a_resumed_request_goes_on_where_its_log_ends() -> None:
    whole_bench = Bench()
    whole_bench.add(sampling=sampling(max_tokens=8, stop=("zzz",)))
    whole = whole_bench.finish()["r"]
    for num_written in range(1, len(whole)):
        bench = Bench()
        bench.add(events=tuple(whole[:num_written]), sampling=sampling(max_tokens=8, stop=("zzz",)))
        assert bench.finish()["r"] == whole[num_written:]


def test_a_resumed_request_sends_nothing_again_of_what_min_tokens_let_pass() -> None:
    params = sampling(min_tokens=4, stop=("abSTOP", "c"))
    whole_bench = Bench(FakeModel(spell("xcabd ab")))
    whole_bench.add(sampling=params)
    whole = whole_bench.finish()["r"]
    assert text_of(whole) == "xcabd ab"
    for num_written in range(1, len(whole)):
        bench = Bench(FakeModel(spell("xcabd ab")))
        bench.add(events=tuple(whole[:num_written]), sampling=params)
        assert bench.finish()["r"] == whole[num_written:]


def test_the_usage_tells_how_much_of_a_prompt_was_cached() -> None:
    bench = Bench()
    bench.add("first", text="hello, my friend")
    bench.add("beside", adapter_name="a", text="hello, my friend")
    bench.finish()
    bench.add("again", text="hello, my neighbour")
    bench.add("other", adapter_name="b", text="hello, my neighbour")
    usage = {name: events[-1].usage for name, events in bench.finish().items()}
    assert usage["again"] == Usage(prompt_tokens=19, completion_tokens=4, cached_tokens=8)
    assert usage["other"].cached_tokens == 0
    check_blocks(bench.blocks)


def test_the_usage_of_one_client_does_not_tell_what_another_one_asked() -> None:
    bench = Bench()
    bench.add("alice", text="hello, my friend", tenant="alice")
    bench.finish()
    bench.add("bob", text="hello, my friend", tenant="bob")
    bench.add("again", text="hello, my friend", tenant="alice")
    bench.add("salted", text="hello, my friend", tenant="alice", cache_salt="of one chat")
    usage = {name: events[-1].usage for name, events in bench.finish().items()}
    assert {name: used.cached_tokens for name, used in usage.items() if used} == {
        "bob": 0,
        "again": 12,
        "salted": 0,
    }


def test_the_next_turn_of_a_chat_computes_its_own_tokens_only() -> None:
    bench = Bench(FakeModel(spell("x" * 20)))
    text = "hello"
    for turn in range(4):
        num_batches = len(bench.runner.batches)
        bench.add(f"turn {turn}", text=text, sampling=sampling(max_tokens=6))
        text += text_of(bench.finish()[f"turn {turn}"]) + "and?"
        num_prefilled = sum(batch[0][1] for batch in bench.runner.batches[num_batches:]) - 5
        assert num_prefilled <= 10 + 3, "its last answer and question, and the rest of a block"


def test_a_resumed_request_finds_its_blocks_but_reports_no_cached_tokens() -> None:
    whole_bench, bench = Bench(), Bench()
    whole_bench.add(sampling=sampling(max_tokens=8))
    whole = whole_bench.finish()["r"]
    bench.add(sampling=sampling(max_tokens=8))
    for _ in range(5):
        bench.engine.step()
    bench.engine.drop_request("r")
    bench.add(events=tuple(whole[:5]), sampling=sampling(max_tokens=8))
    num_batches = len(bench.runner.batches)
    assert bench.finish()["r"] == whole[5:]
    assert bench.runner.batches[num_batches] == [("r", 2)]
    assert whole[-1].usage.cached_tokens == 0


def test_a_prompt_over_the_context_is_refused_with_both_numbers() -> None:
    bench = Bench(FakeModel(max_model_len=8))
    (append,) = bench.add(sampling=sampling(max_tokens=4))
    assert append.event.error.code == "context_length_exceeded"
    assert "8 tokens" in append.event.error.message
    assert "5 tokens" in append.event.error.message
    assert not bench.engine.has_work


def test_a_prompt_that_fills_the_context_leaves_no_room_to_answer() -> None:
    bench = Bench(FakeModel(max_model_len=5))
    for min_tokens in (0, 1):
        (append,) = bench.add(sampling=sampling(max_tokens=None, min_tokens=min_tokens))
        assert (append.event.error.code, append.event.error.param) == ("context_length_exceeded", "messages")


def test_more_min_tokens_than_the_context_leaves_are_refused_by_name() -> None:
    bench = Bench(FakeModel(max_model_len=8))
    (append,) = bench.add(sampling=sampling(max_tokens=None, min_tokens=4))
    assert (append.event.error.code, append.event.error.param) == ("context_length_exceeded", "min_tokens")
    assert "8 tokens" in append.event.error.message
    assert "5 tokens" in append.event.error.message
    assert "4 for the completion (min_tokens)" in append.event.error.message


def test_as_many_min_tokens_as_the_context_leaves_are_served() -> None:
    bench = Bench(FakeModel(max_model_len=8))
    assert bench.add(sampling=sampling(max_tokens=None, min_tokens=3)) == []
    assert bench.finish()["r"][-1].usage == Usage(prompt_tokens=5, completion_tokens=3)


def test_what_the_chat_template_refuses_ends_as_an_invalid_request() -> None:
    (append,) = Bench().add(text="unsayable")
    assert (append.event.error.code, append.event.error.param) == ("invalid_request_error", "messages")


def test_an_adapter_that_is_not_loaded_ends_as_an_adapter_error() -> None:
    (append,) = Bench().add(adapter_name="nobody")
    assert "nobody" in str(from_info(append.event.error))
    assert append.event.error.code == "adapter_error"


@pytest.mark.parametrize(
    "versions",
    [{"base_version": "m0"}, {"adapter_version": "a0"}, {"base_version": "m0", "adapter_version": "a1"}],
)
def test_other_weights_than_a_request_was_accepted_for_do_not_answer_it(versions: dict[str, str]) -> None:
    bench = Bench()
    (append,) = bench.add(adapter_name="a", **versions)
    assert append.event.error.code == "adapter_version_gone"
    assert not bench.engine.has_work


def test_the_weights_that_a_request_was_accepted_for_answer_it_and_so_do_any_if_it_names_none() -> None:
    bench = Bench()
    assert bench.add("named", adapter_name="a", base_version="m1", adapter_version="a1") == []
    assert bench.add("of an earlier release", adapter_name="a") == []
    assert bench.finish().keys() == {"named", "of an earlier release"}


@pytest.mark.parametrize(
    "token_ids", [(2**20,), (-1,), (97,) * 300], ids=["beyond the vocabulary", "negative", "too many"]
)
def test_a_log_that_no_worker_could_have_written_ends_its_own_request_only(
    token_ids: tuple[int, ...],
) -> None:
    bench = Bench()
    bench.add("innocent")
    (append,) = bench.add("broken", (StreamEvent(event_no=0, token_ids=token_ids, text="?"),))
    assert (append.event.event_no, append.event.error.code) == (1, "generation_failed")
    assert bench.finish()["innocent"][-1].usage is not None


def test_a_fault_while_a_request_is_taken_in_ends_that_request_only() -> None:
    bench = Bench()
    bench.add("innocent")
    beyond_every_alphabet = (StreamEvent(event_no=0, token_ids=(10**9,), text="?"),)
    bench.runner.vocab_size = 2**40
    (append,) = bench.add("broken", beyond_every_alphabet)
    assert (append.event.event_no, append.event.error.code) == (1, "generation_failed")
    assert bench.finish()["innocent"][-1].usage is not None
    check_blocks(bench.blocks)


def test_an_aborted_request_ends_at_once_and_frees_its_blocks() -> None:
    bench = Bench()
    bench.add("gone")
    bench.add("kept")
    bench.engine.step()
    (append,) = bench.engine.abort_request("gone")
    assert append.event.finish_reason is FinishReason.ABORT
    assert append.event.is_terminal
    assert set(bench.finish()) == {"kept"}
    check_blocks(bench.blocks)
    assert bench.engine.abort_request("gone") == []


def test_a_dropped_request_ends_without_an_event() -> None:
    bench = Bench()
    bench.add()
    bench.engine.step()
    bench.engine.drop_request("r")
    assert bench.finish() == {}
    check_blocks(bench.blocks)


def test_a_request_claimed_again_replaces_the_sequence_of_its_former_claim() -> None:
    bench = Bench()
    bench.add()
    bench.engine.step()
    bench.add()
    assert [event.event_no for event in bench.finish()["r"]] == [0, 1, 2, 3]
    assert bench.blocks.num_free_blocks == 32


def test_a_request_over_its_generation_limit_ends_with_an_error() -> None:
    bench = Bench()
    bench.add("slow", generation_limit_s=10)
    bench.add("free")
    bench.engine.step()
    bench.clock.now_s = 9.9
    assert bench.engine.expire_requests() == []
    bench.clock.now_s = 10.1
    (append,) = bench.engine.expire_requests()
    assert (append.request_id, append.event.error.code) == ("slow", "generation_timeout")
    assert append.event.event_no == 1
    assert set(bench.finish()) == {"free"}


def test_logits_that_give_no_token_fail_their_own_request_only() -> None:
    bench = Bench(FakeModel(lambda seq: None if seq.request_id == "bad" else ord("x")))
    bench.add("bad")
    bench.add("good")
    events = bench.finish()
    assert events["bad"][-1].error.code == "generation_failed"
    assert text_of(events["good"]) == "xxxx"


@pytest.mark.parametrize("ended_by", ["stop", "error"])
def test_the_meta_of_a_finished_request_tells_numbers_and_no_text(ended_by: str) -> None:
    bench = Bench(FakeModel(spell("hi") if ended_by == "stop" else lambda seq: None))
    bench.add(model="a", adapter_name="a", text="secret", sampling=sampling())
    while True:
        (append,) = bench.engine.step()
        if append.event.is_terminal:
            break
    assert append.meta["adapter"] == "a"
    assert append.meta["prompt_tokens"] == 6
    assert append.meta["finish_reason"] == ended_by
    assert "secret" not in str(append.meta)


def test_a_stopped_request_ends_with_an_error_and_its_neighbours_go_on() -> None:
    bench = Bench()
    bench.add("stopped")
    bench.add("kept")
    bench.engine.step()
    (append,) = bench.engine.stop_request("stopped")
    assert append.event.error.code == "generation_stopped"
    assert set(bench.finish()) == {"kept"}
    assert bench.engine.stop_request("stopped") == []


def run_out_of_memory(bench: Bench) -> tuple[str | None, list[Output]]:
    with (
        patch.object(bench.runner, "run", side_effect=OutOfDeviceMemory),
        pytest.raises(OutOfDeviceMemory),
    ):
        bench.engine.step()
    return bench.engine.shed()


def test_the_newest_request_that_ran_makes_room_after_a_step_that_did_not_fit() -> None:
    bench = Bench()
    for name in ("old", "new"):
        bench.add(name, text=name[0] * 56)
    bench.engine.step()
    bench.add("waits", text="w" * 24)
    request_id, appends = run_out_of_memory(bench)
    assert (request_id, appends) == ("new", [])
    assert set(bench.finish()) == {"old", "waits"}
    assert bench.blocks.num_free_blocks == 32


def test_a_request_that_does_not_fit_alone_ends_with_an_error() -> None:
    bench = Bench()
    bench.add()
    request_id, (append,) = run_out_of_memory(bench)
    assert request_id is None
    assert append.event.error.code == "generation_failed"
    assert not bench.engine.has_work


def test_a_request_whose_step_ran_without_the_others_and_did_not_fit_ends_with_an_error_too() -> None:
    bench = Bench()
    bench.add("lone", alone=True)
    bench.add("other")
    bench.engine.run_isolated()
    request_id, (append,) = run_out_of_memory(bench)
    assert (request_id, append.request_id) == (None, "lone")
    assert append.event.error.code == "generation_failed"
    assert set(bench.finish()) == {"other"}


class SlowAdapters(AllResident):
    """A residency whose adapters arrive when the test says so."""

    has_arrived = False

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        return name is None or self.has_arrived


@pytest.mark.parametrize("ended_by", ["stop", "abort", "stopped"])
def test_the_meta_tells_the_times_of_load_prefill_and_decode(ended_by: str) -> None:
    adapters = SlowAdapters()
    bench = Bench(FakeModel(spell("hi"), adapter_cache=adapters))
    bench.add(adapter_name="a", text="longer than a chunk of 16", sampling=sampling())
    bench.add("base", sampling=sampling())
    bench.engine.step()
    bench.clock.now_s = 5
    adapters.has_arrived = True
    bench.engine.step()
    bench.clock.now_s = 7
    outputs = bench.engine.step()
    bench.clock.now_s = 10
    if ended_by == "stop":
        while not (ended := [o for o in outputs if o.request_id == "r" and o.event.is_terminal]):
            outputs = bench.engine.step()
    else:
        engine = bench.engine
        ended = engine.abort_request("r") if ended_by == "abort" else engine.stop_request("r")
    meta = ended[0].meta
    assert (meta["load_s"], meta["prefill_s"], meta["decode_s"]) == (5, 2, 3)


def test_a_request_that_ends_before_it_ran_has_no_times() -> None:
    bench = Bench(FakeModel(adapter_cache=SlowAdapters()))
    bench.add(adapter_name="a")
    bench.engine.step()
    (ended,) = bench.engine.abort_request("r")
    assert (ended.meta["load_s"], ended.meta["prefill_s"], ended.meta["decode_s"]) == (None, None, None)
    bench.engine.step()
