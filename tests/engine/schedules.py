"""Random schedules of requests on a fake device, and what each request gets alone."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from engines import TINY, Driver, num_leaked_blocks
from fake_device import VOCAB_SIZE, FakeDevice, FakePipelinedDevice
from hypothesis import strategies as st

from autobot_llm.engine.batching.preemption import SwapSpace
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.tokenizer import Tokenizer

SIZE = 4
END_TOKEN = 39  # "C"; the model draws each of 40 tokens about as often
CONFIG = load_config(TINY)
TOKENIZER = Tokenizer.from_folder(TINY)


def engine_on(
    device: FakeDevice,
    num_blocks: int,
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 32,
    prefix_caching: bool = True,
    num_swap_blocks: int = 0,
    scheduling_policy: Any = "fcfs",
) -> Engine:
    pool = BlockPool(num_blocks, SIZE, prefix_caching=prefix_caching)
    device.pool = pool
    scheduler = Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        scheduling_policy=scheduling_policy,
        swap_space=SwapSpace(device, max_bytes=num_swap_blocks * 8, bytes_per_block=8) if num_swap_blocks else None,
    )
    return Engine(CONFIG, TOKENIZER, device, scheduler, Sampler(VOCAB_SIZE), bytes_per_block=8)


@lru_cache(maxsize=10_000)
def alone(request: str, build: Callable[[], EngineRequest]) -> dict[int, tuple[str, int, str | None]]:
    """What a request gets from a synchronous engine that serves nobody else."""
    engine = engine_on(FakeDevice(32, SIZE), 32)
    driver = Driver(engine)
    driver.add(0, build())
    driver.run()
    return {i: (driver.texts[0, i], end.num_tokens, end.end) for (_, i), end in driver.ended.items()}


@dataclass(frozen=True)
class Arrival:
    """A request of the random schedules: few prefixes and token ids, so that prompts share much."""

    prefix: int = 0
    num_shared: int = 5
    own: tuple[int, ...] = (20,)
    max_tokens: int = 6
    salt: str = ""
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    num_logprobs: int | None = None
    priority: int = 0

    def request(self) -> EngineRequest:
        prompt = [20 + (self.prefix + i) % 3 for i in range(self.num_shared)] + list(self.own)
        params = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            num_logprobs=self.num_logprobs,
            stop_token_ids=frozenset({END_TOKEN}),
        )
        seeds = range(self.num_choices)
        choices = tuple(dataclasses.replace(params, seed=seed) for seed in seeds)
        return EngineRequest(prompt, choices, stop=self.stop, salt=self.salt, priority=self.priority)


class Check(Driver):
    """Drives an engine, and compares what comes out with what each request gets alone."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.arrivals: dict[int, Arrival] = {}
        self.aborted: set[int] = set()

    def arrive(self, arrival: Arrival) -> int:
        request_id = len(self.arrivals)
        self.arrivals[request_id] = arrival
        self.add(request_id, arrival.request())
        return request_id

    def abort(self, request_id: int) -> None:
        self.engine.abort(request_id)
        self.aborted.add(request_id)

    def open_requests(self) -> list[int]:
        return list(self.engine._requests)

    def play(self, actions: Iterable[Arrival | Steps | Abort]) -> None:
        """Does what a random schedule says; the requests left open are for `finish`."""
        for action in actions:
            match action:
                case Arrival():
                    self.arrive(action)
                case Steps(num_steps):
                    for _ in range(num_steps):
                        self.step()
                case Abort(which) if self.open_requests():
                    self.abort(self.open_requests()[which % len(self.open_requests())])

    def step(self) -> None:
        super().step()
        pool = self.engine.scheduler.block_pool
        held = [block for choice in self.engine._choices.values() for block in choice.sequence.block_ids]
        assert pool.num_blocks - pool.num_free == len(set(held))

    def finish(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to an end"
        assert num_leaked_blocks(self.engine) == 0
        scheduler = self.engine.scheduler
        assert scheduler.num_running == scheduler.num_waiting == 0
        assert scheduler.swap_space is None or scheduler.swap_space.num_blocks == 0
        for request_id, arrival in self.arrivals.items():
            if request_id in self.aborted:
                continue
            expected = alone(repr(arrival), arrival.request)
            for index in range(arrival.num_choices):
                end = self.ended[request_id, index]
                assert (self.texts[request_id, index], end.num_tokens, end.end) == expected[index], arrival
        self.check_published()

    def check_published(self) -> None:
        """Every prefix that somebody could find holds the tokens that it is found under."""
        device = self.engine.executor
        assert isinstance(device, FakeDevice)
        if isinstance(device, FakePipelinedDevice):
            device.drain()
        for entry in self.engine.scheduler.block_pool._index.values():
            assert device.cache[device.slots(entry.block_id)] == array("q", entry.tokens).tolist()


@dataclass(frozen=True)
class Steps:
    num_steps: int


@dataclass(frozen=True)
class Abort:
    which: int


def crowded_arrival(rng: random.Random) -> Arrival:
    """A request of the crowded schedules, where everything that can go wrong is known to happen."""
    return Arrival(
        prefix=rng.randrange(3),
        num_shared=rng.randrange(15),
        own=tuple(rng.choices(range(20, 26), k=rng.randint(1, 5))),
        max_tokens=rng.randint(1, 12),
        num_choices=rng.choice([1, 1, 2, 3]),
        stop=rng.choice([(), ("7",), ("&", ":", "=")]),
        temperature=rng.choice([0.0, 1.0]),
    )


arrivals = st.builds(
    Arrival,
    prefix=st.integers(0, 2),
    num_shared=st.integers(0, 14),
    own=st.lists(st.integers(20, 25), min_size=1, max_size=5).map(tuple),
    max_tokens=st.integers(1, 12),
    salt=st.sampled_from(["", "", "other"]),
    num_choices=st.sampled_from([1, 1, 1, 2, 3]),
    stop=st.sampled_from([(), (), ("7",), ("A", "!2"), ("&", ":", "=")]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    num_logprobs=st.sampled_from([None] * 12 + [0]),
    priority=st.integers(-1, 1),
)
actions = st.lists(
    st.one_of(arrivals, arrivals, st.builds(Steps, st.integers(1, 6)), st.builds(Abort, st.integers(0, 30))),
    min_size=3,
    max_size=30,
)
