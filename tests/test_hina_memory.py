"""Where HinaAdaptive's states lie: rounding, arenas, residency, what is measured and what making room does."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import weakref
from collections import defaultdict

import pytest
import torch

from trainkit.optim.hina import HinaAdaptive, memory, offload_stream, placing, storage
from trainkit.optim.hina.rounding import Rounder, join, split

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")
SETTINGS = dict(seed=0, memory_efficient=True, max_buffer_memory_mb=500, vram_budget_gb=16.0)


class Toy(torch.optim.Optimizer):
    """Adam without a decay, its states kept by the storage: what the storage needs of an optimizer and no more."""

    def __init__(self, params, **settings):
        super().__init__(params, SETTINGS | dict(lr=1e-2) | settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            buckets = defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p].setdefault("step", torch.zeros(()))
                self.state[p]["step"] += 1
                buckets[p.shape, p.dtype, p.device, int(self.state[p]["step"])].append(p)
            for (*_, t), params in buckets.items():
                for chunk in storage.stream(
                        self.state, group, params, names=("exp_avg", "exp_avg_sq"), scalars=("seen",), step=t,
                        scratch_bytes=storage.scratch_limit(group), scratch=storage.scratch_of(self)):
                    adam(chunk, group["lr"])

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        placing.restore(self, state_dict)


def adam(chunk: storage.Chunk, lr: float) -> None:
    m, v, t = chunk.state["exp_avg"], chunk.state["exp_avg_sq"], chunk.step
    m.lerp_(chunk.g, 0.1)
    v.mul_(0.999).addcmul_(chunk.g, chunk.g, value=0.001)
    chunk.state["seen"].add_(1)
    chunk.w.addcdiv_(m / (1 - 0.9**t), (v / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-lr)


def parameters(dtype=torch.float32, *, device=CPU, shapes=((16, 40), (40, 16), (16, 40), (7,), (), (16, 40), (7,))):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def train(optimizer, steps, *, start=0, without=()):
    """Gradients are a function of the step; parameters `without` have none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + t)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            p.grad = None if i in without else grad
        optimizer.step()
    return params


