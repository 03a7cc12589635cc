"""The fastest combination of ways, one for each stage, within a limit of memory.

Few steps are traced, each with one way everywhere: all stored, a checkpoint for each block,
momentum, and the last of these in parts. What a block retains for backward, and what is alive
beside that during its passes, hardly depends on how other blocks are treated. So the courses of
blocks make up those of every way of a stage, and these the course of every combination: what a part
of the step needs comes on top of what all parts before it retain. A walk through the parts keeps
the least time for each amount retained so far.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, chain, groupby, pairwise, product
from typing import NamedTuple

from momconv.momentum.sequential import MomentumSequential, Run, momentum_stages, split_units
from momconv.momentum.ways import Way
from momconv.planner.cost import Speed, Work
from momconv.planner.prediction import Course, Predictor, StepPrediction
from momconv.planner.stages import Spot

STORE, CHECKPOINT, MOMENTUM = Way("store"), Way("checkpoint"), Way("momentum")
IN_PARTS = Way("momentum", in_parts=True)
_FRONT = 1000  # amounts retained that are told apart
_NOTHING = Course(0, 0, 0, 0, 0, Work(), Work())

Courses = Mapping[Way, Sequence[Course]]  # of the blocks of a stage, if all are treated so


class Combination(NamedTuple):
    """A way for each stage.

    Attributes:
        ways: By the names of the stages.
        parts: What each part of a step takes, about.
        work: What a step amounts to, about.
    """

    ways: Mapping[str, Way]
    parts: tuple["Part", ...]
    work: Work


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step: its bytes, without those that earlier parts retain, and its work."""

    retained: int = 0
    peak: int = 0
    work: Work = field(default_factory=Work)

    @classmethod
    def of(cls, course: Course) -> "Part":
        """Return the part that a block is."""
        return cls(course.retained, max(course.forward, course.backward), course.work)

    def beside(self, more: "Part") -> "Part":
        """Return this part with the bytes of ``more`` on top."""
        return replace(self, retained=self.retained + more.retained, peak=self.peak + more.peak)

    def then(self, other: "Part") -> "Part":
        """Return this part and the ``other`` that follows as one."""
        peak = max(self.peak, self.retained + other.peak)
        return Part(self.retained + other.retained, peak, self.work + other.work)


class _Option(NamedTuple):
    """A way of a stage; or None, for what is between stages."""

    way: Way | None
    part: Part


class _State(NamedTuple):
    """What was chosen for the parts so far."""

    part: Part
    seconds: float
    options: tuple[_Option, ...]


