"""Variables of the environment: whatever they hold, they are used as meant, or one line says why not."""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import unhurried
from refusals import refused_in_one_line_if_at_all

from safetyheads.cli import show
from safetyheads.errors import InputError
from safetyheads.judges.endpoint import ADDRESSES, SETTING_PREFIX, EndpointJudge, EndpointSettings, endpoint_judge
from safetyheads.model import loading
from safetyheads.prompts.files import cache_directory
from safetyheads.runs.shards import Shard
from safetyheads.runs.start import silence_libraries

ODD = [
    "",
    " ",
    "0",
    "1",
    "2",
    "-1",
    "1.5",
    "nan",
    "inf",
    "1e308",
    "none",
    "9" * 4300,
    "9" * 5000,
    "\u0661",
    "a\nb",
    "\udcff",
]
ODD += ["http://127.0.0.1:9/v1", "http://[::", "file:///etc/passwd", "http://a b", "\x1b[31m", "max_tokens", "model"]
TEXTS = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
ARRAYS = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
NUMBERS = st.sampled_from(["0", "1", "2", "3", "9" * 4300, "-1", " 1", "x"]) | TEXTS
SETTINGS = [f"{SETTING_PREFIX}{name.upper()}" for name in EndpointSettings.__dataclass_fields__]
JUDGES = st.dictionaries(st.sampled_from([*SETTINGS, f"{SETTING_PREFIX}NOPE", *ADDRESSES[0]]), TEXTS, max_size=3)


@settings(unhurried, max_examples=100)
@given(st.dictionaries(st.sampled_from([*ARRAYS, "RANK", "WORLD_SIZE"]), NUMBERS))
@example(dict.fromkeys(ARRAYS[:3], "9" * 4300))
def test_any_job_array_is_taken_or_refused_in_one_line(environment):
    refused_in_one_line_if_at_all(lambda: Shard.parse("env", environment=environment))


@settings(unhurried, max_examples=60)
@given(JUDGES)
@example({f"{SETTING_PREFIX}TOKEN_FIELD": "model"})
def test_any_setting_of_an_endpoint_is_taken_or_refused_in_one_line(environment):
    address = dict(zip(ADDRESSES[0], ("http://127.0.0.1:9/v1", "key"), strict=True))
    # A client takes a third of a second to make.
    with patch.dict(os.environ, address | environment), patch.object(EndpointJudge, "_client"):
        refused_in_one_line_if_at_all(lambda: endpoint_judge("a-model"))


def test_the_number_of_tokens_takes_no_other_fields_place():
    for name in ("model", "messages", "", "max tokens"):
        with pytest.raises(InputError, match="number of tokens"):
            EndpointSettings(token_field=name)


@pytest.mark.parametrize(
    "environment",
    [{"ALL_PROXY": "socks9://x"}, {"HTTPS_PROXY": "http://[::"}, {"HF_TOKEN": "\u00e9"}, {"SSL_CERT_FILE": "/nowhere"}],
    ids=lambda environment: next(iter(environment)),
)
def test_a_proxy_or_token_that_is_none_is_told_as_a_hub_that_cannot_be_reached(environment, monkeypatch):
    import huggingface_hub

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    huggingface_hub.close_session()  # it would keep the client of another environment
    with pytest.raises(InputError, match="the hub cannot be reached"):
        loading.look_at_hub("nobody/nothing")
    huggingface_hub.close_session()


def test_a_setting_that_the_hubs_library_cannot_read_is_refused(monkeypatch):
    class Unreadable:
        def find_spec(self, name, *_):
            if name == "transformers":
                raise ValueError("invalid literal for int() with base 10: 'x'")

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Unreadable(), *sys.meta_path])
    with pytest.raises(InputError, match="setting of the hub that cannot be read: invalid literal"):
        silence_libraries()


def test_a_blank_folder_of_downloads_is_none(monkeypatch):
    usual = cache_directory() if "SAFETYHEADS_CACHE" not in os.environ else None
    monkeypatch.setenv("SAFETYHEADS_CACHE", " ")
    assert cache_directory() != Path(" ")
    assert usual is None or cache_directory() == usual


@pytest.mark.parametrize(("columns", "width"), [("0", 140), ("000", 140), (None, 140), ("99", 99), ("x", 80)])
def test_tables_are_seen_at_any_width(monkeypatch, columns, width):
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert show.stdout().width == width
