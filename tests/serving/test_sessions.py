"""Requests of one session that overlap."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from openvla_hf.serving.errors import Superseded
from openvla_hf.serving.policy import ServedPolicy
from openvla_hf.serving.service import Service


@pytest.fixture
def policy(chunk_policy):
    """A policy that averages the chunks of a session."""
    return ServedPolicy(chunk_policy.model, chunk_policy.processor, ensemble=0.1)


def hold(policy, name, is_held):
    """Make calls of a method wait, if `is_held` of their argument, until the event that is returned is set."""
    method, gate = getattr(policy, name), threading.Event()

    def wait(argument):
        if is_held(argument):
            assert gate.wait(20)
        return method(argument)

    setattr(policy, name, wait)
    return gate


def with_session(policy, run):
    """Run a coroutine function with a service and a session."""

    async def main():
        service = Service(policy)
        await service.start()
        try:
            return await run(service, service.open_session())
        finally:
            await service.stop()

    return asyncio.run(asyncio.wait_for(main(), 30))


def in_a_new_session(policy, observations):
    """Return the actions that a robot gets which sends these observations only."""
    session = policy.open_session()
    return [session.receive(*policy.predict([policy.prepare(session.observe(one))])) for one in observations]


@pytest.mark.parametrize("starts_by", ["reset", "instruction"])
def test_a_late_prediction_stays_out_of_the_next_episode(policy, make_observation, starts_by):
    first, *seen = (make_observation(policy, seed) for seed in range(3))
    if starts_by == "instruction":
        seen = [dataclasses.replace(one, instruction="open the drawer") for one in seen]

    async def run(service, session):
        queued = threading.Semaphore(0)
        gate = hold(policy, "predict", lambda batch: queued.release() or True)
        late = asyncio.create_task(service.act(first, session))
        assert await asyncio.to_thread(queued.acquire, timeout=20)
        if starts_by == "reset":
            service.reset_session(session)
        newest = asyncio.create_task(service.act(seen[0], session))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(Superseded, match="new episode"):
            await late
        return [(await newest).actions, (await service.act(seen[1], session)).actions]

    actions = with_session(policy, run)
    np.testing.assert_array_equal(actions, in_a_new_session(policy, seen))


def test_an_observation_that_takes_longer_to_prepare_does_not_replace_a_newer_one(policy, make_observation):
    slow, *seen = (make_observation(policy, seed) for seed in range(3))

    def first(observation):
        return next(iter(observation.images.values()))

    async def run(service, session):
        gate = hold(policy, "prepare", lambda observation: first(observation) is first(slow))
        late = asyncio.create_task(service.act(slow, session))
        await asyncio.sleep(0)
        newest = (await service.act(seen[0], session)).actions
        gate.set()
        with pytest.raises(Superseded, match="newer observation"):
            await late
        return [newest, (await service.act(seen[1], session)).actions]

    actions = with_session(policy, run)
    np.testing.assert_array_equal(actions, in_a_new_session(policy, seen))
