"""The schedule against naive oracles that share no code with it, and its rules one by one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvgds.schedule import Lane, Pages, Priority, Row, Scheduler, Ticket, coalesce

PAGE = 4096
WIDE = Lane(ops=1000, bytes=1 << 40)


def submit(
    scheduler: Scheduler[str],
    op: str,
    *,
    lane: str = "load",
    nbytes: int = PAGE,
    bounce_bytes: int = 0,
    priority: Priority = Priority.DEMAND,
    now: float = 0.0,
) -> Ticket[str]:
    """Submit with everything defaulted that the test at hand does not care about."""
    return scheduler.submit(
        op, lane=lane, nbytes=nbytes, bounce_bytes=bounce_bytes, priority=priority, now=now
    )


def started(scheduler: Scheduler[str]) -> list[str]:
    """Names of what starts now."""
    return [ticket.op for ticket in scheduler.take()]


# --- order -------------------------------------------------------------------------------------


def test_demand_before_prefetch_before_background() -> None:
    """Submitted together, in the wrong order, they start by priority."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=0)
    for priority in reversed(Priority):
        submit(scheduler, priority.name, priority=priority)
    assert started(scheduler) == ["DEMAND", "PREFETCH", "BACKGROUND"]


def test_equal_ranks_go_in_order_of_submission() -> None:
    """The tie-break is the sequence, never the operation itself."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=0)
    names = [f"op{i}" for i in (5, 3, 9, 1, 7, 2, 8)]
    for name in names:
        submit(scheduler, name)
    assert started(scheduler) == names


def test_store_older_than_its_handicap_goes_before_new_loads() -> None:
    """Aging: the store waits its 0.25 s and not a load longer."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(1, PAGE)}, bounce_bytes=0)
    running = submit(scheduler, "first")
    scheduler.take()
    submit(scheduler, "store", priority=Priority.BACKGROUND, now=1.0)
    submit(scheduler, "younger load", now=1.24)
    submit(scheduler, "late load", now=1.26)
    order = []
    while scheduler.queued:
        scheduler.finish(running)
        (running,) = scheduler.take()
        order.append(running.op)
    assert order == ["younger load", "store", "late load"]


def test_endless_loads_do_not_starve_a_store() -> None:
    """With a new load for each that ends, the store starts once its handicap is over."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(1, PAGE)}, bounce_bytes=0)
    store = submit(scheduler, "store", priority=Priority.BACKGROUND, now=0.0)
    now = 0.0
    while store.state == "queued":
        assert now <= 0.26, "the store starves"
        submit(scheduler, "load", now=now)
        for ticket in scheduler.take():
            scheduler.finish(ticket)
        now += 0.01


def test_handicaps_are_the_callers_choice() -> None:
    """With no handicap at all it is first come, first served."""
    flat = dict.fromkeys(Priority, 0.0)
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=0, handicap_s=flat)
    submit(scheduler, "store", priority=Priority.BACKGROUND, now=0.0)
    submit(scheduler, "load", priority=Priority.DEMAND, now=0.1)
    assert started(scheduler) == ["store", "load"]


@pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan")])
def test_a_handicap_that_breaks_bounded_waiting_is_refused(bad: float) -> None:
    """Not finite: waits for ever. Negative: passes what came before it."""
    handicaps = {Priority.DEMAND: 0.0, Priority.PREFETCH: 0.0, Priority.BACKGROUND: bad}
    with pytest.raises(ValueError, match="handicap_s"):
        Scheduler({"load": WIDE}, bounce_bytes=0, handicap_s=handicaps)


def test_order_is_by_rank_across_lanes() -> None:
    """One take starts the lanes' heads merged by rank, not lane after lane."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE, "store": WIDE}, bounce_bytes=0)
    for now, lane in enumerate(["store", "load", "store", "load"]):
        submit(scheduler, f"{lane}{now}", lane=lane, now=float(now))
    assert started(scheduler) == ["store0", "load1", "store2", "load3"]


# --- lanes -------------------------------------------------------------------------------------


