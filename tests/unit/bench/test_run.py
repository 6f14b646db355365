"""`scripts/bench` knows whether the workers of this machine compile."""

import pytest

from bench import run


@pytest.mark.parametrize(
    ("environ", "compiles"),
    [({}, True), ({"LORELAY_COMPILE": "kernels"}, True), ({"LORELAY_COMPILE": "off"}, False)],
)
def test_the_marks_are_those_of_a_machine_without_a_compiler_where_it_is_left_out(
    environ: dict[str, str], compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert run.has_compiler(environ) == compiles


def test_the_marks_are_those_of_a_machine_without_a_compiler_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not run.has_compiler({})


def test_who_measures_another_server_learns_what_it_is_compared_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "demo_model", lambda: "/demo")
    monkeypatch.setattr(run, "_measure", lambda *_: [])
    monkeypatch.setattr(run, "_write", lambda *_: None)
    place = ["--base-url", "http://127.0.0.1:9", "--models", "m"]
    assert run.main(place) == 0
    assert "F is measured with the demo model on cpu" in capsys.readouterr().err
    assert run.main([*place, "--model", "/mine", "--device", "cuda"]) == 0
    assert not capsys.readouterr().err
