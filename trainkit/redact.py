"""Secrets out of everything that leaves the process: records, cards, logs, messages, trackers.

A secret is known in three ways: by its value, which a flag or a variable of the environment gives; by its shape, as the
services that issue tokens make them; by its place, behind a name such as api_key or in a URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

REDACTED = "***"
SHORTEST = 4  # characters of a value that is looked for: a shorter one stands in half of all words
SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")  # of a variable
SURE_NAME = re.compile(r"(HF|HUGGING_FACE_HUB|HUB)_TOKEN$|WANDB_API_KEY$")  # whose value is one, however short
UNSURE_LENGTH = 8  # characters of a value whose variable is only named as a secret's

SHAPES = (  # of tokens, by those who issue them
    r"hf_[A-Za-z0-9]{8,}", r"api_org_[A-Za-z0-9]{16,}",  # Hugging Face
    r"gh[a-z]_[A-Za-z0-9]{16,}", r"github_pat_\w{16,}",  # GitHub
    r"gl[a-z]{2,5}-[\w-]{16,}",  # GitLab: personal, deploy, runner and other tokens
    r"sk-[\w-]{16,}", r"[sr]k_(?:live|test)_\w{16,}",  # OpenAI, Anthropic and others; Stripe
    r"(?:AKIA|ASIA)[0-9A-Z]{16}", r"AIza[\w-]{30,}", r"ya29\.[\w-]{16,}",  # AWS; Google
    r"xox[a-z]-[\w-]{10,}", r"xapp-[\w-]{10,}",  # Slack
    r"nvapi-[\w-]{16,}", r"gsk_[A-Za-z0-9]{16,}", r"dckr_pat_[\w-]{16,}", r"comfyui-[0-9a-f]{32,}",
    r"wandb_v\d_[\w-]{16,}", r"r8_[A-Za-z0-9]{20,}", r"npm_[A-Za-z0-9]{20,}", r"pypi-[\w-]{16,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+",  # JSON web tokens
)
_KEY = r"(?:api|access|auth|private|secret|client|hub)[_-]?(?:key|token|secret)|passwd|password"
_KEYED = rf"{_KEY}|token|secret|wandb|wandb login|\bkey"  # said before a number that may be one
RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (rf"(?<![A-Za-z0-9])(?:{'|'.join(SHAPES)})", REDACTED),
    (r"(?<=://)[^/\s?#\"'<>]+(?=@)", REDACTED),  # https://USER:PASSWORD@host, https://TOKEN@host
    (r"(?i)([?&;][\w.-]*(?:token|key|secret|sig|signature|password|passwd|credential|auth)=)[^&\s#'\"<>]+",
     rf"\1{REDACTED}"),  # ?token=..., and what signs a link
    (r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?\w+\s+)[^\s\"',]+", rf"\1{REDACTED}"),
    (r"(?i)(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{12,}", rf"\1{REDACTED}"),
    (rf"(?i)((?:{_KEY})(?:=|[\"']\s*[:=]\s*)[\"']?)[^\s\"',;&]{{4,}}", rf"\1{REDACTED}"),
    (rf"(?i)((?:{_KEY}):\s*)(?=\S*\d)[\w.~+/=-]{{16,}}", rf"\1{REDACTED}"),  # x-api-key: VALUE, a header
    (rf"(?i)((?:{_KEYED})[\"']?\s*[:=\s]\s*[\"']?)[0-9a-f]{{32,}}(?![0-9a-z])", rf"\1{REDACTED}"),  # W&B: 40
))


def redact(text: str, known: Iterable[str] = ()) -> str:
    """`text` without secrets: those in `known`, those in the environment, and what looks or stands like one."""
    for value in (*known, *environment_secrets()):
        if len(value) >= SHORTEST:
            text = text.replace(value, REDACTED)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text


def environment_secrets() -> list[str]:
    """Values of those variables of the environment whose names say that they are secret."""
    named = [(name, os.environ[name]) for name in os.environ if SECRET_NAME.search(name)]
    return [value for name, value in named if SURE_NAME.search(name) or len(value) >= UNSURE_LENGTH]