def snapshot(optimizer):
    """Weights and states, copies on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [{k: v.detach().cpu().clone() for k, v in optimizer.state[p].items()} for p in params]
    return [p.detach().cpu().clone() for p in params], states


def assert_equal(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- rounding ---------------------------------------------------------------------------------------------------------


def rounder(indices=(0,), numel=1000, **key):
    return Rounder(indices, numel, CPU, names=("m", "v"), **(dict(seed=3, step=5) | key))


def rounded(x, rounder, name="m", lo=0):
    target = torch.empty(x.shape, dtype=torch.bfloat16)
    rounder.round_(target, x, name, lo)
    return target


def test_stochastic_rounding_is_unbiased():
    """H26: the mean error of 2,000 roundings is below 3 standard errors, for every one of several fractions."""
    x = (1 + torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 0.999]) / 128)[None].repeat(1, 1)
    errors = torch.stack([rounded(x, rounder(numel=6, step=t)).double() - x for t in range(2000)])
    spread = errors.std(0).clamp_min(1e-12) / 2000**0.5
    assert (errors.mean(0).abs() <= 3 * spread).all()


def test_noise_is_uniform_over_elements_and_over_steps():
    within = rounder(numel=1 << 16).noise("m", 0, 1).double()
    over = torch.stack([rounder(numel=3, step=t).noise("m", 0, 1)[0] for t in range(4000)]).double()
    for sample in (within.flatten(), *over.T):
        assert abs(sample.mean() - 32767.5) < 4 * 65536 / 12**0.5 / len(sample)**0.5
        counts = torch.histc(sample, bins=16, min=0, max=65536)
        expected = len(sample) / 16
        assert ((counts - expected)**2 / expected).sum() < 45  # chi² of 15 degrees: 45 is p = 8e-5


def test_noise_of_elements_steps_names_and_parameters_does_not_go_together():
    def draw(name="m", index=0, **key):
        return rounder((index,), numel=4000, **key).noise(name, 0, 1)[0].double()
    base = draw()
    others = [base.roll(1), base.roll(64), draw("v"), draw(index=1), draw(step=6), draw(seed=4)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 4.5 / 4000**0.5
    pair = torch.stack([rounder(numel=4000, step=t).noise("m", 0, 1)[0, [10, 11, 700]].double() for t in range(3000)])
    assert (torch.corrcoef(pair.T) - torch.eye(3)).abs().max() < 4.5 / 3000**0.5


def test_sums_over_a_tensor_scatter_as_those_of_independent_roundings():
    x = torch.full((1, 5000), 1 + 0.3 / 128)
    sums = torch.tensor([(rounded(x, rounder(numel=5000, step=t)).double() - x).sum() for t in range(400)])
    independent = (5000 * 0.3 * 0.7)**0.5 / 128
    assert 0.7 < sums.std() / independent < 1.4


def test_chunking_does_not_change_a_bit():
    x = torch.randn(6, 10, 100)
    whole = rounded(x, rounder((4, 0, 9, 2, 3, 7)))
    parts = rounder((4, 0, 9, 2, 3, 7))
    pieces = [rounded(x[lo:hi].clone(), parts, lo=lo) for lo, hi in ((0, 1), (1, 5), (5, 6))]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole[2:3], rounded(x[2:3].clone(), rounder((9,))))
    assert not torch.equal(whole, rounded(x, rounder((4, 0, 9, 2, 3, 7), step=6)))


def test_noise_is_the_same_on_every_machine():
    """Numbers written down once: another device, version or platform must hash to the same."""
    assert rounder((0, 5), numel=4).noise("m", 0, 2).tolist() == NOISE


NOISE = [[4192, 18819, 33446, 40277], [16702, 57881, 33525, 60347]]


def test_what_bf16_holds_stays_and_what_is_not_finite_stays_so():
    exact = torch.randn(1, 500).bfloat16().float()
    assert torch.equal(rounded(exact, rounder(numel=500)).float(), exact)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, 3.4028235e38]).repeat(400)[None]
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32).repeat(400)[None]
    got, wild = rounded(odd, rounder(numel=2800)).view(400, 7), rounded(bits, rounder(numel=1200))
    assert (got[:, 0] == torch.inf).all() and (got[:, 1] == -torch.inf).all()
    assert got[:, 2].isnan().all() and wild.isnan().all()
    assert (got[:, 3:5] == 0).all() and (got[:, 5].float() <= 1e-40).all() and (got[:, 6] > 3e38).all()


def test_halves_make_the_whole_again():
    x = torch.cat([torch.randn(10000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4028235e38, 1e-45, -1e-45])])
    x = torch.cat([x, torch.randint(-2**31, 2**31 - 1, (10000,)).to(torch.int32).view(torch.float32)])
    high, low = split(x)
    same = join(high, low)
    ok = x.isnan() & same.isnan() & high.isnan()
    assert (ok | (x.view(torch.int32) == same.view(torch.int32))).all()
    normal = x[:10000]
    nearest = (normal.bfloat16().float() - normal).abs()
    assert ((high[:10000].float() - normal).abs() <= nearest).all()


def test_a_decaying_average_decays_in_bf16():
    """H26: round-to-nearest leaves v standing at .999; the stochastic one follows .999^t."""
    p = torch.nn.Parameter(torch.zeros(4000))
    optimizer = Toy([p], reduce_precision=True, lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].float().mean()
    p.grad = torch.zeros_like(p)
    for _ in range(400):
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean() / first == pytest.approx(0.999**400, rel=0.02)


# --- stream and arenas ------------------------------------------------------------------------------------------------


def reference(params, steps):
    """torch's Adam on clones, with the gradients of `train`."""
    clones = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return train(torch.optim.Adam(clones, lr=1e-2), steps)


@pytest.mark.parametrize("cache", [1, 1000, 1 << 20])
def test_the_stream_gives_every_parameter_its_own_state(monkeypatch, cache):
    monkeypatch.setattr(storage, "CACHE_ELEMENTS", cache)
    params = parameters()
    expected = reference(params, 5)
    train(Toy(params), 5)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"reduce_precision": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_sizes_change_no_bit(monkeypatch, settings, dtype):
    results = []
    for cache, limit in ((1, 500), (1000, 500), (1 << 20, 500), (1 << 20, 0.02)):
        monkeypatch.setattr(storage, "CACHE_ELEMENTS", cache)
        optimizer = Toy(parameters(dtype), max_buffer_memory_mb=limit, **settings)
        train(optimizer, 4)
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_equal(results[0], other)