def test_lane_limits_ops() -> None:
    """No more than `ops` at once, and one more for each that ends."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(2, 1 << 30)}, bounce_bytes=0)
    tickets = [submit(scheduler, name) for name in "abc"]
    assert started(scheduler) == ["a", "b"]
    scheduler.finish(tickets[1])
    assert started(scheduler) == ["c"]


def test_lane_limits_bytes() -> None:
    """Exactly full is allowed; one byte more is not."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(9, 100)}, bounce_bytes=0)
    for name, nbytes in (("a", 60), ("b", 40), ("c", 1)):
        submit(scheduler, name, nbytes=nbytes)
    assert started(scheduler) == ["a", "b"]


def test_op_above_the_lanes_byte_limit_runs_alone() -> None:
    """It waits for the lane to empty, and the lane waits for it."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(9, 100)}, bounce_bytes=0)
    small, big = submit(scheduler, "small", nbytes=0), submit(scheduler, "big", nbytes=101)
    submit(scheduler, "next", nbytes=0)
    assert started(scheduler) == ["small"]
    scheduler.finish(small)
    assert started(scheduler) == ["big"]
    scheduler.finish(big)
    assert started(scheduler) == ["next"]


def test_the_first_few_ops_start_whatever_their_size() -> None:
    """Those that come later fit into what the bytes leave, or wait."""
    lane = Lane(9, 100, least=2)
    scheduler: Scheduler[str] = Scheduler({"load": lane}, bounce_bytes=0)
    tickets = [submit(scheduler, name, nbytes=101) for name in "abc"]
    assert started(scheduler) == ["a", "b"]
    scheduler.finish(tickets[0])
    assert started(scheduler) == ["c"]


def test_a_full_lane_blocks_only_itself() -> None:
    """The store lane goes on, bounce bytes included."""
    lanes = {"load": Lane(1, 1 << 30), "store": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=4 * PAGE)
    submit(scheduler, "running")
    submit(scheduler, "stuck", bounce_bytes=PAGE)
    submit(scheduler, "store", lane="store", bounce_bytes=PAGE, now=5.0)
    assert started(scheduler) == ["running", "store"]


@pytest.mark.parametrize(("ops", "nbytes", "least"), [(0, 1, 1), (1, 0, 1), (-1, 1, 1), (1, 1, 0)])
def test_a_lane_that_can_run_nothing_is_refused(ops: int, nbytes: int, least: int) -> None:
    """Its operations would wait for ever."""
    with pytest.raises(ValueError, match="lane"):
        Lane(ops=ops, bytes=nbytes, least=least)


def test_lanes_of_other_parts_hold_up_nothing() -> None:
    """Neither full nor in pieces; the first part has the page that is left over."""
    lanes = {"near": WIDE, "far": Lane(WIDE.ops, WIDE.bytes, part=1)}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=5 * PAGE)
    near = [submit(scheduler, name, lane="near", bounce_bytes=PAGE) for name in "abcd"]
    far = submit(scheduler, "far", lane="far", bounce_bytes=2 * PAGE)
    nothing = submit(scheduler, "nothing", lane="far")
    assert started(scheduler) == ["a", "b", "c", "far", "nothing"]
    assert [ticket.offset for ticket in near] == [0, PAGE, 2 * PAGE, None]
    assert (far.offset, nothing.offset) == (3 * PAGE, 0)
    with pytest.raises(ValueError, match="which has only 8192"):
        submit(scheduler, "large", lane="far", bounce_bytes=3 * PAGE)
    for ticket in (near[0], far, nothing):
        scheduler.finish(ticket)
    assert started(scheduler) == ["d"]
    assert scheduler.free_bounce == 2 * PAGE


def test_unknown_lane_changes_nothing() -> None:
    """The refusal leaves no count behind."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=0)
    with pytest.raises(KeyError):
        submit(scheduler, "a", lane="nowhere")
    assert (scheduler.queued, scheduler.queued_bytes) == (0, 0)


# --- bounce pool -------------------------------------------------------------------------------


