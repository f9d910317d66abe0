"""experiments/gpu_hour.py: the section it writes; its runs are tried on the fake card (tests/test_fake_card.py)."""

from __future__ import annotations

from experiments import ROOT, gpu_hour

CARD = {"name": "made-up card", "GiB": "12.0", "driver": "1", "torch": "2", "CUDA": "13", "diffusers": "0.42"}
RESULTS = {
    "card": CARD,
    "modes": {"DoRA": {"ended": "trained", "planned": "0.90", "allocated": 2**30, "reserved": 2**31,
                       "steps_per_second": 2.0},
              "fp32": {"ended": "out of memory", "allocated": 0, "reserved": 0, "steps_per_second": None}},
    "bits": {"as it is": {"ended": "trained", "same": False, "same_resumed": True}, "exact": {"ended": "failed: x"}},
    "waits": {"AdamW": {"ended": "trained", "waits": {"gradients.py:106": 1}, "count": 1}},
    "gaps": {"batch 1": {"ended": "trained", "kernels": 9, "busy_seconds": 1.0, "seconds": 2.0, "steps": 8}},
}


def test_the_page_has_a_place_for_the_section_and_says_that_it_was_never_run():
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert page.count(gpu_hour.BEGIN) == page.count(gpu_hour.END) == 1
    assert "Never run on a card" in page.partition(gpu_hour.BEGIN)[2].partition(gpu_hour.END)[0]


def test_only_what_is_between_the_marks_changes():
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    once = gpu_hour.with_section(page, "first")
    assert once.partition(gpu_hour.BEGIN)[0] == page.partition(gpu_hour.BEGIN)[0]
    assert once.partition(gpu_hour.END)[2] == page.partition(gpu_hour.END)[2]
    assert "Never run" not in once and gpu_hour.with_section(once, "first") == once


def test_the_section_says_what_was_found_and_where():
    text = gpu_hour.section(RESULTS)
    assert "made-up card" in text and "| DoRA | trained | 0.90 | 1.00 | 2.00 | 2.00 |" in text
    assert "| fp32 | out of memory |  | 0.00 | 0.00 |  |" in text
    assert "as it is: other bits; a resumed run: the same bits" in text and "exact: failed: x" in text
    assert "Waits in a step with AdamW: 1 (" in text
    assert "9 kernels in 8 steps, which kept the card busy for 1.00 of 2.00 s" in text


def test_a_rate_needs_steps_that_were_timed():
    assert gpu_hour.rate([0.0, 5.0, 5.5, 6.0]) == 2.0, "the first steps are slower"
    assert gpu_hour.rate([0.0, 5.0]) is None


def test_the_plan_of_a_run_stands_beside_what_it_took():
    argv = [f"--pretrained_model_name_or_path={ROOT / 'assets' / 'tiny-sdxl-icons'}", "--instance_data_dir=images",
            "--instance_prompt=a TOK icon", "--resolution=64", "--rank=16", "--mixed_precision=bf16"]
    small, large = (float(gpu_hour.planned([*argv, f"--train_batch_size={n}"])) for n in (1, 64))
    assert 0 < small < large