def test_gradients_of_any_layout_and_weights_of_any_layout():
    plain = parameters(shapes=((4, 3, 5, 6),) * 3)
    odd = [torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in plain]
    for p, q in zip(plain, odd, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.transpose(2, 3).contiguous().transpose(2, 3)
    Toy(plain).step()
    Toy(odd).step()
    assert all(torch.equal(p, q) and q.is_contiguous(memory_format=torch.channels_last)
               for p, q in zip(plain, odd, strict=True))


def test_tensors_without_elements_pass():
    params = parameters(shapes=((0, 4), (0, 4), (3,)))
    train(Toy(params, reduce_precision=True), 2)
    assert params[0].shape == (0, 4)


def arenas(optimizer):
    """name -> how many storages hold it."""
    found = defaultdict(set)
    for s in memory.state_tensors(optimizer):
        found[s.name].add(s.tensor.untyped_storage().data_ptr())
    return {name: len(found[name]) for name in ("exp_avg", "exp_avg_sq", "seen")}


def test_states_of_a_bucket_share_one_storage_and_need_no_copy():
    params = parameters()
    optimizer = Toy(params)
    train(optimizer, 1)
    assert arenas(optimizer) == {"exp_avg": 4, "exp_avg_sq": 4, "seen": 4}  # (16,40) (40,16) (7,) ()
    same = [p for p in params if p.shape == (16, 40)]
    with torch.no_grad():
        chunk, = storage.stream(optimizer.state, optimizer.param_groups[0], same, names=("exp_avg",), step=2)
    assert chunk.state["exp_avg"].data_ptr() == optimizer.state[same[0]]["exp_avg"].data_ptr()


def test_neighbours_of_other_storages_are_no_arena():
    whole = torch.arange(12.0)
    parts = list(whole.view(3, 4).unbind())
    assert torch.equal(offload_stream.adjacent(parts), whole.view(3, 4))
    assert offload_stream.adjacent([parts[0], parts[2]]) is None
    assert offload_stream.adjacent([parts[1], parts[0]]) is None
    assert offload_stream.adjacent([p.clone() for p in parts]) is None
    beside = [torch.from_numpy(whole.numpy()[i * 4:i * 4 + 4]) for i in range(3)]  # one memory, three storages
    assert offload_stream.adjacent(beside) is None
    assert offload_stream.adjacent(list(whole.view(4, 3).T.unbind())) is None


def test_a_parameter_without_gradient_stands_still_and_joins_later():
    params = parameters()
    optimizer = Toy(params)
    before = params[2].detach().clone()
    train(optimizer, 2, without=(2,))
    assert torch.equal(params[2], before) and params[2] not in optimizer.state
    train(optimizer, 2, start=2)
    assert optimizer.state[params[2]]["step"] == 2 and optimizer.state[params[0]]["step"] == 4
    train(optimizer, 2, start=4, without=(0,))
    assert optimizer.state[params[0]]["seen"] == 4 and optimizer.state[params[5]]["seen"] == 6


VARIANTS = [
    pytest.param(dtype, settings, id=f"{str(dtype)[6:]}-{'-'.join(settings) or 'plain'}")
    for dtype, settings in itertools.product(
        (torch.float32, torch.bfloat16), ({}, {"reduce_precision": True}, {"cpu_offload_states": True}))
] + [pytest.param(torch.bfloat16, {"master_weights": True}, id="master"),
     pytest.param(torch.bfloat16, {"master_weights": True, "reduce_precision": True}, id="master-reduced")]


@pytest.mark.parametrize(("dtype", "settings"), VARIANTS)
@pytest.mark.parametrize("through", [copy.deepcopy, saved_and_loaded, lambda d: d])
def test_a_resumed_run_is_bitwise_the_run(dtype, settings, through):
    """H3, H4: dtypes come back, steps go on as if nothing had happened, a parameter without gradients included."""
    whole = Toy(parameters(dtype), **settings)
    train(whole, 3, without=(2,))
    state = through(whole.state_dict())
    half = Toy([torch.nn.Parameter(p.detach().clone()) for p in whole.param_groups[0]["params"]], **settings)
    half.load_state_dict(state)
    assert_equal(snapshot(whole), snapshot(half))
    assert arenas(half)["exp_avg"] == 4
    train(whole, 3, start=3)
    train(half, 3, start=3)
    assert_equal(snapshot(whole), snapshot(half))


def test_a_loaded_state_shares_no_memory_with_what_it_was_loaded_from():
    one, other = Toy(parameters()), Toy(parameters())
    train(one, 2)
    other.load_state_dict(one.state_dict())
    before = snapshot(one)
    train(other, 2, start=2)
    assert_equal(before, snapshot(one))


def test_a_copied_optimizer_goes_on_alike_with_arenas_of_its_own():
    one = Toy(parameters(), reduce_precision=True)
    train(one, 2)
    two = copy.deepcopy(one)
    assert arenas(two) == arenas(one)
    apart = {s.tensor.data_ptr() for s in memory.state_tensors(one) if s.tensor.numel()}
    assert apart.isdisjoint(s.tensor.data_ptr() for s in memory.state_tensors(two) if s.tensor.numel())
    train(one, 2, start=2)
    train(two, 2, start=2)
    assert_equal(snapshot(one), snapshot(two))


def test_the_group_decides_what_a_loaded_state_becomes():
    one = Toy(parameters())
    train(one, 2)
    state = one.state_dict()
    state["param_groups"][0]["reduce_precision"] = True
    two = Toy(parameters())
    two.load_state_dict(state)
    exp_avg = two.state[two.param_groups[0]["params"][0]]["exp_avg"]
    assert exp_avg.dtype == torch.bfloat16
    near = one.state[one.param_groups[0]["params"][0]]["exp_avg"]
    torch.testing.assert_close(exp_avg.float(), near, rtol=2**-7, atol=0)


def test_a_master_of_two_halves_is_an_fp32_master():
    """H26: 16+16 bits train as fp32 does, bit for bit."""
    low = parameters(torch.bfloat16)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    train(Toy(low, master_weights=True), 1)
    halves, whole = Toy(low, master_weights=True), Toy(full)
    for t in range(30):
        for p, q in zip(low, full, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(t)).bfloat16().float()
            p.grad = q.grad.bfloat16()
        if t == 0:
            for p, q in zip(low, full, strict=True):
                q.data.copy_(p.detach().float())
        halves.step()
        whole.step()
    for p, q in zip(low, full, strict=True):
        assert torch.equal(join(p.detach(), halves.state[p]["master_low"]), q.detach())


def test_bf16_weights_move_by_steps_below_their_resolution():
    p = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = Toy([p], lr=1e-5)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.detach().float().mean() == pytest.approx(1 - 100e-5, abs=1e-4)


def test_new_states_start_as_told():
    params = parameters(shapes=((5, 6),) * 3)
    for p in params:
        p.grad = torch.ones_like(p)
    state = defaultdict(dict)
    with torch.no_grad():
        for _ in range(2):
            for chunk in storage.stream(
                    state, {"params": params}, params, names=("anchor", "lr_mask"), scalars=("tam",), step=1,
                    initial={"anchor": torch.clone, "lr_mask": 1e-4, "tam": 0.5}, read_only=("anchor",)):
                assert chunk.state["tam"].shape == (3,)
                chunk.w.add_(1)
    for p in params:
        torch.testing.assert_close(state[p]["anchor"] + 2, p.detach())
        assert (state[p]["lr_mask"] == 1e-4).all() and state[p]["tam"] == 0.5


def test_a_replaced_state_is_our_mistake_and_said():
    params = parameters(shapes=((3,),))
    params[0].grad = torch.ones(3)
    with torch.no_grad(), pytest.raises(AssertionError, match="in place"):
        for chunk in storage.stream(defaultdict(dict), {"params": params}, params, names=("exp_avg",), step=1):
            chunk.state["exp_avg"] = chunk.g


def test_offloading_on_the_cpu_does_nothing_and_says_so_once(caplog):
    plain, moved = Toy(parameters()), Toy(parameters(), cpu_offload_states=True)
    train(plain, 3)
    with caplog.at_level(logging.WARNING):
        train(moved, 3)
    assert sum("cpu_offload_states" in r.message for r in caplog.records) == 1
    assert_equal(snapshot(plain), snapshot(moved))


# --- the offload stream: what cannot run here is checked for order ----------------------------------------------------


class Clock:
    """A stream that runs nothing: it knows which operations of the others are sure to be over before its next one.

    known  stream -> how many of its operations are over
    """

    def __init__(self, name: str):
        self.name, self.known = name, defaultdict(int)

    def operate(self) -> dict[str, int]:
        self.known[self.name] += 1
        return dict(self.known)

    def record_event(self):
        return dict(self.known)

    def wait_event(self, event):
        for name, count in event.items():
            self.known[name] = max(self.known[name], count)

    def wait_stream(self, other):
        self.wait_event(other.known)


class Harbour:
    """Stands for torch.cuda: three streams, and a log of who read and wrote which rows knowing what."""

    def __init__(self):
        self.up, self.down, self.main = Clock("up"), Clock("down"), Clock("main")
        self.now = self.main
        self.log = []  # (stream, its count, what it knew, memory, writes)

    def current_stream(self, device):
        return self.main

    def stream(self, clock):
        harbour = self

        class Inside:
            def __enter__(self):
                harbour.now = clock

            def __exit__(self, *_):
                harbour.now = harbour.main
        return Inside()

    def access(self, tensor, *, writes):
        known = self.now.operate()
        self.log.append((self.now.name, known[self.now.name], known, tensor.data_ptr(), writes))

    def races(self):
        """Pairs of accesses to the same memory, one of them a write, neither of which is sure to come first."""
        for (s1, n1, _, m1, w1), (s2, _, k2, m2, w2) in itertools.combinations(self.log, 2):
            if m1 == m2 and (w1 or w2) and s1 != s2 and k2.get(s1, 0) < n1:
                yield s1, s2, m1


def sail(monkeypatch, harbour, *, chunks=5, steps=2, read_only=(), host=None):
    """Buckets of `chunks` chunks, step after step, one row and one addition each."""
    host = host or {"m": [torch.full((4,), float(i)) for i in range(chunks)]}
    monkeypatch.setattr(offload_stream.torch, "get_device_module", lambda device: harbour)
    monkeypatch.setattr(offload_stream, "streams", lambda device: (harbour.up, harbour.down))
    real = {"gather": offload_stream.gather, "scatter": offload_stream.scatter}

    def gather(tensors, rows):
        harbour.access(tensors[0], writes=False)
        harbour.access(rows, writes=True)
        real["gather"](tensors, rows)

    def scatter(tensors, rows):
        harbour.access(rows, writes=False)
        harbour.access(tensors[0], writes=True)
        real["scatter"](tensors, rows)

    monkeypatch.setattr(offload_stream, "gather", gather)
    monkeypatch.setattr(offload_stream, "scatter", scatter)
    spans = storage.cut(chunks, 1)
    for _ in range(steps):
        before, at = harbour.main.operate(), len(harbour.log)
        boat = offload_stream.OffloadStream(host, spans, CPU, read_only=read_only)
        for slot in boat.slots:  # whose memory the allocator may have taken from something on the main stream
            harbour.log[at:at] = [("main", before["main"], before, rows.data_ptr(), True) for rows in slot.values()]
        boat_rows = []
        for c in range(chunks):
            rows = boat.take(c)
            harbour.access(rows["m"], writes=True)
            rows["m"] += 1
            boat_rows.append(rows["m"])
            boat.give(c)
        boat.close()
        for rows in boat_rows:  # and may give it to the next on the main stream
            harbour.access(rows, writes=True)
    return host


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_no_copy_of_the_offload_stream_races_another_or_the_rules(monkeypatch, chunks):
    harbour = Harbour()
    host = sail(monkeypatch, harbour, chunks=chunks)
    assert [t[0].item() for t in host["m"]] == [i + 2 for i in range(chunks)]
    assert not list(harbour.races())


def test_the_offload_stream_fetches_the_next_chunk_before_the_rules_see_this_one(monkeypatch):
    harbour = Harbour()
    sail(monkeypatch, harbour, chunks=3, steps=1)
    order = [name for name, *_, writes in harbour.log if writes]
    assert order[:6] == ["main", "main", "up", "up", "main", "down"]  # slots made; chunks 0 and 1 up; 0 ruled; 0 down


@pytest.mark.parametrize("waits", ["up.wait_stream", "up.wait_event", "main.wait_event", "main.wait_stream",
                                   "down.wait_event"])
def test_each_wait_of_the_offload_stream_is_needed(monkeypatch, waits):
    """The test above would see a wait that is missing."""
    harbour = Harbour()
    stream, wait = waits.split(".")
    monkeypatch.setattr(getattr(harbour, stream), wait, lambda other: None)
    sail(monkeypatch, harbour)
    assert list(harbour.races())


def test_the_offload_stream_does_not_bring_back_what_is_read_only(monkeypatch):
    host = sail(monkeypatch, Harbour(), read_only=("m",))
    assert [t[0].item() for t in host["m"]] == list(range(5))


def test_states_to_fetch_come_in_several_chunks(monkeypatch):
    """So that there is something to fetch while the rules are at work, without a limit too."""
    params = parameters(shapes=((5,),) * 10)
    layout = storage.BucketLayout({p: {} for p in params}, {"params": params}, params, names=(), step=1)
    assert layout.rows(None, 100) == 10
    monkeypatch.setattr(storage.BucketLayout, "slot_bytes", lambda self: 40)
    assert layout.rows(None, 100) == 3 and layout.rows(100, 100) == 1
    assert storage.scratch_limit(SETTINGS | {"memory_efficient": False}) is None
    assert storage.scratch_limit(SETTINGS | {"memory_efficient": False, "offloaded": "exp_avg"}) == 500 * 2**20


def test_host_memory_that_cannot_be_pinned_serves_and_is_said_once(caplog):
    if torch.cuda.is_available():
        pytest.skip("it can be pinned here")
    placing.say_unpinned.cache_clear()
    with caplog.at_level(logging.WARNING):
        arenas = [placing.new_arena(2, (3,), torch.float32, CPU, pinned=True) for _ in range(2)]
    assert all(a.shape == (2, 3) and not a.any() for a in arenas)
    assert sum("pageable" in r.message for r in caplog.records) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "per_element"), [({}, 8), ({"reduce_precision": True}, 4)])
