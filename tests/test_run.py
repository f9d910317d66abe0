"""The run around the loop: exact gradients on one or two ranks, bad steps, signals, the lock, records, the line."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from tests.support.trainers import free_port
from trainkit import files, run
from trainkit.checkpoints import Checkpoints
from trainkit.data.images import decode
from trainkit.errors import Problem, UserError, exit_with_message
from trainkit.process import own_settings
from trainkit.redact import redact
from trainkit.run import Run
from trainkit.runtime import progress as line_room
from trainkit.runtime import ranks
from trainkit.runtime.checkpoint_folders import pointed
from trainkit.runtime.lock import OutputLock
from trainkit.runtime.progress import Pace, Progress
from trainkit.runtime.record import Metrics, redacted_command
from trainkit.runtime.signals import Signals
from trainkit.runtime.startup import leave_out
from trainkit.runtime.trackers import chosen_trackers
from trainkit.training.gradients import Gradients, clip, total_norm

SECRET = "hf_abcdefghijklmnop"
start_run = partial(run.start_run, project="tests")


class Secret(SimpleNamespace):
    def get_secret_value(self) -> str:
        return self.value


class Options(SimpleNamespace):
    """Stands in for an OptionSet: what the run reads of it."""

    origins = {"rank": "command line"}

    def flat(self):
        return {"rank": 8, "hub_token": "***", "note": f"leaked {SECRET}", "prompt": None}

    def notices(self):
        return ["--class_prompt has no effect: 100% of it"]


def options(out: Path, precision="no", **run) -> Options:
    defaults = dict(
        output_dir=str(out), seed=3, report_to="none", logging_dir="logs", hub_token=Secret(value=SECRET),
        checkpointing_steps=2, max_skipped_steps=2, global_batch=lambda world: 2 * world,
    )
    return Options(
        run=SimpleNamespace(**defaults | run), optimizer=SimpleNamespace(max_grad_norm=1.0),
        precision=SimpleNamespace(mixed_precision=precision, allow_tf32=False, deterministic=False),
    )


class Optim:
    """A plain SGD for each group behind the verbs an update uses; `out` of the first groups have stopped."""

    def __init__(self, *groups, lr=0.1, out=0):
        self.inner = [torch.optim.SGD(params, lr=lr) for params in groups]
        self.active = self.inner[out:]
        self.params = [p for inner in self.inner for group in inner.param_groups for p in group["params"]]
        self.steps = 0

    def step(self):
        self.steps += 1
        for inner in self.active:
            inner.step()

    def zero_grad(self):
        for inner in self.inner:
            inner.zero_grad(set_to_none=True)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "lora"


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def rows(n=8):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


def records(out):
    return json.loads((out / "run.json").read_text())


# -- updates ----------------------------------------------------------------------------------------------------------


def one_update(parts, model=None, **kwargs):
    """Weights after one update from `parts`, each a micro-batch of rows."""
    model = model or linear()
    gradients, optimizer = Gradients(torch.device("cpu"), **kwargs), Optim(model.parameters())
    for part in parts:
        gradients.backward((model(part) ** 2).sum() / 8)
    done = gradients.update(optimizer, step=0, max_grad_norm=0.5)
    return model, done


@pytest.mark.parametrize("cut", [1, 2, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(cut):
    whole, one = one_update([rows()])
    parts, many = one_update(rows().chunk(cut))
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-7)
    assert many.loss == pytest.approx(one.loss) and many.grad_norm == pytest.approx(one.grad_norm)


def test_the_reported_norm_is_the_one_before_clipping_and_the_step_obeys_the_clip():
    before = linear()
    after, done = one_update([rows()])
    moved = torch.cat([(a - b).flatten() for a, b in zip(after.parameters(), before.parameters(), strict=True)])
    assert done.grad_norm > 0.5
    assert moved.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("limit", [0.5, 1e3, None])
def test_clipping_is_that_of_torch(limit):
    ours, theirs = linear(), linear()
    for model in (ours, theirs):
        (model(rows()) ** 2).sum().backward()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
    grads = [p.grad for p in ours.parameters()]
    assert float(total_norm(grads)) == pytest.approx(expected.item())
    clip(grads, float(total_norm(grads)), limit)
    for mine, other in zip(grads, theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_never_touches_weights(bad, where):
    model, gradients = linear(), Gradients(torch.device("cpu"))
    optimizer, before = Optim(model.parameters()), [p.clone() for p in model.parameters()]
    loss = (model(rows()) ** 2).sum()
    gradients.backward(loss + bad if where == "loss" else loss)
    if where == "gradient":
        model.bias.grad[1] = bad
    done = gradients.update(optimizer, step=4, max_grad_norm=1.0)
    assert done.skipped and gradients.skipped == 1 and optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert model.weight.grad is None, "the bad gradient must not leak into the next step"


def test_too_many_bad_steps_in_a_row_end_the_run_with_its_history():
    model = linear()
    gradients = Gradients(torch.device("cpu"), max_skipped=2, last_checkpoint=lambda: "checkpoint-40")
    optimizer = Optim(model.parameters())

    def step(number, factor):
        gradients.backward((model(rows()) ** 2).mean() * factor)
        gradients.update(optimizer, step=number, max_grad_norm=1.0)

    for number, factor in enumerate([1.0, math.nan, math.nan, 1.0, math.nan, math.nan]):
        step(number, factor)
    with pytest.raises(UserError, match="3 steps in a row") as caught:
        step(6, math.nan)
    assert caught.value.exit_code == 5 and "step 7" in str(caught.value) and "checkpoint-40" in str(caught.value)
    assert "before step 5 " in str(caught.value), "where the row of bad steps began"
    assert optimizer.steps == 2


@pytest.mark.parametrize("broken", [False, True])
def test_a_diverged_run_says_whether_its_weights_are_still_whole(broken):
    model = linear()
    gradients, optimizer = Gradients(torch.device("cpu"), max_skipped=1), Optim(model.parameters())
    if broken:
        model.bias.data[0] = math.inf
    with pytest.raises(UserError) as caught:
        for step in range(4, 6):
            gradients.backward((model(rows()) ** 2).mean() * math.nan)
            gradients.update(optimizer, step=step, max_grad_norm=1.0)
    problem, = caught.value.problems
    assert ("weights themselves are not finite" in problem.why) == broken
    assert ("of the last finite step;" in problem.why) == (not broken)
    assert ("--mixed_precision" in problem.fix) == (not broken), "no precision mends weights that are gone"
    assert "--optimizer_args, --fourier_weight" in problem.fix
    assert f"before step {4 if broken else 5} " in problem.fix, "the step that broke them is the one before"


def groups_of(model):
    return [model.weight], [model.bias]


@pytest.mark.parametrize("fp16", [False, True])
def test_a_group_that_has_stopped_is_neither_clipped_nor_moved_nor_counted(fp16):
    model, alone = linear(), linear()
    alone.weight.requires_grad_(False)
    done = []
    for part, optimizer in ((model, Optim(*groups_of(model), out=1)), (alone, Optim([alone.bias]))):
        gradients = Gradients(torch.device("cpu"), fp16=fp16)
        gradients.backward((part(rows()) ** 2).sum())
        done.append(gradients.update(optimizer, step=0, max_grad_norm=0.5))
    assert done[0] == done[1]
    assert torch.equal(model.weight, linear().weight) and torch.equal(model.bias, alone.bias)
    assert not torch.equal(model.bias, linear().bias)


@pytest.mark.parametrize("fp16", [False, True])
def test_groups_are_clipped_as_one_vector(fp16):
    whole, one = one_update([rows()], fp16=fp16)
    model, gradients = linear(), Gradients(torch.device("cpu"), fp16=fp16)
    gradients.backward((model(rows()) ** 2).sum() / 8)
    two = gradients.update(Optim(*groups_of(model)), step=0, max_grad_norm=0.5)
    assert one == two and torch.equal(model.weight, whole.weight) and torch.equal(model.bias, whole.bias)


def test_an_overflow_in_one_group_skips_the_step_for_all():
    model, gradients = linear(), Gradients(torch.device("cpu"), fp16=True)
    gradients.backward((model(rows()) ** 2).sum())
    model.bias.grad[0] = math.inf
    optimizer = Optim(*groups_of(model))
    assert gradients.update(optimizer, step=0, max_grad_norm=1.0).skipped and optimizer.steps == 0
    assert gradients.scaler.get_scale() == 2.0**15


def test_a_parameter_without_gradient_has_gradient_0_on_one_rank_too():
    """Weight decay and momentum reach it as they do on two ranks, where sums need a value."""
    model, gradients = linear(), Gradients(torch.device("cpu"))
    optimizer = Optim(model.parameters())
    optimizer.inner[0].param_groups[0]["weight_decay"] = 0.5
    gradients.backward(model.weight.sum())
    gradients.update(optimizer, step=0, max_grad_norm=None)
    torch.testing.assert_close(model.bias, linear().bias * (1 - 0.1 * 0.5))


def test_fp16_overflow_lowers_the_scale_and_is_not_counted_as_divergence():
    model, gradients = linear(), Gradients(torch.device("cpu"), fp16=True, max_skipped=0)
    optimizer = Optim(model.parameters())
    for _ in range(3):
        gradients.backward((model(rows()) ** 2).sum() * 1e36)  # the scaled gradient overflows, the loss does not
        gradients.update(optimizer, step=0, max_grad_norm=1.0)
    assert gradients.skipped == 3 and gradients.scaler.get_scale() == 2.0**16 / 8


def test_fp16_scaling_does_not_change_the_update():
    plain, _ = one_update([rows()])
    scaled, done = one_update([rows()], fp16=True)
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-6, atol=1e-7)
    assert done.loss < 100, "the loss is reported unscaled"


def test_scale_and_counters_survive_a_restart():
    first, model = Gradients(torch.device("cpu"), fp16=True), linear()
    first.backward((model(rows()) ** 2).sum() * math.nan)
    first.update(Optim(model.parameters()), step=0, max_grad_norm=1.0)
    tensors, data = first.pack()
    second = Gradients(torch.device("cpu"), fp16=True)
    second.unpack(tensors, json.loads(json.dumps(data)))
    assert (second.skipped, second.in_a_row, second.scaler.get_scale()) == (1, 1, 2.0**15)
    second.backward((model(rows()) ** 2).sum())
    assert second.scaler.get_scale() == 2.0**15


def on_two_ranks(work) -> list:
    """Run `work(rank)` on two gloo processes forked from here -> what each returned (JSON)."""
    port, children = free_port(), []
    for rank in range(2):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            answer = "null"
            try:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
                answer = json.dumps(work(rank))
            except BaseException as error:  # a child must not return into pytest
                answer = json.dumps(repr(error))
            finally:
                os.write(write, answer.encode())
                os._exit(0)
        os.close(write)
        children.append((pid, read))
    answers = []
    for pid, read in children:
        with os.fdopen(read, "rb") as pipe:
            answers.append(json.loads(pipe.read()))
        os.waitpid(pid, 0)
    return answers


def test_two_ranks_make_the_update_of_one_and_agree_on_the_loss():
    alone, expected = one_update([rows()])

    def work(rank):
        model, done = one_update(rows().chunk(2)[rank].chunk(2))
        return [model.weight.flatten().tolist(), done.loss, done.grad_norm]

    for weights, loss, norm in on_two_ranks(work):
        torch.testing.assert_close(torch.tensor(weights), alone.weight.detach().flatten(), rtol=1e-6, atol=1e-7)
        assert loss == pytest.approx(expected.loss) and norm == pytest.approx(expected.grad_norm)


def test_a_bad_gradient_on_one_rank_skips_the_step_on_both_and_votes_are_shared():
    def work(rank):
        model = linear()
        gradients, optimizer = Gradients(torch.device("cpu")), Optim(model.parameters())
        gradients.backward((model(rows()) ** 2).sum() * (math.nan if rank else 1.0))
        done = gradients.update(optimizer, step=0, max_grad_norm=1.0, votes=[float(rank), 0.0])
        return [torch.equal(model.weight, linear().weight), done.skipped, done.votes]

    assert on_two_ranks(work) == [[True, True, [1.0, 0.0]]] * 2


def test_a_parameter_without_gradient_on_one_rank_does_not_hang_the_other():
    def work(rank):
        model = linear()
        gradients, optimizer = Gradients(torch.device("cpu")), Optim(model.parameters())
        gradients.backward(model.weight.sum() + (model.bias.sum() if rank else 0))
        gradients.update(optimizer, step=0, max_grad_norm=None)
        return (linear().bias - model.bias).tolist()

    for moved in on_two_ranks(work):
        assert moved == pytest.approx([0.1] * 3, rel=1e-5)


def test_only_rank_0_computes_and_every_rank_gets_the_answer():
    assert on_two_ranks(lambda rank: ranks.from_main(lambda: f"made on {rank}")) == ["made on 0"] * 2


class Weights:
    """A tensor to save."""

    def __init__(self, value: float):
        self.value = torch.tensor([value])

    def pack(self):
        return {"w": self.value}, {}

    def unpack(self, tensors, data):
        self.value = tensors["w"]


def test_on_two_ranks_one_writes_and_both_resume_from_it(out):
    def work(rank):
        out.mkdir(exist_ok=True)
        Checkpoints(out, fingerprint={}, weights=Weights(7.0 + rank)).save(2)
        assert (out / "checkpoint-2").is_dir(), "no rank may go on before the checkpoint stands"
        fresh = Weights(0.0)
        saves = Checkpoints(out, fingerprint={}, weights=fresh)
        return [saves.resume("latest"), fresh.value.item(), saves.saved]

    assert on_two_ranks(work) == [[2, 7.0, 2]] * 2, "all know what is saved: they save together or not at all"


# -- the run ----------------------------------------------------------------------------------------------------------


def train(run: Run, *, steps=4, start=0, stop=None, factor=1.0, after=lambda step: None):
    """A whole loop on a tiny model."""
    model = linear()
    optimizer = Optim(model.parameters())
    run.begin(start, steps)
    for step in range(start, stop or steps):
        run.backward((model(rows()) ** 2).mean() * factor)
        run.log(step + 1, run.update(optimizer, step=step) | {"lr/unet": 0.1})
        after(step + 1)
        if run.stopping:
            run.end_if_stopping(step + 1, run.out_dir / f"checkpoint-{step + 1}")


def test_a_run_directory_explains_itself(out):
    with start_run(options(out)) as run:
        assert records(out)["status"] == "running"
        train(run)
    told = records(out)
    assert (told["status"], told["exit_code"], told["step"], told["total_steps"]) == ("done", 0, 4, 4)
    assert told["options"]["rank"] == {"value": 8, "origin": "command line"}
    assert told["options"]["prompt"] == {"value": None, "origin": "default"}
    assert told["versions"]["torch"] and told["seconds"] > 0 and told["name"] == "lora" and told["global_batch"] == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4] and [row["images"] for row in lines] == [2, 4, 6, 8]
    assert {"loss", "grad_norm", "lr/unet", "skipped", "seconds"} <= lines[0].keys()


@pytest.mark.parametrize("error, status, code", [
    (RuntimeError("bug"), "failed", 1), (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "memory", 4),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"), "memory", 4),
    (MemoryError(), "memory", 4), (OSError(errno.ENOMEM, "mmap"), "memory", 4),
])
def test_the_record_says_how_a_run_ended(out, error, status, code):
    with pytest.raises((type(error), UserError)) as caught, start_run(options(out)):
        raise error
    assert (records(out)["status"], records(out)["exit_code"]) == (status, code)
    if status == "memory":
        assert caught.value.exit_code == 4 and "--gradient_checkpointing" in str(caught.value)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_an_output_folder_that_is_a_file_is_refused_by_name(out, below):
    out.write_text("mine")
    with pytest.raises(UserError, match=f"{re.escape(str(out))} is a file") as caught:
        start_run(options(out / below))
    assert caught.value.exit_code == 2 and out.read_text() == "mine"


def test_tensorboard_and_the_record_hold_no_token(out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "plain-secret", f"--hub_token={SECRET}"])
    with start_run(options(out, report_to="tensorboard")) as run:
        train(run)
        assert sys.argv == ["train.py", "--hub_token", "***", "--hub_token=***"]
    written = list(filter(Path.is_file, out.rglob("*")))
    assert any(p.name == "hparams.yml" for p in written)
    for path in written:
        content = path.read_bytes()
        assert SECRET.encode() not in content and b"plain-secret" not in content, path
    assert "***" in (out / "run.json").read_text()


def test_tensorboard_gets_every_number_and_the_images(out):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with start_run(options(out, report_to="tensorboard")) as run:
        train(run)
        run.log_images(4, {"validation": [Image.new("RGB", (8, 8), "red")] * 2})
    [folder] = out.glob("logs/*")
    assert folder.name == out.name, "what TensorBoard calls the run; runs of one trainer would look alike"
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4] and "lr/unet" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["validation"]


def test_wandb_works_offline(out, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    with start_run(options(out, report_to="wandb")) as run:
        train(run)
    [folder] = out.glob("wandb/offline-run-*")
    assert not (out / "logs").exists(), "TensorBoard's folder"
    for path in filter(Path.is_file, folder.rglob("*")):
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    assert chosen_trackers("all") == ["tensorboard"] and chosen_trackers("none") == []
    with pytest.raises(UserError, match="pip install wandb"):
        chosen_trackers("wandb")


def test_a_resumed_run_replaces_the_rows_after_its_start_and_goes_on_with_the_clock(out):
    with start_run(options(out)) as run:
        train(run, steps=4)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    with start_run(options(out)) as run:
        train(run, steps=6, start=2)
        assert run.seconds > json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["seconds"]
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (records(out)["start_step"], records(out)["step"]) == (2, 6)


FOREIGN_LINES = [  # in a metrics.jsonl that a resume reads: a kill, a power cut, a copy, another program
    b'{"step": 3, "lo', b"\0" * 40, b"[1, 2]", b"7", b'{"loss": 0.5}', b'{"step": "3"}', b'{"step": null}',
    b'{"step": true}', b'{"step": 2.5}', "caf\u00e9, \u65e5\u672c".encode("utf-16"), b"\xff\xfe", b"<<<<<<< HEAD", b"",
    b"[" * 50_000, b'{"step": 1e400}',
]


@pytest.mark.parametrize("last", [True, False], ids=["torn last", "torn first"])
@pytest.mark.parametrize("line", FOREIGN_LINES, ids=lambda line: repr(line[:12]))
def test_torn_and_foreign_lines_in_the_metrics_are_skipped(out, line, last):
    out.mkdir()
    rows = [b'{"step": 1, "seconds": 2.0}', b'{"step": 2, "seconds": 3.5}', b'{"step": 3, "seconds": 9.0}']
    (out / "metrics.jsonl").write_bytes(b"\n".join([*rows, line] if last else [line, *rows]))
    assert Metrics(out).begin(2) == 3.5
    assert [json.loads(row)["step"] for row in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("seconds", ['"soon"', "null", "NaN", "[]", "true"])
def test_seconds_that_are_no_number_are_none(out, seconds):
    out.mkdir()
    (out / "metrics.jsonl").write_text(f'{{"step": 1, "seconds": {seconds}}}\n')
    assert Metrics(out).begin(5) in (0.0, 1.0)


@pytest.mark.parametrize("junk", [
    b"", b"[]", b"7", b"{", b"\xff\xfe\0", b'{"pid": "x"}', b'{"pid": -1}', b'{"pid": 1e30}',
    b'{"pid": 99999999999999999999}', b'{"checkpoint": 7, "status": ["running"]}',
])
@pytest.mark.parametrize("name", ["latest.json", ".run.owner.json", "run.json"])
def test_files_that_are_useful_and_not_needed_refuse_no_start(out, name, junk):
    out.mkdir()
    (out / name).write_bytes(junk)
    with start_run(options(out)) as run:
        train(run, steps=2)
        assert pointed(out) is None
    assert records(out)["status"] == "done"


def test_the_record_of_a_killed_run_is_completed_at_the_next_start(out, caplog):
    if (pid := os.fork()) == 0:
        try:
            with start_run(options(out)) as run:
                train(run, steps=9, after=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)  # a child must not return into pytest
    os.waitpid(pid, 0)
    assert records(out)["status"] == "running"
    heard = int((out / "metrics.jsonl").stat().st_mtime)
    with caplog.at_level(logging.INFO), pytest.raises(UserError), start_run(options(out)):
        raise UserError(Problem("a command that is refused", "", "", ""))
    told = records(out)
    assert (told["status"], told["step"], told["exit_code"], told["total_steps"]) == ("killed", 3, None, 9)
    assert told["seconds"] > 0 and told["ended"] == time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(heard))
    assert "killed after step 3" in caplog.text


def test_the_record_of_a_run_that_was_killed_before_a_step_is_completed_too(out):
    out.mkdir()
    (out / "run.json").write_text('{"status": "running", "name": "lora"}')
    with pytest.raises(UserError), start_run(options(out)):
        raise UserError(Problem("refused", "", "", ""))
    assert (records(out)["status"], records(out)["step"], records(out)["name"]) == ("killed", None, "lora")


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_names_the_weights_and_the_autocast(out, precision, dtype):
    with start_run(options(out, precision=precision)) as run:
        assert run.weight_dtype == dtype
        with run.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert (run.gradients.scaler is not None) == (precision == "fp16")


# -- disk and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES,
                                  errno.ENAMETOOLONG])
def test_a_disk_error_anywhere_in_a_run_is_told_as_one(out, code):
    with pytest.raises(UserError, match=os.strerror(code)) as caught, start_run(options(out)):
        raise OSError(code, os.strerror(code), "samples/step_000001.png")
    assert caught.value.exit_code == 74 and "samples/step_000001.png" in str(caught.value)
    assert (records(out)["status"], records(out)["exit_code"]) == ("disk", 74)


def test_a_file_that_is_missing_by_our_mistake_stays_a_bug(out):
    with pytest.raises(FileNotFoundError), start_run(options(out)) as run:
        (run.out_dir / "nothing").read_text()


def test_a_full_disk_under_the_metrics_is_told_by_name(out):
    said = "cannot write metrics.jsonl: No space left"
    with pytest.raises(UserError, match=said) as caught, start_run(options(out)) as run:
        (out / "metrics.jsonl").symlink_to("/dev/full")
        run.log(1, {"loss": 1.0})
    assert caught.value.exit_code == 74 and records(out)["status"] == "disk"


@pytest.mark.parametrize("target", ["", "README.md"])
def test_a_folder_where_a_file_is_to_be_is_told_and_not_a_full_disk(out, target):
    (out / "README.md").mkdir(parents=True)
    with pytest.raises(UserError) as caught, files.disk_errors(out / target):
        files.atomic_write(out / "README.md", b"x")
    problem, = caught.value.problems
    assert problem.what.startswith("cannot write README.md")
    assert problem.fix.startswith(f"move {out / 'README.md'} away")


def refuse_writing(monkeypatch, name: str) -> None:
    """Every write of a file called `name` fails as on a full disk."""
    real = files.atomic_write

    def failing(path, data):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(files, "atomic_write", failing)


@pytest.mark.parametrize("error", [None, RuntimeError("bug"), UserError(Problem("nan", "", "", "", kind="nonfinite"))])
def test_a_run_that_cannot_write_its_end_gives_everything_back_and_tells_the_first_error(out, monkeypatch, error):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error) if error else UserError) as caught, start_run(options(out)):
        refuse_writing(monkeypatch, "run.json")
        if error is not None:
            raise error
    assert caught.value is error or caught.value.exit_code == 74
    assert signal.getsignal(signal.SIGTERM) == before and not (out / ".run.owner.json").exists()
    monkeypatch.undo()
    with start_run(options(out)):
        pass


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_locked_is_told_as_a_disk_error(out, monkeypatch, code):
    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(out / ".run.lock"))

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        start_run(options(out))
    assert caught.value.exit_code == 74


def test_a_lock_whose_owner_cannot_be_written_is_given_back(out, monkeypatch):
    refuse_writing(monkeypatch, ".run.owner.json")
    with pytest.raises(UserError, match="No space left"):
        start_run(options(out))
    monkeypatch.undo()
    with start_run(options(out)):
        pass


def test_a_logging_dir_that_cannot_be_is_refused_and_everything_given_back(out):
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(UserError, match="--logging_dir") as caught:
        start_run(options(out, report_to="tensorboard", logging_dir="/proc/nope"))
    assert caught.value.exit_code == 74 and "/proc/nope" in str(caught.value)
    assert (records(out)["status"], records(out)["exit_code"]) == ("disk", 74)
    assert logging.getLogger().handlers == handlers and not (out / ".run.owner.json").exists()


def test_a_command_that_is_refused_keeps_the_record_of_the_run_before_it(out):
    with start_run(options(out)) as run:
        train(run)
    before = (out / "run.json").read_bytes()
    with pytest.raises(UserError), start_run(options(out)) as run:
        raise UserError(Problem("other rank", "", "", ""))
    assert (out / "run.json").read_bytes() == before
    with start_run(options(out)) as run:
        train(run, steps=5)
    assert records(out)["step"] == 5


def test_a_first_command_that_is_refused_says_so(out):
    with pytest.raises(UserError), start_run(options(out)):
        raise UserError(Problem("no such model", "", "", ""))
    assert (records(out)["status"], records(out)["exit_code"]) == ("usage", 2)


@pytest.mark.parametrize("well", [True, False])
def test_a_run_leaves_nothing_of_itself_in_the_process(out, well):
    """For a notebook's next cell, or its next training in another precision."""
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        return handlers, logging.getLogger().handlers[:], torch.get_float32_matmul_precision(), "absent" in sys.modules

    before = state()
    asked = options(out, precision="bf16")
    asked.precision.allow_tf32 = True
    with nullcontext() if well else suppress(UserError), own_settings():  # as around each command's main
        leave_out("absent")
        with start_run(asked) as run:
            assert state() != before
            if not well:
                raise UserError(Problem("refused", "", "", ""))
            train(run)
    assert state() == before
    with own_settings(), start_run(options(out)) as run:
        assert run.precision == "no"


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_the_launcher_wants_and_we_do_not_use_is_refused(out, monkeypatch, flag):
    monkeypatch.setenv(flag, "true")
    with pytest.raises(UserError, match="not yet") as caught:
        start_run(options(out))
    assert caught.value.exit_code == 2 and not out.exists()