def test_small_ops_do_not_starve_a_big_one_of_bounce() -> None:
    """Later small operations leave the pool alone, in every lane, until the big one has it."""
    lanes = {"load": WIDE, "store": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=4 * PAGE)
    holder = submit(scheduler, "holder", bounce_bytes=PAGE)
    scheduler.take()
    submit(scheduler, "big", bounce_bytes=4 * PAGE, now=1.0)
    submit(scheduler, "small", lane="store", bounce_bytes=PAGE, now=2.0)
    submit(scheduler, "behind big", bounce_bytes=0, now=3.0)
    assert started(scheduler) == []
    scheduler.finish(holder)
    assert started(scheduler) == ["big", "behind big"]


def test_ops_without_bounce_pass_a_head_that_waits_for_it() -> None:
    """They take nothing that it waits for; the first in their lane that needs bounce stops it."""
    lanes = {"load": WIDE, "store": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=2 * PAGE)
    submit(scheduler, "holder", bounce_bytes=PAGE)
    submit(scheduler, "big", bounce_bytes=2 * PAGE, now=1.0)
    submit(scheduler, "direct", lane="store", now=2.0)
    submit(scheduler, "small", lane="store", bounce_bytes=1, now=3.0)
    submit(scheduler, "direct behind small", lane="store", now=4.0)
    assert started(scheduler) == ["holder", "direct"]


def test_ops_without_bounce_keep_their_order_behind_a_waiting_head() -> None:
    """All of them go, by rank, whatever lane they are in."""
    lanes = {"load": WIDE, "store": WIDE, "objects": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=2 * PAGE)
    submit(scheduler, "holder", bounce_bytes=PAGE)
    scheduler.take()
    submit(scheduler, "big", bounce_bytes=2 * PAGE)
    for now, lane in ((2, "store"), (1, "objects"), (4, "store"), (3, "objects")):
        submit(scheduler, f"direct {now}", lane=lane, now=float(now))
    assert started(scheduler) == ["direct 1", "direct 2", "direct 3", "direct 4"]


def test_an_earlier_op_still_takes_bounce_ahead_of_a_waiting_one() -> None:
    """The reserve holds against later ranks only."""
    lanes = {"load": WIDE, "store": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=2 * PAGE)
    submit(scheduler, "holder", bounce_bytes=PAGE)
    submit(scheduler, "big", bounce_bytes=2 * PAGE, priority=Priority.BACKGROUND)
    assert started(scheduler) == ["holder"]
    submit(scheduler, "demand", lane="store", bounce_bytes=PAGE, now=0.1)
    assert started(scheduler) == ["demand"]


def test_an_op_bigger_than_the_pool_is_refused_with_the_bytes_it_takes() -> None:
    """Whole pages count: 2 pages and a byte take 3, and a ragged pool is rounded down."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=3 * PAGE - 1)
    with pytest.raises(ValueError, match=rf"\b{3 * PAGE}\b.*\b{2 * PAGE}\b"):
        submit(scheduler, "a", bounce_bytes=2 * PAGE + 1)
    assert (scheduler.queued, scheduler.queued_bytes) == (0, 0)
    submit(scheduler, "b", bounce_bytes=2 * PAGE)
    assert started(scheduler) == ["b"]


@pytest.mark.parametrize(("nbytes", "bounce_bytes"), [(-1, 0), (0, -1)])
def test_negative_sizes_are_refused(nbytes: int, bounce_bytes: int) -> None:
    """They would give budget back that nobody had."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=PAGE)
    with pytest.raises(ValueError, match="negative"):
        submit(scheduler, "a", nbytes=nbytes, bounce_bytes=bounce_bytes)


# --- tickets -----------------------------------------------------------------------------------


