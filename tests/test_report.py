"""report.html: offline, escaped, free of private paths, and drawn from whatever a run left behind."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.support.made_up_run import HOSTILE, STEPS, make_run
from trainkit.report import EMBED_PX, charts, effective_rate, sample_steps, spread, tiles, write_report
from trainkit.report.charts import LEFT, MAX_POINTS, Chart, labels, line_chart, nice_ticks, number, smoothed, thinned
from trainkit.report.facts import RunFacts, public, read_metrics
from trainkit.report.matched import band_charts, band_tables
from trainkit.report.usage import usage


def page(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text = page(make_run(tmp_path / "run"))
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text)
    assert links and all(link.startswith(("data:image/", "samples/")) for link in links)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|<link|<iframe", text)


def test_the_security_policy_allows_exactly_the_styles_and_script_of_the_page(tmp_path):
    text = page(make_run(tmp_path / "run"))
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in inside]
        assert re.findall(rf"{tag}-src 'sha256-([^']*)'", policy) == hashes
    assert " style=" not in text and not re.search(r" on\w+=", text), "inline attributes would be blocked"


def test_hostile_text_stays_text(tmp_path):
    text = page(make_run(tmp_path / "run", instance_prompt=HOSTILE, validation_prompt=HOSTILE, caption_column=HOSTILE))
    assert text.count("<script>") == 1 and "<img src=x" not in text
    assert "{{ 7*7 }}" in text, "not evaluated"
    assert html.escape("<script>alert(1)</script>") in text


def test_private_folders_do_not_appear(tmp_path):
    places = {"config": "/home/anna/secret/settings.toml", "latent_cache_dir": "C:\\anna\\cache"}
    text = page(make_run(tmp_path / "run", **places))
    assert "/home" not in text and "anna" not in text and str(tmp_path) not in text
    assert "--instance_data_dir=icons" in text


@pytest.mark.parametrize("flag, value, shown", [
    ("instance_data_dir", "data/anna/cats", "cats"),
    ("output_dir", "/abs/out/", "out"),
    ("pretrained_model_name_or_path", "stabilityai/sdxl-base-1.0", "stabilityai/sdxl-base-1.0"),
    ("pretrained_model_name_or_path", "/models/base", "base"),
    ("dataset_name", "D:\\anna\\cats", "cats"),
    ("instance_prompt", "a/b", "a/b"),
    ("rank", 4, 4),
])
def test_paths_are_reduced_to_their_last_part_and_hub_names_are_not(flag, value, shown):
    assert public(flag, value) == shown


def test_a_local_folder_that_looks_like_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "anna" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public("pretrained_model_name_or_path", "anna/base") == "base"


def test_a_run_without_metrics_or_samples_still_has_a_report(tmp_path):
    text = page(make_run(tmp_path / "run", metrics=False, samples=()))
    assert "What it learned" not in text and "<polyline" not in text and "Options that were set" in text


def test_metrics_cut_short_by_a_kill_or_not_finite_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr/unet": 1}\n{"step": 2, "loss": null}\n{"step": 3, "lo', "utf-8")
    assert list(read_metrics(path)) == [{"step": 1, "lr/unet": 1}, {"step": 2}]


def test_the_learning_rate_shown_for_prodigy_is_its_step_size(tmp_path):
    run = RunFacts(make_run(tmp_path / "run"))
    assert effective_rate(run, "unet")[-1] == (STEPS, pytest.approx(1e-5 * STEPS))


MATCHED = {"dist_match_gain": 0.3, "dist_match_mode": "combo"}


def heights(chart: Chart) -> tuple[dict[str, float], list[float]]:
    """Where each number of the axis stands, and the neutral line."""
    numbers = re.findall(rf'x="{LEFT - 8}" y="([\d.]+)" text-anchor="end">([^<]*)<', chart.svg)
    ticks = {label: float(y) - 4 for y, label in numbers}
    line = re.search(r'class="neutral" points="([^"]*)"', chart.svg)
    return ticks, [float(point.partition(",")[2]) for point in line[1].split()] if line else []


def test_a_matched_run_shows_u_and_slope_of_each_band_with_the_line_they_should_come_to(tmp_path):
    folder = make_run(tmp_path / "run", **MATCHED)
    drawn = {chart.title: chart for chart in band_charts(RunFacts(folder))}
    assert list(drawn) == ["U, low band", "U, high band", "Slope, low band", "Slope, high band"]
    for title, chart in drawn.items():
        ticks, line = heights(chart)
        assert line == [ticks["0" if title.startswith("U") else "1"]] * 2
        assert 'class="raw"' in chart.svg and title in page(folder)


def test_a_matched_run_shows_means_by_band_and_noise_level_of_its_last_half(tmp_path):
    folder = make_run(tmp_path / "run", **MATCHED)
    low, high = band_tables(RunFacts(folder))
    assert low.name == "low band" and low.lines == (
        ("0.3", "5", "0.1000", "2.00", "0.3000", "0.990"), ("0.9", "5", "0.1000", "2.00", "0.3000", "0.990"),
        ("2.5", "5", "–", "–", "0.3000", "0.990"))
    assert high.name == "high band" and high.lines[0] == ("0.3", "5", "-0.0200", "-0.40", "0.3000", "0.990")
    assert page(folder).count("by noise level</h3>") == 2


def test_a_run_without_matching_has_nothing_of_it(tmp_path):
    run = RunFacts(make_run(tmp_path / "run"))
    assert not band_charts(run) and not band_tables(run)
    assert "wrong in common" not in page(run.folder)


@pytest.mark.parametrize("given, name", [
    ({"dist_match_gain": 0.3, "dist_match_mode": "combo"}, "Loss of both passes"),
    ({"dist_match_gain": 0.3, "dist_match_mode": None}, "Loss of both passes"),
    ({"dist_match": 0.003, "dist_match_mode": None}, "Loss of both passes"),
    ({"dist_match_gain": 0.3, "dist_match_mode": "swap"}, "Loss"),
    ({"dist_match": 0.003, "dist_match_mode": "reuse"}, "Loss"),
])
def test_the_loss_of_a_step_of_two_passes_is_called_that(tmp_path, given, name):
    run = RunFacts(make_run(tmp_path / "run", **given))
    assert charts(run)[0].title == name and tiles(run)[0].label == f"{name}, smoothed"
    assert ("two forward passes" in page(run.folder)) == (name != "Loss")


def test_the_mode_of_a_run_that_matches_nothing_does_not_count(tmp_path):
    run = RunFacts(make_run(tmp_path / "run", dist_match_gain=0.0, dist_match_mode="combo"))
    assert charts(run)[0].title == "Loss"


def test_the_pace_says_what_its_time_holds(tmp_path):
    shown = {tile.label: tile for tile in tiles(RunFacts(make_run(tmp_path / "run")))}
    assert (shown["Time"].value, shown["Time"].note) == ("15.0 s", "2 steps a second with previews and saving")


@pytest.mark.parametrize("prompts, written", [
    ({}, "3d icon in the style of TOK"), ({"instance_prompt": None}, "3d icon in the style of TOK, a dog"),
    ({"instance_prompt": None, "validation_prompt": None}, "your prompt"),
])
def test_user_interfaces_are_told_a_prompt_that_the_run_knows(tmp_path, prompts, written):
    run = RunFacts(make_run(tmp_path / "run", **prompts))
    comfy, webui = (interface.steps[-1] for interface in usage(run).interfaces)
    assert comfy == f"Write `{written}` in the positive prompt." and webui == f"Prompt: `{written} <lora:run:1>`"


def test_only_options_that_were_set_are_listed_and_the_command_repeats_the_run(tmp_path):
    run = RunFacts(make_run(tmp_path / "run", rank=8))
    flags = {c.flag for c in run.changed}
    assert "rank" in flags and "snr_gamma" not in flags and "hub_token" not in flags
    assert run.command.startswith("python train_dreambooth_lora_sdxl_advanced.py ") and "--rank=8" in run.command


def test_status_tells_how_the_run_ended(tmp_path):
    folder = make_run(tmp_path / "run")
    assert RunFacts(folder).status == "finished", "every step made, only publishing is left"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    assert RunFacts(folder).status == "stopped" and not RunFacts(folder).ended_well


def test_large_images_go_in_as_thumbnails(tmp_path):
    folder = make_run(tmp_path / "run", samples=())
    Image.effect_noise((1024, 1024), 90).convert("RGB").save(folder / "samples" / "step_000001_p01_s7.png")
    image = sample_steps(folder, last=1)[0].images[0]
    assert image.data.startswith("data:image/webp") and len(image.data) < 300_000
    assert (image.caption, image.size) == ("seed 7", "1024 × 1024")
    thumb = folder / "t.webp"
    thumb.write_bytes(base64.b64decode(image.data.partition(",")[2]))
    assert max(Image.open(thumb).size) == EMBED_PX


def test_images_of_a_longer_run_in_the_same_folder_are_not_shown(tmp_path):
    folder = make_run(tmp_path / "run", samples=(15, 400))
    assert [group.step for group in sample_steps(folder, last=RunFacts(folder).step)] == [15]


def test_long_runs_show_the_first_and_the_last_step():
    shown = spread(list(range(0, 20_000, 100)))
    assert shown[0] == 0 and shown[-1] == 19_900 and len(shown) == len(set(shown)) == 24


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    thin = thinned(points)
    assert len(thin) == MAX_POINTS and (thin[0], thin[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thin) / MAX_POINTS == pytest.approx(3.0, abs=0.05)


def test_smoothing_is_unbiased_from_the_first_step():
    assert all(y == pytest.approx(0.3) for _, y in smoothed([(x, 0.3) for x in range(100)]))


@pytest.mark.parametrize("low, high", [(0, 1), (0.091, 0.252), (-3, 0.5), (1e-7, 3e-4), (5, 5000)])
def test_ticks_are_few_and_enclose_the_data(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8


@pytest.mark.parametrize("points", [
    [(1, 0.5)], [(1, -0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-4)] * 3, [(5, 1.0), (6, 1e9)]])
def test_charts_of_flat_and_tiny_series_stay_inside_their_frame(points):
    chart = line_chart("t", points)
    for x, y, _ in json.loads(chart.points_json):
        assert 0 <= x <= 500 and 0 <= y <= 210


@pytest.mark.parametrize("value, text", [(0.04123, "0.0412"), (1e-4, "1e-4"), (1640, "1,640"), (0, "0"),
                                         (3.05e-6, "3.05e-6")])
def test_numbers_read_well(value, text):
    assert number(value) == text


@pytest.mark.parametrize("ticks, written", [
    ([0, 5e-4, 1e-3, 1.5e-3], ["0", "0.0005", "0.001", "0.0015"]), ([0, 2e-4, 4e-4], ["0", "2e-4", "4e-4"]),
    ([0, 5e5, 1e6], ["0", "5e5", "1e6"]), ([-1e-3, -5e-4, 0], ["-0.001", "-0.0005", "0"]),
])
def test_the_numbers_of_an_axis_are_written_alike(ticks, written):
    assert labels(ticks) == written
    chart = line_chart("t", [(k, tick) for k, tick in enumerate(ticks)])
    assert {"e" in label for label in heights(chart)[0] if label != "0"} == {"e" in written[1]}