def test_flags_without_effect_are_warned_of_once(out, caplog):
    with start_run(options(out)):
        pass
    [told] = [r for r in caplog.records if "--class_prompt" in r.getMessage()]
    assert told.levelname == "WARNING" and told.getMessage() == "--class_prompt has no effect: 100% of it"


@pytest.mark.parametrize("stop, status", [(2, "stopped early"), (4, "done")])
def test_a_session_that_ends_before_the_last_step_is_not_done(out, stop, status):
    with start_run(options(out)) as run:
        train(run, steps=4, stop=stop)
    assert (records(out)["status"], records(out)["exit_code"]) == (status, 0)


def test_a_run_that_learned_nothing_is_not_done(out):
    with pytest.raises(UserError, match="nothing was learned") as caught, start_run(options(out)) as run:
        train(run, steps=2, factor=math.nan)
        assert not run.healthy
        run.require_progress()
    assert caught.value.exit_code == 5 and records(out)["status"] == "nonfinite"


def test_a_run_that_diverges_in_its_last_steps_is_not_done(out):
    with pytest.raises(UserError, match="the last 2 steps were skipped") as caught, start_run(options(out)) as run:
        train(run, steps=2)
        train(run, steps=4, start=2, factor=math.nan)
        run.require_progress()
    assert caught.value.exit_code == 5 and records(out)["status"] == "nonfinite"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_written(out, bad):
    optimizer = Optim([nn.Parameter(torch.tensor([1.0, bad]))])
    with pytest.raises(UserError, match="not finite after step 3") as caught, start_run(options(out)) as run:
        run.require_finite(optimizer, 3)
    assert caught.value.exit_code == 5