def test_cancel_is_truthful() -> None:
    """True exactly while queued; a cancelled operation never starts and can't end."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=PAGE)
    kept, dropped = submit(scheduler, "kept"), submit(scheduler, "dropped", now=1.0)
    assert scheduler.cancel(dropped)
    assert not scheduler.cancel(dropped)
    assert dropped.state == "done"
    assert started(scheduler) == ["kept"]
    assert not scheduler.cancel(kept)
    assert kept.state == "running"
    scheduler.finish(kept)
    assert not scheduler.cancel(kept)
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish(dropped)


def test_finish_twice_or_too_early_is_an_error_and_gives_nothing_back() -> None:
    """A lease given back twice would be lent to two."""
    scheduler: Scheduler[str] = Scheduler({"load": Lane(1, PAGE)}, bounce_bytes=2 * PAGE)
    ticket = submit(scheduler, "a", bounce_bytes=PAGE)
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish(ticket)
    scheduler.take()
    scheduler.finish(ticket)
    with pytest.raises(ValueError, match="not running"):
        scheduler.finish(ticket)
    assert (scheduler.running, scheduler.free_bounce) == (0, 2 * PAGE)


def test_offset_is_known_exactly_while_running() -> None:
    """Before and after there is no lease to point at."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=PAGE)
    ticket = submit(scheduler, "a", bounce_bytes=1)
    assert (ticket.state, ticket.offset) == ("queued", None)
    scheduler.take()
    assert (ticket.state, ticket.offset) == ("running", 0)
    scheduler.finish(ticket)
    assert (ticket.state, ticket.offset) == ("done", None)


def test_ticket_carries_what_was_submitted() -> None:
    """And its repr names its state without the operation."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=PAGE)
    ticket = submit(scheduler, "secret", nbytes=7, bounce_bytes=8, priority=Priority.PREFETCH)
    carried = (ticket.op, ticket.lane, ticket.nbytes, ticket.bounce_bytes, ticket.priority)
    assert carried == ("secret", "load", 7, 8, Priority.PREFETCH)
    assert repr(ticket) == "<Ticket queued load PREFETCH 7 bytes>"


def test_cancelled_ops_are_let_go_behind_a_head_that_waits() -> None:
    """Memory is bounded by what is queued, not by what was ever cancelled."""
    alive = 0

    class Op:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    scheduler: Scheduler[Op] = Scheduler({"load": Lane(1, 1)}, bounce_bytes=0)

    def put(now: float) -> Ticket[Op]:
        return scheduler.submit(
            Op(), lane="load", nbytes=1, bounce_bytes=0, priority=Priority.DEMAND, now=now
        )

    put(0.0)
    scheduler.take()
    put(1.0)
    for _ in range(10_000):
        scheduler.cancel(put(2.0))
    assert alive < 200
    assert scheduler.queued == 1


def test_order_survives_many_cancels() -> None:
    """Letting cancelled operations go leaves the rest in order."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=0)
    ranks = [i * 7919 % 1000 for i in range(1000)]
    tickets = [submit(scheduler, str(rank), now=float(rank)) for rank in ranks]
    for ticket in tickets:
        if int(ticket.op) % 5:
            assert scheduler.cancel(ticket)
    assert scheduler.queued == 200
    assert [int(op) for op in started(scheduler)] == list(range(0, 1000, 5))


# --- cost --------------------------------------------------------------------------------------


def test_take_with_nothing_to_start_does_not_look_at_the_queue() -> None:
    """1,000 takes beside 100k queued ops; the bound is some 500-fold above normal."""
    lanes = {"full": Lane(1, 1), "short": WIDE}
    scheduler: Scheduler[str] = Scheduler(lanes, bounce_bytes=2 * PAGE)
    submit(scheduler, "a", lane="full")
    submit(scheduler, "b", lane="short", bounce_bytes=PAGE)
    scheduler.take()
    for i in range(50_000):
        submit(scheduler, "queued", lane="full", now=float(i))
        submit(scheduler, "queued", lane="short", bounce_bytes=2 * PAGE, now=float(i))
    begin = time.perf_counter()
    for _ in range(1_000):
        assert not scheduler.take()
    assert time.perf_counter() - begin < 1.0


def test_a_hundred_thousand_ops_drain() -> None:
    """All start, once, in rank order; the bound is some tenfold above normal."""
    scheduler: Scheduler[int] = Scheduler({"load": Lane(64, 1 << 40)}, bounce_bytes=64 * PAGE)
    count = 100_000
    begin = time.perf_counter()
    for i in range(count):
        scheduler.submit(
            i, lane="load", nbytes=1, bounce_bytes=1, priority=Priority.DEMAND, now=-float(i)
        )
    order = []
    while batch := scheduler.take():
        order += [ticket.op for ticket in batch]
        for ticket in batch:
            scheduler.finish(ticket)
    assert order == list(reversed(range(count)))
    assert time.perf_counter() - begin < 10.0


