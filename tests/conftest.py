"""Shared fixtures: the shipped folders, a tiny random SDXL, one thread, no network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, trainers
from trainkit import digests


@pytest.hookimpl(tryfirst=True)  # before the test's fixtures, which may start trainers too
def pytest_runtest_setup(item: pytest.Item) -> None:
    trainers.may_start = item.get_closest_marker("trains") is not None


@pytest.fixture(scope="session", autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests learn of files is not remembered in the user's cache folder."""
    folder = tmp_path_factory.mktemp("remembered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "cache_folder", lambda: folder)
        yield


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector passes it by, here and in forked children."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def assets() -> Path:
    return ROOT / "assets"


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL-layout folder, ε-prediction; built once a session."""
    from tests.support.tiny_models import build_tiny_sdxl

    return build_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random folder in SD 1.x's layout, ε-prediction; built once a session."""
    from tests.support.tiny_models import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in SD 2.x's layout, v-prediction."""
    from tests.support.tiny_models import build_tiny_sd

    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd2", version=2)
