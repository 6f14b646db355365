"""Chat templates of adapters, in a process that ends those that take too much."""

import os
from collections.abc import Iterator

import psutil
import pytest
from jinja2 import TemplateError

from shared.errors import InvalidRequest, ServerBusy
from shared.messages import NO_INPUTS
from worker.model import limited_process_main
from worker.model.chat_template import ChatTemplate
from worker.model.limited_process import PAUSE_S, LimitedProcess
from worker.model.marked_template import LimitExceeded, NotNow, render

ECHO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NESTED = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
LARGE = "{% set a = namespace(t='x' * 1000) %}{% for i in range(40) %}{% set a.t = a.t + a.t %}{% endfor %}"
EVIL = "{% if 'evil' in messages[0].content %}" + NESTED + "{% endif %}" + ECHO


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def shortened() -> Iterator[None]:
    """Limits of one second of the processor's time, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(limited_process_main.LIMIT_VARIABLE, "0.3")
        yield


@pytest.fixture(scope="module")
def templates(shortened: None) -> Iterator[LimitedProcess]:
    limited = LimitedProcess(Clock())
    yield limited
    limited.close()


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_template_renders_as_in_the_worker_itself(templates: LimitedProcess) -> None:
    for text in ("hi", "", "é\ud800\0✅", "a" * 1_000_000):
        client = {"messages": chat(text), "tools": None}
        templates.check(ECHO)
        assert templates.render(ECHO, {"bos": "<s>"}, client) == render(ECHO, {"bos": "<s>"}, client)


def test_an_error_of_a_template_has_its_reason(templates: LimitedProcess) -> None:
    with pytest.raises(TemplateError, match="no such role"):
        templates.render("{{ raise_exception('no such role') }}", {}, {})
    with pytest.raises(RuntimeError, match="division by zero"):
        templates.render("{{ 1 / 0 }}", {}, {})
    with pytest.raises(TemplateError, match="tag"):
        templates.check("{% nothing %}")
    with pytest.raises(RuntimeError, match="recursion"):
        templates.render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, {})


@pytest.mark.parametrize("source", [NESTED, LARGE, "{{ 'x' * 10 ** 10 }}", "{{ 'x' * 99999999 }}" * 2])
def test_a_template_that_takes_too_much_is_ended_and_the_next_one_is_rendered(
    source: str, templates: LimitedProcess
) -> None:
    with pytest.raises(LimitExceeded, match=r"longer than|memory"):
        templates.render(source, {}, {"messages": []})
    assert templates.render(ECHO, {}, {"messages": chat("hi")}).text == "<user>hi"


@pytest.mark.parametrize("source", ["{% if 1 %}" * 50_000, "{{ " + "(" * 50_000, "{{ 1" + " + 1" * 500_000])
def test_compiling_a_template_is_limited_too(source: str, templates: LimitedProcess) -> None:
    with pytest.raises((LimitExceeded, TemplateError)):
        templates.check(source)
    assert templates.render(ECHO, {}, {"messages": chat("hi")}).text == "<user>hi"


def test_a_chat_that_takes_too_much_pauses_its_template_only_for_the_tenant_that_sent_it(
    shortened: None,
) -> None:
    clock = Clock()
    templates = LimitedProcess(clock)
    template, other_template = (ChatTemplate(source, {}, templates) for source in (EVIL, "{# #}" + EVIL))
    with pytest.raises(InvalidRequest, match="longer than"):
        template.render(chat("evil"), NO_INPUTS, "alice")
    with pytest.raises(ServerBusy, match="try again later"):
        template.render(chat("hi"), NO_INPUTS, "alice")
    assert template.render(chat("hi"), NO_INPUTS, "bob").text == "<user>hi"
    assert other_template.render(chat("hi"), NO_INPUTS, "alice").text == "<user>hi"
    with pytest.raises(InvalidRequest, match="longer than"):
        template.render(chat("evil"), NO_INPUTS, "bob")
    clock.now = PAUSE_S
    assert template.render(chat("hi"), NO_INPUTS, "alice").text == "<user>hi"
    templates.close()


def test_a_template_that_takes_too_much_for_every_chat_is_refused(templates: LimitedProcess) -> None:
    with pytest.raises(LimitExceeded, match="longer than"):
        ChatTemplate(NESTED, {}, templates)


def test_if_the_kernel_kills_the_process_the_next_chat_is_not_to_blame_and_gets_no_answer_of_another(
    shortened: None,
) -> None:
    others = psutil.Process().children(recursive=True)
    templates = LimitedProcess(Clock())
    template = ChatTemplate(ECHO, {}, templates)
    started = [process for process in psutil.Process().children(recursive=True) if process not in others]
    [child] = [process for process in started if process.ppid() != os.getpid()]
    child.kill()
    with pytest.raises(ServerBusy, match="does not answer"):
        template.render(chat("hi"), NO_INPUTS, "alice")
    assert [template.render(chat(text), NO_INPUTS, "bob").text for text in "ab"] == ["<user>a", "<user>b"]
    templates.close()


def test_if_no_process_can_be_started_the_chat_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(NotNow, match="does not answer"):
        LimitedProcess(Clock()).render(ECHO, {}, {"messages": chat("hi")})


def test_if_the_whole_process_ends_another_one_is_started(shortened: None) -> None:
    templates = LimitedProcess(Clock())
    assert templates.render("a", {}, {}).text == "a"
    templates.close()
    assert templates.render("a", {}, {}).text == "a"
    templates.close()