# --- the scheduler against an oracle -----------------------------------------------------------


@dataclass
class Model:
    """What the oracle knows of one operation."""

    ticket: Ticket[int]
    lane: str
    nbytes: int
    pages: int
    rank: tuple[float, int]
    state: str = "queued"
    at: int = 0


POOL_PAGES = 12
LIMITS = {"load": Lane(3, 20), "store": Lane(2, 12, least=2), "objects": Lane(5, 40, least=2)}
HANDICAPS = {Priority.DEMAND: 0.0, Priority.PREFETCH: 2.0, Priority.BACKGROUND: 5.0}


class SchedulerMachine(RuleBasedStateMachine):
    """Every decision of the scheduler against one that recomputes all of it from a flat list."""

    def __init__(self) -> None:
        """Begin with nothing queued."""
        super().__init__()
        # A few bytes over: the ragged end of the region must never be lent.
        self.scheduler: Scheduler[int] = Scheduler(
            LIMITS, bounce_bytes=POOL_PAGES * 4096 + 77, handicap_s=HANDICAPS
        )
        self.now = 0.0
        self.models: list[Model] = []

    def of(self, state: str) -> list[Model]:
        """Operations in a state."""
        return [model for model in self.models if model.state == state]

    @rule(dt=st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]))
    def wait(self, dt: float) -> None:
        """Let time pass."""
        self.now += dt

    @rule(
        lane=st.sampled_from(sorted(LIMITS)),
        nbytes=st.integers(0, 45),
        bounce=st.one_of(st.just(0), st.integers(1, 3 * 4096), st.integers(1, POOL_PAGES * 4096)),
        priority=st.sampled_from(Priority),
        copies=st.integers(1, 4),
    )
    def submit(self, lane: str, nbytes: int, bounce: int, priority: Priority, copies: int) -> None:
        """Queue a few operations alike."""
        for _ in range(copies):
            number = len(self.models)
            ticket = self.scheduler.submit(
                number,
                lane=lane,
                nbytes=nbytes,
                bounce_bytes=bounce,
                priority=priority,
                now=self.now,
            )
            rank = (self.now + HANDICAPS[priority], number)
            pages = (bounce + 4095) // 4096
            self.models.append(Model(ticket, lane, nbytes, pages, rank))

    @rule(excess=st.integers(1, 10_000))
    def submit_impossible(self, excess: int) -> None:
        """Ask for more than the pool can ever hold: refused, without a trace."""
        with pytest.raises(ValueError, match="bounce region"):
            self.scheduler.submit(
                -1,
                lane="load",
                nbytes=1,
                bounce_bytes=POOL_PAGES * 4096 + excess,
                priority=Priority.DEMAND,
                now=self.now,
            )

    @rule()
    def take(self) -> None:
        """Start what may start: the very same tickets, order and leases as the oracle's."""
        expected = self.decide()
        assert [ticket.op for ticket in self.scheduler.take()] == expected

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel any: True exactly for what is queued."""
        model = data.draw(st.sampled_from(self.models))
        assert self.scheduler.cancel(model.ticket) is (model.state == "queued")
        if model.state == "queued":
            model.state = "done"

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """End one, or be told that it does not run."""
        model = data.draw(st.sampled_from(self.of("running") or self.models))
        if model.state != "running":
            with pytest.raises(ValueError, match="not running"):
                self.scheduler.finish(model.ticket)
            return
        self.scheduler.finish(model.ticket)
        model.state = "done"

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        """Nothing starves: as long as something ends, everything ends, and all budget is back."""
        self.take()
        while running := self.of("running"):
            model = data.draw(st.sampled_from(running)) if len(running) > 1 else running[0]
            self.scheduler.finish(model.ticket)
            model.state = "done"
            self.take()
        assert not self.of("queued")
        self.all_is_back()

    def decide(self) -> list[int]:
        """Walk everything queued in rank order and start what the rules let start."""
        starting: list[int] = []
        blocked: set[str] = set()
        pool_reserved = False
        for model in sorted(self.of("queued"), key=lambda model: model.rank):
            if model.lane in blocked:
                continue
            at = self.hole(model.pages)
            if not self.lane_has_room(model):
                blocked.add(model.lane)
            elif model.pages and (pool_reserved or at is None):
                pool_reserved = True
                blocked.add(model.lane)
            else:
                model.state, model.at = "running", at or 0
                starting.append(model.ticket.op)
        return starting

    def lane_has_room(self, model: Model) -> bool:
        """Count the lane anew."""
        limit = LIMITS[model.lane]
        inside = [other for other in self.of("running") if other.lane == model.lane]
        used = sum(other.nbytes for other in inside)
        fits = len(inside) < limit.ops and used + model.nbytes <= limit.bytes
        return fits or len(inside) < limit.least

    def hole(self, pages: int) -> int | None:
        """Lowest page where a hole of ``pages`` begins, found on a map of the pool."""
        used = [False] * POOL_PAGES
        for model in self.of("running"):
            used[model.at : model.at + model.pages] = [True] * model.pages
        starts = range(POOL_PAGES - pages + 1)
        return next((at for at in starts if not any(used[at : at + pages])), None)

    def all_is_back(self) -> None:
        """Check that one operation can have the whole pool, and the whole of each lane."""
        assert self.scheduler.free_bounce == POOL_PAGES * 4096
        for lane, limit in LIMITS.items():
            whole = self.scheduler.submit(
                -1,
                lane=lane,
                nbytes=limit.bytes + 1,
                bounce_bytes=POOL_PAGES * 4096,
                priority=Priority.BACKGROUND,
                now=self.now,
            )
            assert self.scheduler.take() == [whole]
            assert whole.offset == 0
            self.scheduler.finish(whole)

    @invariant()
    def tickets_tell_the_truth(self) -> None:
        """State and lease of every ticket, also of those long done."""
        for model in self.models:
            assert model.ticket.state == model.state
            at = model.at * 4096 if model.pages else 0
            assert model.ticket.offset == (at if model.state == "running" else None)

    @invariant()
    def counters_are_right(self) -> None:
        """Kept counters equal counted ones."""
        queued, running = self.of("queued"), self.of("running")
        assert self.scheduler.queued == len(queued)
        assert self.scheduler.queued_bytes == sum(model.nbytes for model in queued)
        assert self.scheduler.running == len(running)
        free = POOL_PAGES - sum(model.pages for model in running)
        assert self.scheduler.free_bounce == free * 4096

    @invariant()
    def limits_hold(self) -> None:
        """By the tickets alone, apart from the oracle's own choice of what runs."""
        for lane, limit in LIMITS.items():
            inside = [
                m.nbytes for m in self.models if m.ticket.state == "running" and m.lane == lane
            ]
            assert len(inside) <= limit.ops
            assert len(inside) <= limit.least or sum(inside) <= limit.bytes

    @invariant()
    def leases_do_not_overlap(self) -> None:
        """By the tickets alone, and inside the pool."""
        leases = sorted(
            (m.ticket.offset, m.ticket.offset + m.ticket.bounce_bytes)
            for m in self.models
            if m.ticket.offset is not None and m.ticket.bounce_bytes
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(leases))
        assert not leases or leases[-1][1] <= POOL_PAGES * 4096

    def teardown(self) -> None:
        """Whatever happened: end and cancel everything, and all budget is back."""
        # By the tickets' own state: after a failure the oracle's would only hide what failed.
        for model in self.models:
            if model.ticket.state == "running":
                self.scheduler.finish(model.ticket)
            self.scheduler.cancel(model.ticket)
        assert not self.scheduler.take()
        assert (self.scheduler.queued, self.scheduler.running) == (0, 0)
        self.all_is_back()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


