"""What a run says: a plan of a few lines, a progress line of one row, which file is for what; and what it leaves."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import warnings

import pytest

from tests.support import ROOT
from tests.support.trainers import command, forked, forked_script, make_images
from trainkit import process, summary, terminal
from trainkit.errors import LineFormatter, Problem, UserError
from trainkit.process import own_settings
from trainkit.runtime import progress as line_room
from trainkit.runtime.progress import LineHandler, Pace, Progress, watched
from trainkit.summary import Plan, Trainables, end_lines, plan_lines, trainable_lines

READ = "22 images, 22 captions from metadata.jsonl"
PLAN = dict(images=22, account=READ, source="assets/icons-3d", resolution=64, batch=3, steps=400,
            device="NVIDIA H200 (139 GB)", precision="bf16", folder="runs/mine")


def lines(written) -> dict[str, str]:
    return {line.label: line.text for line in written}


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_has_the_sizes_of_images_where_they_have_their_own():
    sizes = {(64, 64): 12, (48, 80): 9, (80, 48): 1}
    told = lines(plan_lines(Plan(**PLAN | dict(sizes=sizes, passes=1.3333, repeats=2))))
    assert told["Buckets"] == (
        "64x64 12 images, 80x48 9, 48x80 1; an epoch is 44 images = 15 steps of 1.3 forward passes each")
    assert told["Training"].endswith("400 steps = 27 epochs")
    many = lines(plan_lines(Plan(**PLAN | dict(sizes={(64, side): 1 for side in range(10)}, images=10))))
    assert many["Buckets"].startswith("0x64 1 image, 1x64 1, ") and "7x64 1, and 2 more sizes; " in many["Buckets"]


def test_the_plan_is_four_lines_of_facts():
    assert [str(line) for line in plan_lines(Plan(**PLAN))] == [
        "Images    22 images, 22 captions from metadata.jsonl; in assets/icons-3d",
        "Training  64 px · batch 3 · 400 steps = 55 epochs",
        "Device    bf16 on NVIDIA H200 (139 GB)",
        "Folder    runs/mine",
    ]


@pytest.mark.parametrize("changes, images", [
    (dict(prompted=22, prompt="a photo of TOK"), f'{READ}; in assets/icons-3d; all with the prompt "a photo of TOK"'),
    (dict(prompted=2, prompt="a TOK"), f'{READ}; in assets/icons-3d; 2 with the prompt "a TOK"'),
    (dict(prompt="a TOK"), f"{READ}; in assets/icons-3d"),
    (dict(repeats=3, class_images=100),
     f"{READ}; in assets/icons-3d; each 3 times an epoch; beside them 100 class images"),
])
def test_the_plan_tells_what_is_trained_on(changes, images):
    assert lines(plan_lines(Plan(**PLAN | changes)))["Images"] == images


@pytest.mark.parametrize("changes, training", [
    (dict(accumulation=2, processes=4), "64 px · batch 3 × 2 accumulated × 4 processes = 24 · 400 steps = 436 epochs"),
    (dict(batch=22, steps=1), "64 px · batch 22 · 1 step = 1 epoch"),
    (dict(batch=11, steps=3, repeats=3), "64 px · batch 11 · 3 steps = 0.5 epochs"),
])
def test_the_plan_tells_how_long(changes, training):
    assert lines(plan_lines(Plan(**PLAN | changes)))["Training"] == training


def test_no_mixed_precision_is_called_fp32():
    assert lines(plan_lines(Plan(**PLAN | {"precision": "no"})))["Device"] == "fp32 on NVIDIA H200 (139 GB)"


@pytest.mark.parametrize("changes, told", [
    ({}, "LoRA rank 8 on 136 layers, 0.24 M parameters · prodigy, rate 1"),
    (dict(layers={"unet": 136, "text_encoder": 12, "text_encoder_2": 36}, rates={"unet": 1e-4, "text_encoder": 5e-6}),
     "LoRA rank 8 on 136 layers of the UNet and 48 of the text encoders, 0.24 M parameters · prodigy, "
     "rate 0.0001 (unet), 5e-06 (text_encoder)"),
    (dict(layers={"text_encoder": 12}),
     "LoRA rank 8 on 12 layers of the text encoders, 0.24 M parameters · prodigy, rate 1"),
    (dict(tokens=2), "LoRA rank 8 on 136 layers and 2 new tokens, 0.24 M parameters · prodigy, rate 1"),
    (dict(ranks=(2, 16)), "LoRA ranks 2 to 16 on 136 layers, 0.24 M parameters · prodigy, rate 1"),
    (dict(layers={}, tokens=1, parameters=512), "1 new token, 512 parameters · prodigy, rate 1"),
])
def test_what_learns_is_one_line(changes, told):
    facts = dict(kind="LoRA", ranks=(8, 8), layers={"unet": 136}, tokens=0, parameters=240_123, optimizer="prodigy",
                 rates={"unet": 1.0})
    assert lines(trainable_lines(Trainables(**facts | changes))) == {"Learning": told}


def test_the_end_names_every_file_and_what_it_is_for():
    files = {"mine.safetensors": "ComfyUI, A1111, Forge", "pytorch_lora_weights.safetensors": "Diffusers"}
    assert [str(line).rstrip() for line in end_lines("runs/mine", files, start=0, steps=400, seconds=125)] == [
        "Done      400 steps in 2:05; in runs/mine:",
        "          mine.safetensors                  ComfyUI, A1111, Forge",
        "          pytorch_lora_weights.safetensors  Diffusers",
        "          README.md                         the model card",
        "          report.html                       the report: open it in a browser",
    ]


def test_a_finished_run_that_is_started_again_does_not_say_that_it_trained():
    first, *_ = end_lines("runs/mine", {}, start=400, steps=400, seconds=125)
    assert first.text == "400 steps in 2:05; all were finished already, none was trained now; in runs/mine:"


# -- the line ----------------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal of some columns, which wraps as one does: `rows` is what stands on it."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.rows, self.at = columns, [""], 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for c in text.replace(terminal.ERASE, "\0"):
            if c == "\0":
                self.rows[-1] = self.rows[-1][:self.at]
            elif c == "\n":
                self.rows.append("")
                self.at = 0
            elif c == "\r":
                self.at = 0
            else:
                if self.at == self.columns:
                    self.rows.append("")
                    self.at = 0
                self.rows[-1] = self.rows[-1][:self.at].ljust(self.at) + c + self.rows[-1][self.at + 1:]
                self.at += 1
        return len(text)

    @property
    def shown(self) -> list[str]:
        return [row.rstrip() for row in self.rows if row.strip()]


@pytest.fixture
def screen(request, monkeypatch):
    made = Screen(request.param)
    monkeypatch.setattr(terminal, "columns", lambda stream: made.columns)
    monkeypatch.setattr(line_room, "memory", lambda: "10.7 of 11.2 GB peak")
    return made


LONG = {"loss": 0.1, "lr/unet": 1.0, "d/unet": 2e-5, "fourier_component": 0.5}


@pytest.mark.parametrize("screen", [20, 40, 60, 80, 200], indirect=True)
def test_the_line_never_takes_a_second_row(screen):
    progress = Progress(screen)
    progress.begin(0, 40_000)
    for step in range(1, 300):
        progress._next = 0
        progress.update(step, LONG | {"images": step * 24.0}, notes=["3 skipped", "next save 40000"])
    assert len(screen.shown) == 1 and screen.shown[0].startswith("299/40000")
    assert ("next save 40000" in screen.shown[0]) == (screen.columns == 200)
    assert screen.columns < 60 or "left" in screen.shown[0]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("screen", [80], indirect=True)
def test_nothing_of_a_longer_line_remains(screen, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    progress = Progress(screen)
    progress.task("caching latents of many images", 3, 22)
    progress.task("short", 1, 2)
    assert screen.shown == ["short 1/2"]


@pytest.mark.parametrize("screen", [80], indirect=True)
def test_the_echo_of_a_key_goes_with_the_next_line(screen, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(screen)
    progress.task("generating images", 0, 2)
    screen.write("^C")
    progress.clear()
    assert screen.shown == []


@pytest.mark.parametrize("screen", [120], indirect=True)
def test_a_terminal_made_narrower_gets_a_shorter_line(screen):
    progress = Progress(screen)
    progress.begin(0, 100)
    for step, screen.columns in enumerate([120, 60, 60], 1):
        progress._next = 0
        progress.update(step, LONG | {"images": 24.0})
        assert 0 < progress._shown < screen.columns


@pytest.fixture
def no_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("screen", [60], indirect=True)
@pytest.mark.usefixtures("no_colours")
def test_log_records_stand_above_the_line_whole(screen):
    progress = Progress(screen)
    handler = LineHandler(progress)
    progress.task("caching latents", 3, 22)
    handler.emit(logging.makeLogRecord({"msg": "one record", "levelno": logging.WARNING, "levelname": "WARNING"}))
    progress.task("caching latents", 22, 22)
    assert screen.shown == ["WARNING one record", "caching latents 22/22"]


def test_a_task_tells_the_time_that_is_left(monkeypatch):
    pace = Pace(22, 0)
    pace.mark(2, 10.0)
    pace.mark(12, 20.0)
    assert line_room.task_line("caching latents", pace) == "caching latents 12/22 · 0:10 left"
    pace.mark(12.7, 20.7)
    assert line_room.task_line("generating images", pace, width=24) == "generating images 12/22"


@pytest.mark.usefixtures("no_colours")
def test_work_outside_of_a_run_has_a_line_that_goes_when_it_is_done(monkeypatch):
    screen = Screen(80)
    monkeypatch.setattr(sys, "stderr", screen)
    with watched("generating images", 8) as show:
        show(4.5)
        logging.getLogger("trainkit.x").warning("odd")
    assert screen.shown == ["WARNING odd"]
    assert not any(isinstance(handler, LineHandler) for handler in logging.getLogger().handlers)


@pytest.mark.usefixtures("no_colours")
def test_on_a_terminal_long_records_break_between_words(monkeypatch):
    monkeypatch.setattr(terminal, "columns", lambda stream: 40)
    text = "22 images, 22 captions from metadata.jsonl; in a/folder"
    line = summary.Line("Images", text)
    record = logging.makeLogRecord({"msg": str(line), "levelno": logging.INFO, "label": line.label})
    assert LineFormatter(Screen(40)).format(record).splitlines() == [
        "Images    22 images, 22 captions from", "          metadata.jsonl; in a/folder"]
    assert LineFormatter(io.StringIO()).format(record) == f"Images    {text}"


def test_in_a_file_the_first_word_of_a_task_and_its_last_are_lines():
    stream = io.StringIO()
    progress = Progress(stream)
    for done in range(23):
        progress.task("caching latents", done, 22)
    progress.task("more", 0, 2)
    assert stream.getvalue().splitlines() == ["caching latents 0/22", "caching latents 22/22", "more 0/2"]


# -- colours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ, tty, coloured", [
    ({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True),
    ({"FORCE_COLOR": "1"}, False, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ({"TERM": "dumb"}, True, False),
])
def test_colours_are_for_terminals_and_for_who_asks(monkeypatch, environ, tty, coloured):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = Screen(80) if tty else io.StringIO()
    formatter = LineFormatter(stream)
    warning = logging.makeLogRecord({"msg": "odd", "levelno": logging.WARNING, "levelname": "WARNING"})
    assert formatter.format(warning) == ("\x1b[1;33mWARNING\x1b[0m odd" if coloured else "WARNING odd")
    line = summary.Line("Images", "22 images")
    news = logging.makeLogRecord({"msg": str(line), "levelno": logging.INFO, "label": line.label})
    assert formatter.format(news) == ("\x1b[1mImages\x1b[0m" if coloured else "Images") + "    22 images"
    report = UserError(Problem("a", "b", "c", "d")).report(stream)
    assert report.startswith("\x1b[1;31mcannot go on:\x1b[0m" if coloured else "cannot go on:")


def test_a_run_that_was_told_to_stop_does_not_read_like_an_error():
    stopped = UserError(Problem("ended by Ctrl-C", "runs/mine/checkpoint-7", "step 7 is finished and saved",
                                "the same command with --resume_from_checkpoint latest", "stopped"))
    assert stopped.report().splitlines()[0] == "ended by Ctrl-C" and "cannot" not in stopped.report()


# -- what a command leaves in its process ------------------------------------------------------------------------------


def test_a_command_puts_back_what_it_sets(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    before = (dict(os.environ), list(sys.argv), list(warnings.filters), logging.getLogger("trainkit").level,
              list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM))
    with own_settings():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info", "the user's own wish"
        os.environ["ACCELERATE_X"] = os.environ["TRANSFORMERS_VERBOSITY"] = "1"
        del os.environ["PATH"]
        sys.argv.append("x")
        warnings.simplefilter("error")
        logging.getLogger("trainkit").setLevel(logging.DEBUG)
        logging.getLogger().addHandler(logging.NullHandler())
        monkeypatch.setitem(sys.modules, "some_blocked_package", None)
    assert "some_blocked_package" not in sys.modules
    assert before == (dict(os.environ), list(sys.argv), list(warnings.filters), logging.getLogger("trainkit").level,
                      list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM))


def test_the_libraries_speak_again_afterwards():
    import transformers.utils.logging as log

    log.set_verbosity_info()
    log.enable_progress_bar()  # other tests may have left it off
    with own_settings():
        assert log.get_verbosity() == log.ERROR and not log.is_progress_bar_enabled()
    assert log.get_verbosity() == log.INFO and log.is_progress_bar_enabled()
    log.set_verbosity_warning()


def test_an_accelerator_of_the_users_is_there_again_afterwards():
    from accelerate.state import AcceleratorState

    before = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state["mark"] = 1
    try:
        with own_settings():
            assert AcceleratorState._shared_state == {}
            AcceleratorState._shared_state["other"] = 2
        assert AcceleratorState._shared_state == before | {"mark": 1}
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


@pytest.mark.parametrize("module, category, told", [
    ("transformers.x", UserWarning, False), ("peft", UserWarning, False), ("trainkit.x", FutureWarning, False),
    ("trainkit.data.images", UserWarning, True), ("PIL.Image", UserWarning, True), ("torch.cuda", UserWarning, True),
    ("torch.nn.x", UserWarning, False), ("torchless", UserWarning, True),
])
def test_what_libraries_tell_programmers_is_not_shown(module, category, told, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with own_settings():
            warnings.warn_explicit("hm", category, "f.py", 1, module=module)
            seen = len(caught)
    assert (seen == 1) == told


def test_who_asks_python_for_warnings_gets_all(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with own_settings():
            warnings.warn_explicit("hm", FutureWarning, "f.py", 1, module="transformers")
    assert len(caught) == 1


def test_only_the_first_process_speaks_before_the_run(monkeypatch, capsys):
    for rank, told in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        process.say("hello")
        assert capsys.readouterr().err == told


# -- a trainer, whole -------------------------------------------------------------------------------------------------

TWICE = """
import json, logging, os, signal, sys, warnings
from accelerate.state import AcceleratorState, GradientState, PartialState
import torch
import train_text_to_image_lora as trainer