class Combinations:
    """All combinations of ways to run steps of one network.

    Attributes:
        images: How many the steps that were traced have.
    """

    def __init__(self, predictor: Predictor, images: int, stored: StepPrediction) -> None:
        """Trace steps of so many ``images``; in the one given as ``stored``, all is stored."""
        self.images = images
        self._spots: list[list[Spot]] = []  # of each part
        stages = momentum_stages(predictor.model)
        self._outer = [name for name, stage in stages.items() if len(momentum_stages(stage)) > 1]
        is_plain = not any(stage.followed for stage in stages.values())
        traced = [CHECKPOINT, IN_PARTS] if is_plain else [CHECKPOINT, MOMENTUM, IN_PARTS]
        steps = {way: _trace(predictor, images, way) for way in traced}
        steps[STORE] = _carry(stored.courses, steps[CHECKPOINT])
        self._parts: list[tuple[str | None, list[_Option]]] = []  # in the forward pass's order
        for name, group in groupby(steps[CHECKPOINT], lambda spot: spot.stage):
            spots = [*group]
            self._spots.append(spots)
            own = {way: [step.get(spot, _NOTHING) for spot in spots] for way, step in steps.items()}
            if name is None:
                options = [_Option(None, _follow(own[CHECKPOINT]))]
            elif name in self._outer:
                options = [_Option(way, _follow(own[way])) for way in (STORE, CHECKPOINT)]
            else:
                options = [*list_ways(stages[name], own)]
            self._parts.append((name, options))

    def find(
        self, limit: float, speed: Speed, off: Sequence[Part] | None = None
    ) -> Combination | None:
        """Return the fastest combination in which a step allocates at most ``limit`` bytes, if any.

        Each part is expected to take the bytes of ``off`` on top of its own.
        """
        found = []
        for ways in product((STORE, CHECKPOINT), repeat=len(self._outer)):
            outer = dict(zip(self._outer, ways, strict=True))
            found += self._walk(outer, limit, speed, off or [Part()] * len(self._parts))
        if not found:
            return None
        best = min(found, key=lambda state: state.seconds)
        names = (name for name, _ in self._parts)
        chosen = {
            name: option.way
            for name, option in zip(names, best.options, strict=True)
            if name is not None and option.way is not None
        }
        return Combination(chosen, tuple(o.part for o in best.options), best.part.work)

    def _walk(
        self, outer: Mapping[str, Way], limit: float, speed: Speed, off: Sequence[Part]
    ) -> list[_State]:
        states = [_State(Part(), 0.0, ())]
        for (name, options), more in zip(self._parts, off, strict=True):
            allowed = [o for o in options if name is None or o.way == outer.get(name, o.way)]
            reached = (
                _State(whole, state.seconds + seconds, (*state.options, option))
                for option, seconds in _drop_dominated(allowed, speed)
                for state in states
                if (whole := state.part.then(option.part.beside(more))).peak <= limit
            )
            states = _keep_fastest(reached, limit)
        return states

    def compare(self, found: Combination, step: StepPrediction, scale: float) -> list[Part]:
        """Return what the parts of ``step`` take more than was ``found`` for them.

        It has ``scale`` times the images of the steps that were traced.
        """
        off = []
        for spots, part in zip(self._spots, found.parts, strict=True):
            own = _follow(step.courses.get(spot, _NOTHING) for spot in spots)
            retained, peak = int(own.retained / scale), int(own.peak / scale)
            off.append(Part(retained - part.retained, peak - part.peak))
        return off


def _follow(courses: Iterable[Course]) -> Part:
    return reduce(Part.then, map(Part.of, courses), Part())


def _trace(predictor: Predictor, images: int, way: Way) -> Mapping[Spot, Course]:
    """Return the courses of ``way``, or of checkpoints where there is no run to be reversed."""
    plain = replace(way, strategy="checkpoint") if way.strategy == "momentum" else way
    stages = momentum_stages(predictor.model).items()
    ways = {name: str(way if stage.followed else plain) for name, stage in stages}
    return predictor.predict(images, ways).courses


def _carry(stored: Mapping[Spot, Course], others: Mapping[Spot, Course]) -> dict[Spot, Course]:
    """Return the courses of blocks stored after ``others``, whose callers hold their inputs."""
    return {
        spot: course._replace(
            forward=course.forward + max(0, others.get(spot, _NOTHING).entry - course.entry)
        )
        for spot, course in stored.items()
    }


def _drop_dominated(options: Sequence[_Option], speed: Speed) -> list[tuple[_Option, float]]:
    """Return the options that no other one matches in memory and time, with their seconds."""
    timed = sorted(((o, speed.seconds(o.part.work)) for o in options), key=lambda pair: pair[1])
    useful: list[tuple[_Option, float]] = []
    for option, seconds in timed:
        part = option.part
        if not any(
            o.part.retained <= part.retained and o.part.peak <= part.peak for o, _ in useful
        ):
            useful.append((option, seconds))
    return useful


def _keep_fastest(states: Iterable[_State], limit: float) -> list[_State]:
    """Return the fastest state for each amount retained, if none that retains less is as fast."""
    fastest: dict[int, _State] = {}
    for state in states:
        amount = int(state.part.retained / limit * _FRONT)
        if amount not in fastest or state.seconds < fastest[amount].seconds:
            fastest[amount] = state
    kept: list[_State] = []
    for amount in sorted(fastest):
        if not kept or fastest[amount].seconds < kept[-1].seconds:
            kept.append(fastest[amount])
    return kept


# The ways of a stage