# --- pages -------------------------------------------------------------------------------------


def test_pages_first_fit_takes_the_lowest_hole_that_fits() -> None:
    """Not the snuggest, and not the next one."""
    pages = Pages(10 * PAGE)
    offsets = [pages.take(n * PAGE) for n in (3, 1, 2, 1)]
    assert offsets == [0, 3 * PAGE, 4 * PAGE, 6 * PAGE]
    pages.give(0, 3 * PAGE)
    pages.give(4 * PAGE, 2 * PAGE)
    assert pages.take(2 * PAGE) == 0
    assert pages.take(2 * PAGE) == 4 * PAGE


def test_pages_merge_on_both_sides() -> None:
    """Given back in any order, the pool is one run again."""
    pages = Pages(3 * PAGE)
    for _ in range(3):
        pages.take(PAGE)
    for offset in (0, 2 * PAGE, PAGE):
        pages.give(offset, PAGE)
    assert (pages.free, pages.largest) == (3 * PAGE, 3 * PAGE)


def test_pages_rounds_up_to_whole_pages() -> None:
    """And a region's ragged end down."""
    pages = Pages(3 * PAGE - 1)
    assert (pages.free, pages.largest) == (2 * PAGE, 2 * PAGE)
    assert pages.take(1) == 0
    assert pages.free == PAGE
    pages.give(0, PAGE)
    assert pages.free == 2 * PAGE