def test_state_bytes_are_the_sum_of_the_storages(settings, per_element):
    """H27: exact, and flat from the second step to the last."""
    params = parameters()
    optimizer = Toy(params, **settings)
    train(optimizer, 2)
    elements = sum(p.numel() for p in params)
    got = memory.get_memory_stats(optimizer)["state_bytes"]
    scalars = 4 * len(params)  # "seen", and "step"
    assert got["by_name"] == {"step": scalars, "seen": scalars, "exp_avg": per_element // 2 * elements,
                              "exp_avg_sq": per_element // 2 * elements}
    assert got["total"] == got["device"] == per_element * elements + 2 * scalars
    assert got["bytes_per_param"] == got["total"] / elements
    assert got["host_pinned"] == got["host_pageable"] == 0
    train(optimizer, 100, start=2)
    assert memory.get_memory_stats(optimizer)["state_bytes"] == got


def test_master_halves_cost_two_bytes():
    params = parameters(torch.bfloat16)
    optimizer = Toy(params, master_weights=True)
    train(optimizer, 1)
    assert memory.state_bytes(optimizer)["by_name"]["master_low"] == 2 * sum(p.numel() for p in params)


def test_stats_before_the_first_step_and_on_the_cpu():
    stats = memory.get_memory_stats(Toy(parameters()))
    assert stats["memory_pressure"] == 0.0 and stats["pressure_source"] == "none"
    assert stats["buffer_pool_stats"]["current_memory_mb"] == 0 and stats["state_bytes"]["total"] == 0


def test_stats_name_dtypes_and_places():
    optimizer = Toy(parameters(), reduce_precision=True)
    train(optimizer, 1)
    kinds = memory.get_memory_stats(optimizer)["states"]
    assert kinds["exp_avg"] == {"residency": ["device"], "dtype": ["bfloat16"]}
    assert kinds["seen"] == {"residency": ["device"], "dtype": ["float32"]}


def test_scratch_stays_below_its_limit_and_is_gone_between_steps():
    """H28, as planned; a tensor that needs more than the limit alone is reported as it is."""
    params = parameters(shapes=((64, 64),) * 12)
    needs = {}
    for limit in (1.0, 0.5, 0.01):
        optimizer = Toy(params, max_buffer_memory_mb=limit, reduce_precision=True)
        train(optimizer, 1)
        pool = memory.get_memory_stats(optimizer)["buffer_pool_stats"]
        assert pool["current_memory_mb"] == 0 and pool["max_memory_mb"] == limit and pool["total_buffer_types"] == 1
        needs[limit] = pool["peak_memory_mb"]
    assert 0.5 < needs[1.0] <= 1 and 0.01 < needs[0.01] < needs[0.5] <= 0.5


@pytest.mark.parametrize("settings", [{}, {"reduce_precision": True}, {"master_weights": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_planned_for_what_is_really_allocated(settings, dtype):
    """The profiler's own count of the allocator, for rules that keep 4 temporaries."""
    params = parameters(dtype, shapes=((64, 64),) * 12)
    optimizer = Toy(params, **settings)
    train(optimizer, 1)
    group = optimizer.param_groups[0]
    with torch.no_grad(), Allocations() as seen:
        for chunk in storage.stream(optimizer.state, group, params, names=("exp_avg", "exp_avg_sq"), scalars=("seen",),
                                    step=2, temporaries=4, scratch=storage.scratch_of(optimizer)):
            work = [torch.empty_like(chunk.w) for _ in range(4)]
            del work
    assert seen.peak <= storage.scratch_of(optimizer).peak + 4096
    assert seen.peak >= 0.6 * storage.scratch_of(optimizer).peak


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Peak bytes of the storages that operations have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs))
                  if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in before | self.alive.keys():
                self._count(t.untyped_storage())
        return out

    def _count(self, made):
        key, size = made._cdata, made.nbytes()
        self.alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(made, self._drop, key)

    def _drop(self, key):
        self.now -= self.alive.pop(key)


EVERYTHING = dict(
    preset="fork", edge_suppression=True, spatial_awareness=True, background_regularization=True,
    use_orthogonal_grad=True, lora_rank_penalty=True, rank_penalty_interval=2, relationship_discovery_interval=2,
    cpu_offload_states=False, spd_anchor="init", weight_decay=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduced", [False, True])
def test_chunk_sizes_change_no_bit_of_any_rule(monkeypatch, dtype, reduced):
    results = []
    for cache in (1, 1 << 20):
        monkeypatch.setattr(storage, "CACHE_ELEMENTS", cache)
        params = parameters(dtype, shapes=((16, 40), (40, 16), (16, 40), (7,), (), *((8, 4, 3, 3),) * 2))
        optimizer = HinaAdaptive(params, **EVERYTHING | {"reduce_precision": reduced})
        train(optimizer, 6)
        results.append(snapshot(optimizer))
    assert_equal(*results)


@pytest.mark.parametrize("shape", [(64, 64), (16, 28, 3, 3)])
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_the_rules_stay_within_the_limit_as_measured(shape, limit):
    """H28 with everything on: the storages that operations make during a step, and no plan of ours."""
    params = parameters(shapes=(shape,) * 12)
    optimizer = HinaAdaptive(params, **EVERYTHING | {"max_buffer_memory_mb": limit, "memory_efficient": True})
    train(optimizer, 2)
    with Allocations() as seen:
        optimizer.step()
    planned = storage.scratch_of(optimizer).peak
    assert planned <= limit * 2**20
    assert seen.peak <= planned * 1.02


def as_if_on_a_device(monkeypatch, optimizer, *, others=1 << 20):
    """The CPU's optimizer takes memory as on an accelerator: its states and `others` bytes of weights."""
    monkeypatch.setattr(memory, "can_offload", lambda device: True)
    monkeypatch.setattr(memory, "allocated_bytes", lambda device: others + memory.state_bytes(optimizer)["device"])


def test_making_room_converts_states_and_reports_what_it_did(monkeypatch, caplog):
    """H30: measured, idempotent, the shortfall correct."""
    optimizer = Toy(parameters())
    train(optimizer, 2)
    as_if_on_a_device(monkeypatch, optimizer)
    before = memory.state_bytes(optimizer)["device"]
    with caplog.at_level(logging.WARNING):
        report = memory.optimize_for_vram(optimizer, target_vram_gb=1e-6)
    after = memory.state_bytes(optimizer)["device"]
    assert report["before"] - report["after"] == before - after > 0.4 * before
    assert sum(a["freed_bytes"] for a in report["actions"]) == before - after
    assert not report["achieved"] and report["shortfall_bytes"] == report["after"] + storage.scratch_of(
        optimizer).peak - report["target"]
    assert sum("out of the optimizer's reach" in r.message for r in caplog.records) == 1
    assert memory.get_memory_stats(optimizer)["states"]["exp_avg"]["dtype"] == ["bfloat16"]
    assert optimizer.param_groups[0]["reduce_precision"] and optimizer.param_groups[0]["vram_budget_gb"] == 1e-6
    again = memory.optimize_for_vram(optimizer, target_vram_gb=1e-6)
    assert again["actions"] == [] and again["before"] == again["after"]


def test_a_budget_that_is_met_changes_nothing(monkeypatch):
    optimizer = Toy(parameters())
    train(optimizer, 2)
    as_if_on_a_device(monkeypatch, optimizer)
    before = snapshot(optimizer)
    report = memory.optimize_for_vram(optimizer, target_vram_gb=1.0)
    assert report["achieved"] and report["actions"] == [] and report["shortfall_bytes"] == 0
    assert_equal(before, snapshot(optimizer))


def test_room_on_the_cpu_is_always_there_and_a_target_is_above_0():
    optimizer = Toy(parameters())
    train(optimizer, 1)
    assert memory.optimize_for_vram(optimizer, target_vram_gb=6.0)["achieved"]
    with pytest.raises(ValueError, match="give the gigabytes"):
        memory.optimize_for_vram(optimizer, target_vram_gb=0)


def test_scratch_shrinks_first(monkeypatch):
    monkeypatch.setattr(storage, "CACHE_ELEMENTS", 1 << 30)
    optimizer = Toy(parameters(shapes=((512, 512),) * 20), memory_efficient=False)
    train(optimizer, 1)
    as_if_on_a_device(monkeypatch, optimizer, others=0)
    peak = storage.scratch_of(optimizer).peak
    assert peak > 100 * 2**20
    states = memory.state_bytes(optimizer)["device"]
    report = memory.optimize_for_vram(optimizer, target_vram_gb=(states + 70 * 2**20) / 2**30)
    assert report["actions"] == [{"what": "scratch of 64 MB", "freed_bytes": peak - 64 * 2**20}] and report["achieved"]


def test_a_run_goes_on_from_room_that_was_made(monkeypatch):
    """What was done stands in the groups: a resumed run goes on in bf16, bit for bit."""
    one = Toy(parameters())
    train(one, 2)
    as_if_on_a_device(monkeypatch, one)
    memory.optimize_for_vram(one, target_vram_gb=1e-6)
    two = Toy([torch.nn.Parameter(p.detach().clone()) for p in one.param_groups[0]["params"]])
    two.load_state_dict(saved_and_loaded(one.state_dict()))
    train(one, 3, start=2)
    train(two, 3, start=2)
    assert_equal(snapshot(one), snapshot(two))


@pytest.mark.parametrize(("flags", "share", "acts"), [
    ({"adaptive_features": True}, 0.95, True), ({"adaptive_features": True}, 0.85, False),
    ({"emergency_simplify": True}, 0.95, False), ({"emergency_simplify": True}, 0.98, True), ({}, 0.99, False)])
def test_pressure_is_looked_at_every_fifty_steps(monkeypatch, flags, share, acts):
    optimizer = Toy(parameters(), vram_budget_gb=1.0, **flags)
    train(optimizer, 1)
    monkeypatch.setattr(memory, "can_offload", lambda device: True)
    monkeypatch.setattr(memory, "allocated_bytes", lambda device: int(share * 2**30))
    for step in (1, 49, 51):
        memory.watch(optimizer, step)
    assert not optimizer.param_groups[0].get("reduce_precision")
    memory.watch(optimizer, 50)
    assert bool(optimizer.param_groups[0].get("reduce_precision")) == acts
    assert optimizer.param_groups[0]["vram_budget_gb"] == 1.0


# --- on a device ------------------------------------------------------------------------------------------------------

SHAPES = ((64, 640),) * 9 + ((640, 64),) * 4 + ((64,),) * 3


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"reduce_precision": True}, {"master_weights": True}])
def test_offloaded_states_are_pinned_and_change_no_bit(dtype, settings):
    """H29: on pinned host memory between steps, with the bits of states that stay."""
    here = Toy(parameters(dtype, device="cuda", shapes=SHAPES), max_buffer_memory_mb=2, **settings)
    away = Toy(parameters(dtype, device="cuda", shapes=SHAPES), max_buffer_memory_mb=2, cpu_offload_states=True,
               **settings)
    train(here, 5)
    train(away, 5)
    kinds = memory.get_memory_stats(away)["states"]
    assert kinds["exp_avg"]["residency"] == kinds["exp_avg_sq"]["residency"] == ["host_pinned"]
    torch.cuda.synchronize()
    assert_equal(snapshot(here), snapshot(away))


