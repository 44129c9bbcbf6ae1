"""Schedules: parallel requests of one or two browsers, then a check of the store."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Self

from flask import Response

from flask_gsession.tokens import session_key

from . import audit
from .model import Fleeting, Line, Model, Values, Violation
from .plan import ABSOLUTE, IDLE, POLICIES, RENEW, Op, Plan, RequestPlan, make_plan
from .request import Serving, sent_cookie
from .scheduler import Fault, Killed, Scheduler, VirtualClock, simulated_surroundings
from .site import CALLS, SITES, Request, Site, running

START = 1_700_000_000_000  # milliseconds


@dataclass
class Browser:
    """A cookie jar; times are milliseconds."""

    name: str
    cookie: str | None = None
    expires: int | None = None
    earlier: list[str] = field(default_factory=list)

    def brings(self, now: int) -> str | None:
        """The cookie of the next request."""
        if self.expires is not None and now >= self.expires:
            self.cookie = self.expires = None
        return self.cookie

    def receive(self, response: Response) -> None:
        """Keep the cookie of a response, or delete it."""
        sent = sent_cookie(response)
        if sent is not None:
            self.cookie, self.expires = sent
            if self.cookie is not None:
                self.earlier.append(self.cookie)


@dataclass
class Outcome:
    """The result of one schedule."""

    plan: Plan
    violation: str | None
    trace: list[str]

    def __str__(self) -> str:
        """All of it, to be read."""
        end = f"VIOLATION: {self.violation}" if self.violation else "Nothing went wrong."
        again = f"Again: python -m tests.simulation {self.plan.seed}"
        return "\n".join([str(self.plan), "", *self.trace, "", end, again])


class Simulation:
    """Runs schedules. A context manager: within it, the surroundings are simulated."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.sites = {name: Site(self.clock, settings) for name, settings in SITES.items()}
        self.counts: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(simulated_surroundings())
        log = logging.getLogger("flask_gsession")
        self._stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        # An error response needs an active request, whichever it is.
        self._stack.enter_context(self.sites["last"].app.test_request_context("/"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(self, seed: int, *, tracing: bool = False) -> Outcome:
        """Run the schedule of a seed."""
        plan, rng = make_plan(seed, tuple(SITES))
        run = _Run(self.clock, self.sites[plan.site], plan, rng, tracing)
        violation = None
        try:
            run.play()
        except Violation as error:
            violation = str(error)
        self.counts.update(run.site.store.counts)
        self.counts.update(run.scheduler.steps)
        self.counts["schedules"] += 1
        self.counts["requests"] += len(run.visits)
        return Outcome(plan, violation, run.trace)

    def summary(self) -> str:
        """The figures of the work done so far."""
        counts = self.counts
        calls = sum(counts[name] for name in CALLS)
        return (
            f"{counts['schedules']:,} schedules: {counts['requests']:,} requests, {calls:,} store "
            f"calls, {counts['faults']:,} of them with faults, {counts['Stale']:,} lost races, "
            f"{counts['Gone']:,} writes to ended sessions"
        )

    def search(
        self, seeds: Iterable[int], among: Callable[[Plan], bool] | None = None
    ) -> Outcome | None:
        """Find the first schedule that goes wrong, among the plans of one kind; traced."""
        for seed in seeds:
            if among is not None and not among(make_plan(seed, tuple(SITES))[0]):
                continue
            if self.run(seed).violation is not None:
                return self.run(seed, tracing=True)
        return None


class _Run:
    """One schedule."""

    def __init__(
        self, clock: VirtualClock, site: Site, plan: Plan, rng: Random, tracing: bool
    ) -> None:
        self.clock, self.site, self.plan, self.rng = clock, site, plan, rng
        self.trace: list[str] = []
        self.visits: list[audit.Visit] = []
        self._events = 0
        self.browsers = {
            request.browser: Browser(request.browser) for request in (*plan.opening, *plan.requests)
        }
        clock.now = START
        site.tokens.clear()
        site.store.begin(rng)
        self.model = site.store.model = Model(
            now=lambda: clock.now,
            decode=site.decode,
            idle=IDLE * 1000,
            absolute=ABSOLUTE * 1000,
            slack=RENEW * 1000,
            policies=POLICIES,
            default_policy=site.default_policy,
            trace=self.trace.append if tracing else None,
        )
        self.scheduler = Scheduler(clock, self._moments, self.model.trace, site.store.deliver)

    def play(self) -> None:
        """Open the sessions, run the requests in parallel, then check the store."""
        for opening in self.plan.opening:
            self.scheduler.run([self._task(opening)], self.rng)
        self.scheduler.run(
            [self._task(request) for request in self.plan.requests],
            self.rng,
            fault_rate=self.plan.fault_rate,
            clock_rate=self.plan.clock_rate,
            stay=self.plan.stay,
            strikes=self.plan.strikes,
            together=self.plan.together,
        )
        self.site.store.settle(self.rng)
        finals = self._probe()
        if any(record and record.successor for record in self.model.records.values()):
            self.clock.now += 30_000
            self.model.trace("     == beyond every grace")
            finals = self._probe()
        self.model.check_store(self.site.store.records)
        audit.check(self.visits, finals.items())

    def _probe(self) -> dict[Line, Values]:
        """Read the session behind every token that ever existed. Returns the values by session."""
        finals = {}
        for token, browser in list(self.site.tokens.values()):
            probe = RequestPlan(f"{browser}?", browser, (Op("read", "?"),))
            self.scheduler.run([self._task(probe, self.site.sign(token))], self.rng)
            visit = self.visits[-1]
            line = self.model.line_behind(session_key(token))
            if line is not None:
                finals[line] = visit.done[0].result
        return finals

    def _task(self, plan: RequestPlan, cookie: str | None = None) -> Request:
        """A request. `cookie`: instead of the browser's at its start."""
        return Request(plan.name, lambda: self._serve(plan, cookie))

    def _serve(self, plan: RequestPlan, cookie: str | None) -> None:
        browser = self.browsers[plan.browser]
        if cookie is None:
            cookie = browser.brings(self.clock.now)
            if plan.stale_token and browser.earlier:
                cookie = self.rng.choice(browser.earlier)
        visit = audit.Visit(plan.name, plan.browser, self._tick, self.clock.now)
        self.visits.append(visit)
        serving = Serving(self.site, self.clock, plan, visit, cookie)
        try:
            response = serving.serve()
            if running().pause("response") is not Fault.LOST:
                visit.receive(response.status_code, self.clock.now)
                browser.receive(response)
        except Killed:
            if not running().given_up:
                self.model.trace(f"{plan.name:4} died")
            raise
        except Exception as error:
            raise Violation(f"{plan.name}: failed with {type(error).__name__}: {error}") from error
        except Violation as wrong:
            raise Violation(f"{plan.name}: {wrong}") from wrong
        finally:
            serving.leave()

    def _tick(self) -> int:
        """The place of the next event in the order of all events."""
        self._events += 1
        return self._events

    def _moments(self) -> list[int]:
        """When something is going to expire."""
        records = self.site.store.records.values()
        return sorted(
            {record.idle_expires_at for record in records}
            | {record.absolute_expires_at for record in records}
            | {
                value.end
                for line in self.model.lines
                for value in line.values.values()
                if type(value) is Fleeting
            }
        )