@pytest.mark.parametrize("nbytes", [0, 10, PAGE])
def test_pages_nothing_costs_nothing(nbytes: int) -> None:
    """Zero bytes are always there, also in an empty or full pool."""
    pages = Pages(nbytes)
    while pages.take(1) is not None:
        pass
    before = pages.free
    assert pages.take(0) == 0
    pages.give(0, 0)
    assert pages.free == before


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, PAGE), (PAGE, PAGE), (0, 2 * PAGE + 1), (2 * PAGE, PAGE), (2 * PAGE, 0), (0, -1)],
)
def test_pages_bogus_give(offset: int, nbytes: int) -> None:
    """Only the numbers of a lease give it back."""
    pages = Pages(8 * PAGE)
    pages.take(2 * PAGE)
    with pytest.raises(ValueError, match=r"no lease|negative"):
        pages.give(offset, nbytes)
    assert pages.free == 6 * PAGE
    pages.give(0, 2 * PAGE)
    with pytest.raises(ValueError, match="no lease"):
        pages.give(0, 2 * PAGE)


@pytest.mark.parametrize("call", [Pages, Pages(PAGE).take])
def test_pages_refuses_negative_sizes(call: type[Pages]) -> None:
    """For the pool and for a lease."""
    with pytest.raises(ValueError, match="-1"):
        call(-1)