def test_a_loss_that_depends_on_nothing_trained_adds_no_gradient():
    weight = nn.Parameter(torch.ones(2))
    gradients = Gradients(torch.device("cpu"))
    gradients.backward(torch.tensor(2.0))
    gradients.backward((3 * weight).sum())
    update = gradients.update(Optim([weight]), step=0, max_grad_norm=None)
    assert update.loss == 8 and update.grad_norm == pytest.approx(18**0.5)


def test_one_bad_step_is_no_lack_of_progress_and_a_good_one_heals(out):
    with start_run(options(out)) as run:
        train(run, steps=1, factor=math.nan)
        assert not run.healthy
        train(run, steps=2, start=1)
        assert run.healthy
        run.require_progress()


def test_a_run_with_no_step_left_made_its_progress_before(out):
    with start_run(options(out)) as run:
        train(run, steps=4, start=4)
        run.require_progress()
    assert records(out)["status"] == "done"


@pytest.mark.parametrize("there", [False, True])
def test_previews_are_begun_and_drawn_before_the_first_step_unless_they_are_there(out, there):
    told = []
    previews = SimpleNamespace(begin=lambda start: told.append(("begin", start)), missing=lambda step, last: not there,
                               generate=lambda step, watch: told.append(("generate", step)) or {})
    with start_run(options(out)) as run:
        run.begin(2, 4, previews)
    assert told == [("begin", 2), *([] if there else [("generate", 2)])]


