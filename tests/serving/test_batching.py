import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch

from openvla_hf.serving.batching import Batcher
from openvla_hf.serving.errors import Busy, PredictionFailed, ShuttingDown, Superseded


class Gate:
    """Stands for a policy: each prediction waits until the test opens the gate. Observations are their own answers."""

    def __init__(self):
        self.batches, self.gate, self.entered = [], threading.Semaphore(0), threading.Semaphore(0)

    def predict(self, prepared):
        self.batches.append(list(prepared))
        self.entered.release()
        self.gate.acquire()
        for one in prepared:
            if isinstance(one, Exception):
                raise one
        return prepared


def scenario(run, **options):
    """Run a coroutine function with a gate and a batcher in front of it."""

    async def main():
        gate = Gate()
        batcher = Batcher(gate, **options)
        batcher.start()
        try:
            await run(SimpleNamespace(gate=gate, batcher=batcher, ask=lambda *args: start(batcher, *args)))
        finally:
            gate.gate.release(100)
            await batcher.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def start(batcher, observation, robot=None):
    return asyncio.ensure_future(batcher.predict(observation, robot))


async def busy(it, *args):
    """Start a request and wait until the policy works on it."""
    asked = it.ask(*args)
    await asyncio.to_thread(it.gate.entered.acquire)
    return asked


def test_requests_that_come_during_a_prediction_share_the_next_batch():
    async def run(it):
        first = await busy(it, "first")
        rest = [it.ask(number) for number in range(5)]
        it.gate.gate.release(100)
        assert (await first).batch_size == 1
        answers = [await one for one in rest]
        assert [one.prediction for one in answers] == [0, 1, 2, 3, 4]
        assert [one.batch_size for one in answers] == [3, 3, 3, 2, 2]
        assert it.gate.batches == [["first"], [0, 1, 2], [3, 4]]

    scenario(run, max_batch=3)


def test_active_robots_are_waited_for():
    async def run(it):
        it.gate.gate.release(100)
        await asyncio.gather(it.ask("a1", "a"), it.ask("b1", "b"))
        late = it.ask("a2", "a")
        await asyncio.sleep(0.02)
        await asyncio.gather(late, it.ask("b2", "b"))
        assert it.gate.batches[-1] == ["a2", "b2"]

    scenario(run, max_wait=20.0)


def test_a_robot_alone_waits_for_nothing_even_if_others_have_left():
    async def run(it):
        it.gate.gate.release(100)
        await asyncio.gather(it.ask("a1", "a"), it.ask("b1", "b"))
        it.batcher.forget("b")
        await it.batcher.predict("a2", "a")
        assert it.gate.batches == [["a1", "b1"], ["a2"]]

    scenario(run, max_wait=60.0)


def test_a_silent_robot_is_waited_for_at_most_as_long_as_allowed():
    async def run(it):
        it.gate.gate.release(100)
        await asyncio.gather(it.ask("a1", "a"), it.ask("b1", "b"))
        await it.batcher.predict("a2", "a")
        assert it.gate.batches == [["a1", "b1"], ["a2"]]

    scenario(run, max_wait=0.05)


def test_a_full_queue_refuses():
    async def run(it):
        first = await busy(it, "first")
        waiting = [it.ask(0), it.ask(1)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="queue is full") as raised:
            await it.batcher.predict(2)
        assert raised.value.retry_after > 0
        it.gate.gate.release(100)
        await asyncio.gather(first, *waiting)

    scenario(run, max_queue=2)


def test_a_newer_request_of_a_robot_takes_the_place_of_its_waiting_one():
    async def run(it):
        first = await busy(it, "first")
        stale, other = it.ask("stale", "a"), it.ask("other", "b")
        await asyncio.sleep(0)
        newest = it.ask("newest", "a")
        with pytest.raises(Superseded):
            await stale
        it.gate.gate.release(100)
        assert (await newest).prediction == "newest"
        await asyncio.gather(first, other)
        assert it.gate.batches == [["first"], ["newest", "other"]]

    scenario(run)


def test_a_robot_that_asks_again_and_again_delays_nobody(monkeypatch):
    monkeypatch.setattr("openvla_hf.serving.batching.RECENT", 60.0)

    async def run(it):
        it.gate.gate.release(100)
        await it.batcher.predict("silent", "c")
        asked = [it.ask("a", "a")]
        other = it.ask("b", "b")
        while not other.done():
            await asyncio.sleep(0.01)
            asked.append(it.ask("a", "a"))
        await asyncio.gather(*asked, return_exceptions=True)
        assert it.gate.batches[1] == ["a", "b"]

    scenario(run, max_wait=0.05)


def test_a_client_that_has_gone_leaves_the_queue():
    async def run(it):
        first = await busy(it, "first")
        gone, other = it.ask("gone"), it.ask("other")
        await asyncio.sleep(0)
        gone.cancel()
        it.gate.gate.release(100)
        await asyncio.gather(first, other)
        assert it.gate.batches == [["first"], ["other"]]

    scenario(run)


def test_a_client_that_has_gone_takes_no_equal_request_of_another_with_it():
    async def run(it):
        first = await busy(it, "first")
        seen = torch.zeros(2)
        other, gone = it.ask(seen), it.ask(seen)
        await asyncio.sleep(0)
        gone.cancel()
        it.gate.gate.release(100)
        assert (await first).batch_size == (await other).batch_size == 1

    scenario(run)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_fails_its_batch_alone(error):
    async def run(it):
        first = await busy(it, "first")
        failing = [it.ask("fine"), it.ask(error)]
        it.gate.gate.release(100)
        await first
        for one in failing:
            with pytest.raises(Busy, match="Out of memory in a batch of 2"):
                await one
        assert (await it.batcher.predict("next")).prediction == "next"

    scenario(run)


def test_an_observation_that_fails_does_not_spoil_its_batch():
    async def run(it):
        first = await busy(it, "first")
        failing, fine = it.ask(ValueError("The model's output is not finite")), it.ask("fine")
        it.gate.gate.release(100)
        await first
        with pytest.raises(PredictionFailed, match="not finite"):
            await failing
        assert (await fine).prediction == "fine"

    scenario(run)


def test_the_queue_goes_on_after_an_error_that_nobody_expected():
    async def run(it):
        first = await busy(it, "first")
        failing = it.ask(KeyError("choices"))
        it.gate.gate.release(100)
        await first
        with pytest.raises(PredictionFailed, match="KeyError: 'choices'"):
            await failing
        assert (await it.batcher.predict("next")).prediction == "next"

    scenario(run)


def test_closing_answers_what_waits_and_refuses_what_comes():
    async def run(it):
        first = await busy(it, "first")
        waiting = it.ask("waiting")
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(it.batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await it.batcher.predict("late")
        it.gate.gate.release(100)
        await closing
        assert [(await one).prediction for one in (first, waiting)] == ["first", "waiting"]

    scenario(run)