class PagesMachine(RuleBasedStateMachine):
    """The allocator against a map with one flag per page."""

    @initialize(count=st.sampled_from([1, 7, 63, 64, 65, 200]), ragged=st.integers(0, 4095))
    def open(self, count: int, ragged: int) -> None:
        """Make a pool, with fewer and more pages than the allocator has zones."""
        self.pages = Pages(count * 4096 + ragged)
        self.used = [False] * count
        self.leases: list[tuple[int, int]] = []

    def hole(self, count: int) -> int | None:
        """Offset of the lowest hole of ``count`` pages."""
        text = "".join("#" if used else "." for used in self.used)
        at = text.find("." * count)
        return None if at < 0 else at * 4096

    def mark(self, offset: int, nbytes: int, *, used: bool) -> None:
        """Draw a lease on the map."""
        for page in range(offset // 4096, (offset + nbytes + 4095) // 4096):
            assert self.used[page] is not used
            self.used[page] = used

    @rule(nbytes=st.one_of(st.integers(1, 5 * 4096), st.integers(1, 80 * 4096)))
    def take(self, nbytes: int) -> None:
        """Get the lowest hole that fits, or None when there is none."""
        offset = self.pages.take(nbytes)
        assert offset == self.hole((nbytes + 4095) // 4096)
        if offset is not None:
            self.leases.append((offset, nbytes))
            self.mark(offset, nbytes, used=True)

    @precondition(lambda self: self.leases)
    @rule(index=st.integers(0, 1 << 20))
    def give(self, index: int) -> None:
        """Give one back; a second time is an error."""
        lease = self.leases.pop(index % len(self.leases))
        self.pages.give(*lease)
        self.mark(*lease, used=False)
        with pytest.raises(ValueError, match="no lease"):
            self.pages.give(*lease)

    @rule(seed=st.integers(0, 1 << 32), most=st.integers(1, 8), fullness=st.floats(0.3, 0.8))
    def churn(self, seed: int, most: int, fullness: float) -> None:
        """Take and give at random for a while: fragments, as no short list of rules makes them."""
        random = Random(seed)
        for _ in range(100):
            if self.leases and random.random() > fullness:
                self.give(random.randrange(1 << 20))
            else:
                self.take(random.randint(1, most) * 4096)

    @invariant()
    def sizes_are_right(self) -> None:
        """Free bytes and the biggest run, counted on the map."""
        runs = "".join("#" if used else "." for used in self.used).split("#")
        assert self.pages.free == sum(map(len, runs)) * 4096
        assert self.pages.largest == max(map(len, runs)) * 4096

    def teardown(self) -> None:
        """All back: one run."""
        for lease in getattr(self, "leases", ()):
            self.pages.give(*lease)
        if hasattr(self, "pages"):
            assert self.pages.free == self.pages.largest == len(self.used) * 4096


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPagesMachine = PagesMachine.TestCase


# --- coalesce ----------------------------------------------------------------------------------


def mapping(rows: list[Row]) -> list[tuple[int, int]]:
    """Memory byte and file byte, one pair per byte, in order."""
    return [(address + i, offset + i) for address, offset, size in rows for i in range(size)]


@st.composite
def descriptors(draw: st.DrawFn) -> list[Row]:
    """Rows that mostly follow each other in memory, in the file, in both or in neither."""
    rows: list[Row] = []
    address, offset = draw(st.integers(0, 1 << 47)), draw(st.integers(0, 1 << 40))
    for _ in range(draw(st.integers(0, 12))):
        jump = st.sampled_from([0, 0, 0, 0, 1, 8])
        address, offset = address + draw(jump), offset + draw(jump)
        size = draw(st.sampled_from([0, 1, 2, 4, 4, 8, 9, 20]))
        rows.append((address, offset, size))
        address, offset = address + size, offset + size
    return rows


@given(rows=descriptors(), max_bytes=st.integers(0, 40))
def test_coalesce_keeps_every_byte_and_the_limit(rows: list[Row], max_bytes: int) -> None:
    """Same bytes to the same places, none above the limit, and no two rows left that could join."""
    before = list(rows)
    result = coalesce(rows, max_bytes)
    assert rows == before
    assert mapping(result) == mapping(rows)
    assert all(row[2] <= max_bytes or row in rows for row in result)
    for one, other in pairwise(result):
        touch = (one[0] + one[2], one[1] + one[2]) == other[:2]
        assert not touch or one[2] + other[2] > max_bytes


def test_coalesce_needs_both_sides_to_touch() -> None:
    """Memory alone or file alone does not do, nor does the wrong order."""
    rows = [(0, 0, 4), (4, 8, 4), (16, 12, 4), (12, 8, 4), (16, 12, 4)]
    assert coalesce(rows, 100) == [(0, 0, 4), (4, 8, 4), (16, 12, 4), (12, 8, 8)]


def test_coalesce_cuts_at_the_limit() -> None:
    """Exactly the limit is allowed; a row above it stays whole and alone."""
    rows = [(0, 0, 4), (4, 4, 4), (8, 8, 4), (12, 12, 9), (21, 21, 1), (22, 22, 7)]
    assert coalesce(rows, 8) == [(0, 0, 8), (8, 8, 4), (12, 12, 9), (21, 21, 8)]


def test_coalesce_joins_what_the_scheduler_starts_together() -> None:
    """Equal operations started at once have neighbouring leases, and become one row."""
    scheduler: Scheduler[str] = Scheduler({"load": WIDE}, bounce_bytes=64 * PAGE)
    for i in range(8):
        submit(scheduler, str(i), bounce_bytes=2 * PAGE)
    rows = [(t.offset or 0, int(t.op) * 2 * PAGE, 2 * PAGE) for t in scheduler.take()]
    assert coalesce(rows, 1 << 20) == [(0, 0, 16 * PAGE)]