def list_ways(stage: MomentumSequential, courses: Courses) -> Iterator[_Option]:
    """Yield what ``stage`` takes in each way that may be worth it.

    Any number of blocks at its end may be stored; those before are treated alike.
    """
    ends = [Part()]
    for course in reversed(courses[STORE]):
        ends.append(Part.of(course).then(ends[-1]))
    yield _Option(STORE, ends[-1])
    units = split_units([*stage._modules.values()])
    stops = [*accumulate(map(len, units), initial=0)]
    beginnings = [_list_checkpoints(courses, stops, CHECKPOINT), _list_segments(courses, stops)]
    if stage.followed:
        beginnings.append(_list_reversed(courses, stops, stage.followed))
    else:
        beginnings.append(_list_checkpoints(courses, stops, IN_PARTS))
        beginnings.append(_list_groups(courses, stops))
    for way, stop, part in chain(*beginnings):
        stored = len(stage) - stop
        yield _Option(replace(way, stored=stored), part.then(ends[stored]))


# A way, and what it takes up to a block.
_Beginnings = Iterator[tuple[Way, int, Part]]


def _list_checkpoints(courses: Courses, stops: Sequence[int], like: Way) -> _Beginnings:
    part = Part()
    for start, stop in pairwise(stops):
        part = part.then(_follow(courses[like][start:stop]))
        yield replace(like, strategy="checkpoint"), stop, part


def _list_segments(courses: Courses, stops: Sequence[int]) -> _Beginnings:
    for stop in stops[1:]:
        blocks = courses[CHECKPOINT][:stop]
        yield Way("segment"), stop, _recompute(blocks, blocks, again=True)


def _list_reversed(courses: Courses, stops: Sequence[int], runs: Sequence[Run]) -> _Beginnings:
    """Yield beginnings whose runs are reversed; an end within one keeps the next input."""
    starts = [run.start for run in runs]
    for way in (MOMENTUM, IN_PARTS):
        part = Part()
        for start, stop in pairwise(stops):
            part = part.then(_follow(courses[way][start:stop]))
            if stop > starts[0] and stop not in starts:
                is_inside = any(run.start < stop < run.stop for run in runs)
                kept = _kept(courses[CHECKPOINT][stop - 1]) if is_inside else 0
                yield way, stop, part.then(Part(kept, kept))


def _list_groups(courses: Courses, stops: Sequence[int]) -> _Beginnings:
    """Yield checkpoints and segments of several blocks: for each number of them, the shortest."""
    count = len(stops) - 1
    for length in sorted({math.ceil(count / groups) for groups in range(1, count)} - {1}):
        bounds = [*stops[:-1:length], stops[-1]]
        for way, single, repeated in (
            (Way("checkpoint", length), CHECKPOINT, STORE),
            (Way("segment", length), CHECKPOINT, CHECKPOINT),
            (Way("segment", length, in_parts=True), IN_PARTS, IN_PARTS),
        ):
            part = Part()
            for start, stop in pairwise(bounds):
                first, second = (courses[like][start:stop] for like in (single, repeated))
                again = way.strategy == "segment"
                part = part.then(_recompute(first, second, again=again))
                yield way, stop, part


def _recompute(first: Sequence[Course], repeated: Sequence[Course], *, again: bool) -> Part:
    """Return the part of a step of blocks that keep the input of the first one alone.

    Their forward pass is like ``first``, and in backward what ``repeated`` retain comes to be
    alive, one after another; ``again``, they run once more for that.
    """
    retained = peak = 0
    work = Work()
    for course in first:
        peak = max(peak, retained + course.forward)
        retained += course.retained
        work += course.work
    outputs = sum(map(_kept, first[:-1]))
    held = 0
    for course in repeated:
        peak = max(peak, held + course.backward, held + course.forward + course.output)
        held += course.retained
    if again:
        work = reduce(Work.__add__, (course.forward_work for course in first[:-1]), work)
    return Part(retained - outputs, peak, work)


def _kept(course: Course) -> int:
    """Return the bytes of the block's output, if it is retained."""
    return min(course.output, course.retained)