def state():
    return [dict(os.environ), sys.argv[:], [str(h) for h in logging.root.handlers], logging.root.level,
            [logging.getLogger(n).level for n in ("trainkit", "accelerate", "bitsandbytes")], warnings.filters[:],
            [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
            [dict(s._shared_state) for s in (AcceleratorState, GradientState, PartialState)],
            [n for n, m in sys.modules.items() if m is None], torch.get_rng_state().tolist(),
            torch.get_float32_matmul_precision(), bool(torch.tensor(1e-39) * 1 == 0)]

runs = json.loads(sys.argv.pop())
before = state()
for words in runs:
    trainer.main(words)
    changed = [(a, b) for a, b in zip(before, state()) if a != b]
    assert not changed, f"{changed}"[:2000]
"""


@pytest.mark.trains
def test_main_can_be_called_again_and_leaves_the_process_as_it_was(tiny_sd, tmp_path):
    """As cells of a notebook do: with another precision, and with a package that the first run kept out."""
    images = make_images(tmp_path / "images")
    common = [f"--pretrained_model_name_or_path={tiny_sd}", f"--dataset_name={images}", "--resolution=32", "--rank=2",
              "--train_batch_size=2", "--max_train_steps=1", "--lr_warmup_steps=0"]
    runs = [[*common, f"--output_dir={tmp_path / 'a'}", "--report_to=tensorboard"],
            [*common, f"--output_dir={tmp_path / 'b'}", "--report_to=none", "--mixed_precision=bf16"],
            [*common, f"--output_dir={tmp_path / 'c'}", "--report_to=none", "--optimizer=adamw8bit"]]
    (tmp_path / "twice.py").write_text(TWICE, "utf-8")
    done = forked_script([str(tmp_path / "twice.py"), json.dumps(runs)], cwd=ROOT, log=tmp_path / "log")
    assert done.code == 0, done.output
    assert "Generating train split" not in done.output and "|" not in done.output, "a library's bar"


@pytest.mark.trains
def test_a_run_says_its_plan_first_and_its_files_last_and_the_libraries_nothing(tiny_sdxl, tmp_path):
    images = make_images(tmp_path / "images")
    argv = command(tiny_sdxl, None, tmp_path / "out", instance_data_dir=None, dataset_name=images,
                   caption_column="text")
    done = forked(argv, log=tmp_path / "log")
    assert done.code == 0, done.output
    told = done.output.splitlines()
    assert told[0].startswith("loading PyTorch")
    assert told[1].startswith("Images    6 images, 6 captions")
    assert told[2] == "Training  32 px · batch 2 · 2 steps = 0.7 epochs"
    assert [line.split()[0] for line in told[3:6]] == ["Device", "Folder", "Learning"]
    assert told[-1].split() == ["report.html", "the", "report:", "open", "it", "in", "a", "browser"]
    starts = ("Done", "WARNING", "1/2", "2/2", " ", "pytorch_lora", "out.safetensors", "1 checkpoint of this run")
    assert [line for line in told[6:] if not line.startswith(starts)] == []