@pytest.mark.parametrize("rank, line", [("0", "stopped by Ctrl-C\n"), ("1", "rank 1: stopped by Ctrl-C\n")])
def test_ctrl_c_while_libraries_load_is_one_line(monkeypatch, capsys, rank, line):
    monkeypatch.setenv("RANK", rank)

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_with_message(main)
    assert caught.value.code == 130 and capsys.readouterr().err == line


@pytest.mark.parametrize("rank, told", [("0", "WARNING 3 images have no caption\n"), ("1", "")])
def test_what_is_logged_before_the_run_reads_as_in_it(monkeypatch, capsys, rank, told):
    """Preflight comes before the run's own handler."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    exit_with_message(lambda: logging.getLogger("preflight").warning("%d images have no caption", 3))
    assert capsys.readouterr().err == told


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_and_gives_the_exit_code(out, name, code):
    number, done = getattr(signal, name), []
    before = signal.getsignal(number)

    def after(step):
        done.append(step)
        if step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        train(run, steps=9, after=after)
    assert caught.value.exit_code == code and done == [1, 2, 3]
    assert "checkpoint-3" in str(caught.value) and "--resume_from_checkpoint latest" in str(caught.value)
    assert records(out)["status"] == ("stopped" if code == 130 else "preempted") and records(out)["exit_code"] == code
    assert signal.getsignal(number) == before, "handlers must be given back"


def test_a_signal_before_the_first_step_ends_the_run_where_it_is(out):
    with pytest.raises(UserError, match="nothing to save") as caught, start_run(options(out)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.exit_code == 75


def test_a_signal_before_the_first_step_sends_nobody_to_a_checkpoint_that_is_not_there(out):
    with pytest.raises(UserError) as caught, start_run(options(out)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.problems[0].fix == "start the same command again"


def test_a_signal_that_a_library_swallows_ends_the_run_at_the_next_look(out):
    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        run.show_task("generating class images", 1, 9)
    assert caught.value.exit_code == 75 and "before the first step" in str(caught.value)


class Saves:
    """Checkpoints that are counted, and not written."""

    def __init__(self, every: int):
        self.every, self.saved, self.steps = every, None, []

    def due(self, step, *, stop, total):
        return step % self.every == 0 or step == stop

    def announce(self, start, *, stop, total):
        pass

    def save(self, step, *, prune):
        if self.saved != step:
            self.steps.append(step)
        self.saved = step
        return Path(f"checkpoint-{step}")


class SlowPreviews:
    """A preview that a signal comes into."""

    def __init__(self, at: int, name: str):
        self.at, self.number, self.looks = at, getattr(signal, name), 0

    def begin(self, start):
        pass

    def missing(self, start, *, last):
        return start == self.at

    def due(self, step, *, last):
        return step == self.at

    def generate(self, step, watch):
        os.kill(os.getpid(), self.number)
        while not watch(1, 2):
            self.looks += 1
        return {}


def loop(run: Run, saves: Saves, previews: SlowPreviews, *, start: int = 0, total: int = 4):
    model = linear()
    optimizer = Optim(model.parameters())
    optimizer.begin, optimizer.describe = lambda step: None, dict
    step = SimpleNamespace(__call__=None, passes=SimpleNamespace(describe=dict))
    run.train(
        type("Step", (), {"__call__": lambda _, __: [(model(rows()) ** 2).mean()], "passes": step.passes})(),
        ((k, []) for k in range(start, total)), optimizer, SimpleNamespace(after_update=lambda done: None), saves,
        previews, start=start, stop=total, total=total)


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("at, saved", [(2, [2]), (3, [3]), (4, [4])])
def test_a_signal_ends_previews_and_saves_the_step_they_were_of(out, name, code, at, saved):
    saves = Saves(every=100)
    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        loop(run, saves, SlowPreviews(at, name))
    assert caught.value.exit_code == code and saves.steps == saved
    assert f"step {at} is finished and saved" in str(caught.value)
    assert records(out)["step"] == at


@pytest.mark.parametrize("start", [0, 2])
def test_a_signal_in_the_previews_before_the_first_step_ends_the_run_at_once(out, start):
    saves, previews = Saves(every=1), SlowPreviews(start, "SIGTERM")
    previews.generate = lambda step, watch: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))
    begun = time.monotonic()
    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        loop(run, saves, previews, start=start)
    assert caught.value.exit_code == 75 and saves.steps == [] and time.monotonic() - begun < 3


def test_a_signal_while_files_are_published_ends_the_run_at_once_and_says_what_is_saved(out):
    saves = Saves(every=100)
    out.mkdir()
    files.write_json(out / "latest.json", {"checkpoint": "checkpoint-4", "step": 4})
    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        loop(run, saves, SlowPreviews(99, "SIGTERM"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.exit_code == 75 and saves.steps == [4]
    assert "checkpoint-4" in str(caught.value) and "--resume_from_checkpoint latest" in str(caught.value)


def test_a_session_with_no_step_left_prunes(out):
    saves = Saves(every=1)
    saves.saved, calls = 4, []
    saves.save = lambda step, prune: calls.append((step, prune))
    with start_run(options(out)) as run:
        loop(run, saves, SlowPreviews(99, "SIGTERM"), start=4)
    assert calls == [(4, True)]


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda out: out.rename(out.with_name("moved")),
                                  lambda out: (shutil.rmtree(out), out.write_text("a file"))],
                         ids=["removed", "moved", "a file"])
def test_an_output_folder_that_is_gone_ends_the_run_at_the_next_write(out, harm):
    """And nothing makes it again, which would hide the loss."""
    def after(step):
        if step == 2:
            harm(out)

    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        train(run, steps=9, after=after)
    assert caught.value.exit_code == 74 and str(out) in str(caught.value) and not out.is_dir()
    assert run._step == 3, "the write after the third step is the next one"


def test_a_reader_that_misses_a_file_because_the_folder_is_gone_is_told_as_a_disk_error(out):
    with pytest.raises(UserError) as caught, start_run(options(out)) as run:
        train(run, steps=1)
        shutil.rmtree(out)
        (out / "run.json").read_bytes()
    assert caught.value.exit_code == 74


def test_a_second_ctrl_c_ends_at_once():
    if (pid := os.fork()) == 0:
        signals = Signals()
        signals.install()
        signals.patient = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


@pytest.mark.parametrize("number, kind", [(signal.SIGTERM, "preempted"), (signal.SIGINT, "stopped")])
def test_a_signal_while_an_image_is_decoded_is_no_damaged_image(number, kind, out, tmp_path, monkeypatch):
    """`decode` makes every error of Pillow an unreadable image: what a signal raises must pass it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: os.kill(os.getpid(), number))
    with pytest.raises(UserError) as caught, start_run(options(out)):
        decode((tmp_path / "a.png").read_bytes())
    assert caught.value.problems[0].kind == kind and "ended by" in str(caught.value)


