"""Secrets are masked in everything that leaves the process, and other words are left alone."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.command_lines import read
from trainkit.errors import LineFormatter, Problem, UserError
from trainkit.options.config_text import config_text
from trainkit.redact import REDACTED, redact
from trainkit.runtime.record import RunRecord, redact_json

LETTERS, HEX = "aZ3" * 14, "0a1b2c3d4e" * 4
TOKENS = {
    "Hugging Face": "hf_" + LETTERS, "GitHub, classic": "ghp_" + LETTERS, "GitHub, OAuth": "gho_" + LETTERS,
    "GitHub, server": "ghs_" + LETTERS, "GitHub, fine-grained": "github_pat_11ABCDEFG0_" + LETTERS,
    "GitLab": "glpat-AbCdEf-0123456789xy", "GitLab, deploy": "gldt-AbCdEf0123456789_xy",
    "OpenAI": "sk-proj-" + LETTERS, "Anthropic": "sk-ant-api03-" + LETTERS, "Stripe": "sk_live_" + LETTERS,
    "AWS": "AKIAABCDEFGHIJKLMNOP", "AWS, temporary": "ASIAABCDEFGHIJKLMNOP", "Google": "AIzaSy" + LETTERS,
    "Slack": "xoxb-123456789012-abcdefABCDEF", "Slack, user": "xoxp-123456789012-abcdefABCDEF",
    "W&B, new": "wandb_v1_" + LETTERS, "JWT": f"eyJhbGciOi{HEX}.eyJzdWIi{HEX}.c2ln{HEX}",
    "NVIDIA": "nvapi-" + LETTERS, "Groq": "gsk_" + LETTERS, "Docker": "dckr_pat_" + LETTERS, "Comfy": "comfyui-" + HEX,
    "Replicate": "r8_" + LETTERS, "npm": "npm_" + LETTERS, "PyPI": "pypi-AgEIcHlwaS5vcmc" + LETTERS,
}
PLACES = {  # a secret of no shape of its own, known by where it stands
    "userinfo": "https://S3cret@host.example/x", "with a user": "https://bob:S3cret@host.example/x",
    "an @ in it": "https://bob:p@S3cret@host.example/x", "git": "git+https://oauth2:S3cret@gitlab.com/a/b.git",
    "query": "https://civitai.com/api/download/1?type=Model&token=S3cret&x=1", "first": "http://h/?token=S3cret",
    "signed": "https://b.s3.amazonaws.com/k?X-Amz-Signature=S3cret", "Azure": "https://a.windows.net/c?sig=S3cret",
    "api_key": "https://h/x?api_key=S3cret#top", "header": "Authorization: Bearer S3cret",
    "key header": "X-Api-Key: 0123456789S3cret", "header of a token": "private-token: abcdefgh1234S3cret",
    "basic": "{'Authorization': 'Basic S3cret'}", "assignment": "API_KEY=S3cret", "json": '{"password": "S3cret"}',
}
KEYED = ("WANDB_API_KEY={}", "wandb login {}", '{{"api_key": "{}"}}', "wandb: {}", "key: {}", "token {}")
HARMLESS = (
    "a photo of TOK dog, secret garden, key light", "git@github.com:owner/name", "mail me@example.org",
    "https://example.org/a@b?x=1", "stabilityai/stable-diffusion-xl-base-1.0", "bearer of good news", "task-sk-01",
    "the access token: see the page of the Hub", "api_key: none",
    f"--revision={HEX}", f"sha256 {HEX}{HEX}", "token=TOK", "--token_abstraction=TOK", "hf_hub", "guidance token: 1",
)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("around", ["{}", "in {} here", "'{}'", "x={},", "https://h/{}", "https://{}@h/", "_{}"])
def test_a_token_is_known_by_its_shape(token, around):
    masked = redact(around.format(token))
    assert REDACTED in masked and token not in masked and LETTERS not in masked


@pytest.mark.parametrize("text", PLACES.values(), ids=PLACES)
def test_a_secret_is_known_by_its_place(text):
    assert REDACTED in redact(text) and "S3cret" not in redact(text)


@pytest.mark.parametrize("text", KEYED)
def test_a_number_behind_the_name_of_a_key_is_one(text):
    assert HEX not in redact(text.format(HEX))


@pytest.mark.parametrize("text", HARMLESS)
def test_other_words_are_left_alone(text):
    assert redact(text) == text


@given(st.sampled_from([*TOKENS.values()]), st.text(" abc.,:;()[]\"'\n", max_size=8), st.text(" .,;\"'\n", max_size=8))
def test_masking_once_is_masking_for_good(token, before, after):
    masked = redact(f"{before} {token} {after}")
    assert token not in masked and redact(masked) == masked


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "CIVITAI_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD",
                                  "LORA_HUB_TOKEN", "GITHUB_TOKEN", "COMET_API_KEY"])
def test_a_variable_named_as_a_secret_is_one(monkeypatch, name):
    monkeypatch.setenv(name, "abra-cadabra-42")
    assert redact("was abra-cadabra-42") == f"was {REDACTED}"


def test_json_is_masked_in_values_keys_and_behind_names():
    token = TOKENS["GitHub, classic"]
    data = {"list": [token, {"deep": f"x {token}"}], token: 1, "api_key": "short", "token_abstraction": "TOK", "n": 2}
    masked = redact_json(data)
    assert token not in json.dumps(masked) and masked["api_key"] == REDACTED
    assert masked["token_abstraction"] == "TOK" and masked["n"] == 2


# -- where it is used -------------------------------------------------------------------------------------------------


SECRET_URL = "https://S3cretS3cret@host/model"


def test_messages_and_logs_hold_no_secret():
    problem = Problem(f"cannot read {SECRET_URL}", SECRET_URL, TOKENS["GitLab"], f"try {SECRET_URL}")
    told = UserError(problem).report() + f"{UserError(problem)}"
    record = logging.LogRecord("x", logging.INFO, "x", 1, "from %s with %s", (SECRET_URL, "odd-shape"), None)
    told += LineFormatter(None, ["odd-shape"]).format(record)
    assert "S3cret" not in told and TOKENS["GitLab"] not in told and "odd-shape" not in told


def test_the_record_of_a_run_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["t.py", f"--revision={SECRET_URL}", TOKENS["GitHub, classic"]])
    record = RunRecord(tmp_path, options={"x": {"value": "clean"}})
    record.add(data_set=SECRET_URL, api_key="short")
    text = (tmp_path / "run.json").read_text()
    assert "S3cret" not in text and TOKENS["GitHub, classic"] not in text and "short" not in text


def test_printed_config_names_what_it_does_not_show():
    options = read(f"--revision={TOKENS['GitLab']}")
    text = config_text(options.flags(), options.flat(), options.origins)
    assert TOKENS["GitLab"] not in text and "# revision is set, not shown" in text
