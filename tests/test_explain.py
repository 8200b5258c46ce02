"""The topics of ``normwise explain``: the numbers are the library's, the links lead somewhere."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normwise import cli, explain
from normwise.errors import InputError
from normwise.explain.examples import Ran

ROOT = Path(__file__).parent.parent
EXAMPLES = json.loads((ROOT / "tests" / "data" / "worked_examples.json").read_text())
QUANTIZATION = (ROOT / "docs" / "quantization.md").read_text()
ASKED = {"sum", "momentum", "axes", "scale", "num-features", "state-dict", "flags", "train-eval",
         "order", "which-norm", "small-batches"}  # fmt: skip
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")

every_topic = pytest.mark.parametrize("id_", list(explain.topics()))


@lru_cache
def ran(id_: str) -> Ran:
    return explain.run(explain.topics()[id_])


def assert_prints_as(value: Tensor, printed: Any) -> None:
    expected = torch.tensor(printed, dtype=torch.float64)
    step = torch.maximum(torch.tensor(1e-4), expected.abs() * 2.0**-23)
    assert ((value.double() - expected).abs() / step).max() <= 0.51


def test_the_topics_are_those_asked_for() -> None:
    assert set(explain.topics()) == ASKED


# The pages


@every_topic
def test_every_number_of_a_page_is_what_its_examples_print(id_: str) -> None:
    assert ran(id_).changed == ()
    assert ran(id_).text == explain.topics()[id_].text


@every_topic
def test_a_page_answers_shows_advises_and_names_its_sources(id_: str) -> None:
    text = explain.topics()[id_].text
    answer = text.split("\n\n")[1]
    assert "**" in answer
    assert len(answer) < 500
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads == ["In numbers", "What to do", "Sources"]
    sources = text.partition("## Sources")[2]
    assert "https://" in sources
    assert "PyTorch" in sources or "arxiv.org" in sources


@every_topic
def test_code_fits_a_terminal_of_80_columns(id_: str) -> None:
    lines = "".join(BLOCK.findall(explain.topics()[id_].text)).splitlines()
    assert [line for line in lines if len(line) > 78] == []


@every_topic
def test_links_lead_somewhere(id_: str) -> None:
    # As a page of docs/explain, which is a link to where the topics are.
    targets = LINK.findall(BLOCK.sub("", explain.topics()[id_].text))
    pages = [t for t in targets if not t.startswith("https:")]
    folder = ROOT / "docs" / "explain"
    assert [t for t in pages if not Path(os.path.normpath(folder / t)).exists()] == []


@every_topic
def test_commands_in_a_page_are_those_of_the_command_line(
    id_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, option in re.findall(
        r"`normwise ([a-z]+)( --[a-z-]+)?", explain.topics()[id_].text
    ):
        assert cli.main([command, "--help"]) == 0
        assert option.strip() in capsys.readouterr().out


def test_keywords_mean_one_topic_each() -> None:
    words = [k.casefold() for t in explain.topics().values() for k in (t.id, *t.keywords)]
    assert sorted(set(words)) == sorted(words)


def test_figures_that_a_run_of_minutes_made_are_those_of_its_own_page() -> None:
    rows = re.findall(r"^\| (conv .*?) \|", explain.topics()["order"].text, re.MULTILINE)
    assert len(rows) == 2
    figures = re.findall(r"\d+\.\d+ (?:%|dB)", explain.topics()["order"].text)
    assert len(figures) == 9
    assert [f for f in figures if f not in QUANTIZATION] == []


def test_running_a_page_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    explain.run(explain.topics()["scale"])
    assert torch.equal(torch.get_rng_state(), before)


def test_an_example_that_prints_something_else_is_named() -> None:
    text = "```pycon\n>>> 1 + 1\n3\n>>> 2 + 2\n4\n```\n"
    changed = explain.run(explain.Topic("t", "t", (), text))
    assert changed.changed == ("1 + 1",)
    assert changed.text == text.replace("3", "2")


# The published worked examples come out of the pages


def test_two_images_of_one_channel() -> None:
    names, example = ran("sum").names, EXAMPLES["batch_norm_2d_seeded"]
    assert list(names["x"].shape) == example["shape"]
    assert_prints_as(names["gamma"], example["gamma"])
    assert_prints_as(names["y"], example["y"])
    assert str(example["y"]) in ran("sum").text


def test_one_step_of_batch_norm_1d() -> None:
    names, example = ran("momentum").names, EXAMPLES["batch_norm_1d_affine"]
    assert torch.equal(names["x"], torch.tensor(example["x"]))
    assert_prints_as(names["y"], example["y"])
    assert_prints_as(names["bn"].running_mean, example["running_mean"])
    expected = torch.tensor(example["running_var"])
    # The inputs are printed to 4 decimals, half a digit of which moves the variance by 1e-6 of it.
    torch.testing.assert_close(names["bn"].running_var, expected, rtol=1e-6, atol=0)
    assert names["bn"].num_batches_tracked == example["num_batches_tracked"]
    assert str(example["running_mean"][0]) in ran("momentum").text


def test_one_step_without_parameters() -> None:
    names, example = ran("flags").names, EXAMPLES["batch_norm_1d_plain"]
    assert torch.equal(names["rows"], torch.tensor(example["x"]))
    assert_prints_as(names["y"], example["y"])
    for row in example["y"]:
        assert " ".join(f"{v:8.4f}" for v in row[:5]) + "\n" in ran("flags").text


def test_running_statistics_of_two_batches() -> None:
    names, example = ran("momentum").names, EXAMPLES["running_statistics_two_batches"]
    batches = (names["first"], names["second"])
    assert tuple(batches[0].shape) == (1, 3, 255, 255)
    for count, key in ((1, "after_first"), (2, "after_second")):
        layer = names["after"](*batches[:count])
        for buffer in ("running_mean", "running_var"):
            off = (getattr(layer, buffer) - example[key][buffer]).abs().max()
            assert off <= example[key]["tolerance"]
    wanted = "mean {running_mean}, variance {running_var}".format(**example["after_second"])
    assert f">>> show(after(first, second))\n{wanted}\n" in ran("momentum").text


def test_the_identity_comes_back() -> None:
    names = ran("scale").names
    torch.testing.assert_close(names["layer"](names["images"]), names["images"])


# Finding a topic


@pytest.mark.parametrize(
    ("word", "id_"),
    [
        ("momentum", "momentum"),
        ("Num_Features", "num-features"),
        ("num features", "num-features"),
        ("gamma", "scale"),
        ("γ", "scale"),
        ("softmax", "sum"),
        ("NCHW", "axes"),
        ("axis=-1", "axes"),
        ("GroupNorm", "which-norm"),
        ("drop_last", "small-batches"),
        ("model.eval()", "train-eval"),
        ("why do small batches hurt", "small-batches"),
        ("affine=False", "flags"),
        ("int8", "order"),
    ],
)
def test_a_word_finds_its_topic(word: str, id_: str) -> None:
    assert explain.find(word).id == id_


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("momentun", "normwise explain momentum."),
        ("sofmax", "normwise explain sum."),
        ("standard deviation", "normwise explain scale"),  # words of the text
        ("xyzzy", "normwise explain, for the list."),
        ("", "normwise explain, for the list."),
        ("(", "normwise explain, for the list."),
    ],
)
def test_an_unknown_word_gets_the_nearest_topics(word: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        explain.find(word)
    assert repr(word) in str(caught.value)
    assert near in str(caught.value)


# The command


def test_the_list_names_every_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines() if re.match(r" [a-z]", line)] == list(
        explain.topics()
    )


def test_a_page_in_a_pipe_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "gamma"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "standard scale" in out
    assert "\x1b" not in out
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    assert "keywords" not in out
    assert "https://arxiv.org/abs/1502.03167" in out  # an address that can be copied
    assert "normwise explain flags" in out  # in the place of a link to a page
    assert ".md)" not in out


def test_a_page_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "which", "norm", "--json", "--run"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["id"] == "which-norm"
    assert page["markdown"] == explain.topics()["which-norm"].text
    assert page["changed"] == []
    assert "layer norm" in page["keywords"]
    assert cli.main(["explain", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [topic["id"] for topic in listed] == list(explain.topics())


def test_a_page_whose_numbers_changed_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = explain.Topic("sum", "t", (), "# t\n\n```pycon\n>>> 1 + 1\n3\n```\n")
    monkeypatch.setattr(explain, "find", lambda word: stale)
    assert cli.main(["explain", "sum", "--run"]) == 1
    out = capsys.readouterr().out
    assert re.search(r">>> 1 \+ 1\n ?2\n", out)


def test_an_unknown_topic_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "momentun"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("normwise explain: a topic is one of sum, ")
    assert err.endswith("Try: normwise explain momentum.\n")