def test_a_signal_between_start_and_run_has_its_exit_code(capsys):
    def main():
        signals = Signals()
        signals.install()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signals.restore()

    with pytest.raises(SystemExit) as ended:
        exit_with_message(main)
    assert ended.value.code == 75 and "start the same command again" in capsys.readouterr().err


def test_a_wish_is_no_workers_business():
    signals = Signals()
    signals.install()
    if (pid := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(7 if signals.wish is None else 1)
    signals.restore()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_the_death_of_the_launcher_is_a_sigterm(tmp_path):
    trainer = ("import os, signal, sys, time; from trainkit.runtime.signals import Signals, end_with_launcher\n"
               "s = Signals(); s.patient = True; s.install(); end_with_launcher(); print('up', flush=True)\n"
               "for _ in range(200):\n"
               "    if s.wish: open(sys.argv[1], 'w').write(s.wish); break\n"
               "    time.sleep(0.05)\n")
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {trainer!r}, sys.argv[1]]).wait()"
    mark = tmp_path / "wish"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, str(mark)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent,
        env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"},
    )
    assert process.stdout.readline() == b"up\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.05)
    assert mark.read_text() == "preempted"


# -- the lock ---------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_within_a_second_naming_the_first(out):
    out.mkdir()
    ready, go = os.pipe()
    if (pid := os.fork()) == 0:
        lock = OutputLock(out)
        lock.acquire()
        os.write(go, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    begun = time.monotonic()
    with pytest.raises(UserError, match="another run") as caught:
        start_run(options(out))
    assert time.monotonic() - begun < 1 and f"process {pid} on" in str(caught.value) and caught.value.exit_code == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with start_run(options(out)):
        assert json.loads((out / ".run.owner.json").read_text())["pid"] == os.getpid()


def test_the_lock_is_given_back(out):
    for _ in range(2):
        with start_run(options(out)):
            pass


# -- the line ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_tells_step_loss_rate_speed_images_time_and_note(monkeypatch):
    monkeypatch.setattr(line_room, "memory", lambda: "0.7 GB")
    pace = Pace(400, 0)
    pace.mark(1, 100.0)  # the first step took 100 s of compiling
    pace.mark(101, 120.0)
    values = {"lr/unet": 1.0, "d/unet": 2e-5, "images": 404.0}
    assert line_room.line(pace, 0.08421, values, notes=["next save 200"]) == (
        "101/400 · loss 0.0842 · d·lr 2.0e-05 · 5.00 it/s · 404 images · 1:00 left · 0.7 GB · next save 200")


def test_on_a_terminal_the_line_is_rewritten_and_log_records_stand_above_it():
    stream = Terminal()
    progress = Progress(stream)
    progress.begin(0, 3)
    progress.update(1, {"loss": 0.5})
    line_room.LineHandler(progress).emit(logging.makeLogRecord({"msg": "saved", "levelno": logging.INFO}))
    progress.update(3, {"loss": 0.5})
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 2 and "\rsaved\n" in text and text.endswith("\n")


def test_in_a_log_file_the_line_appears_seldom_and_at_the_end():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.begin(0, 50)
    for step in range(1, 51):
        progress.update(step, {"loss": 1.0})
    assert [text.split("/")[0] for text in stream.getvalue().splitlines()] == ["1", "50"]
    assert "\r" not in stream.getvalue()


def test_a_loss_that_is_not_finite_does_not_spoil_the_shown_average():
    progress = Progress(io.StringIO())
    for step, loss in enumerate([1.0, math.nan, 1.0], 1):
        progress.update(step, {"loss": loss})
    assert progress.loss == pytest.approx(1.0)


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    f"token {SECRET} here", "https://user:letmein@example.org/x", "key AKIAABCDEFGHIJKLMNOP", "sk-0123456789abcdefghij",
])
def test_tokens_are_masked_wherever_they_stand(text):
    masked = redact(text)
    assert "***" in masked
    assert not any(secret in masked for secret in (SECRET, "letmein", "AKIAABCD", "0123456789abc"))


def test_the_environments_keys_are_masked_too(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert redact("logged in with 0123456789abcdef") == "logged in with ***"
    assert redacted_command(["t.py", "--hub_token"]) == ["t.py", "--hub_token"]
    assert redacted_command(["--hub-token", "abc", "--hub-token=abc"]) == ["--hub-token", "***", "--hub-token=***"]


@pytest.mark.parametrize("meet", [
    ranks.barrier, lambda: ranks.from_main(lambda: 1), lambda: ranks.sum_over_ranks(torch.ones(2))])
def test_a_sibling_that_ended_is_one_line_and_no_traceback(monkeypatch, meet):
    def closed(*args, **kwargs):
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234\nmore")

    for name in ("barrier", "broadcast_object_list", "all_reduce"):
        monkeypatch.setattr(f"torch.distributed.{name}", closed)
    monkeypatch.setattr(ranks, "_on_cpus", lambda everyone: everyone)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    with pytest.raises(UserError, match="another process of this run has ended") as caught:
        meet()
    assert caught.value.exit_code == 1 and "Connection closed" in caught.value.problems[0].why