@CUDA
@pytest.mark.gpu
def test_offloading_and_bringing_back_moves_the_reported_bytes():
    """H29, H30: the allocator's own count, and the same run as if nothing had moved."""
    one, two = (Toy(parameters(device="cuda", shapes=SHAPES), reduce_precision=True) for _ in range(2))
    train(one, 2)
    train(two, 2)
    states = memory.state_bytes(one)["device"]
    report = memory.optimize_for_vram(one, target_vram_gb=1e-6)
    assert report["before"] - report["after"] == pytest.approx(states, rel=0.2)
    assert memory.state_bytes(one)["host_pinned"] > 0
    train(one, 2, start=2)
    memory.restore_states(one)
    assert memory.state_bytes(one)["host_pinned"] == 0
    train(one, 2, start=4)
    train(two, 4, start=2)
    assert_equal(snapshot(one), snapshot(two))


@CUDA
@pytest.mark.gpu
def test_rounding_has_the_same_bits_on_both_devices():
    x = torch.randn(5, 3000)
    there = torch.empty(5, 3000, dtype=torch.bfloat16, device="cuda")
    Rounder(range(5), 3000, there.device, names=("m",), seed=3, step=5).round_(there, x.cuda(), "m")
    assert torch.equal(rounded(x, rounder(range(5), 3000)), there.cpu())


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"reduce_precision": True}, {"cpu_offload_states": True}])
def test_a_step_never_waits_for_the_device(settings):
    """H10: from the second step on, when the arenas are there."""
    optimizer = Toy(parameters(device="cuda", shapes=SHAPES), **settings)
    params = train(optimizer, 2)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.gpu
def test_state_bytes_are_what_the_allocator_says():
    """H27: +-512 bytes of rounding for each storage."""
    params = parameters(device="cuda", shapes=SHAPES)
    for p in params:
        p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    optimizer = Toy(params)
    optimizer.step()
    grown = torch.cuda.memory_allocated() - before
    assert 0 <= grown - memory.state_bytes(optimizer)["device"] <= 512 * 10
