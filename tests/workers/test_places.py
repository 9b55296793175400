"""Places of the landing: nobody is given what another may still write, and none is lost for ever.

The encoders are made up, and do at random whatever processes do: also answer late, die, hang, and
not end. So is the clock.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from gllm_engine import wire, write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.config import EngineConfig, settle
from gllm_engine.types import ImagePixels, LandingHandle
from gllm_engine.workers import channel
from gllm_engine.workers import encoders as engine_side
from gllm_engine.workers.encoders import Encoders, Landed

TOKENS, NUMBERS = 32, 6


class Child:
    """A process. `told`: what the engine has sent it and it has not answered."""

    def __init__(self, world: World, pid: int, number: int | None) -> None:
        self.pid = pid
        self.number = number  # None: of another machine
        self.identity = f"{pid}".encode()
        self.returncode: int | None = None
        self.is_killed = False
        self.is_stuck = False
        self.told: list[tuple[ImagePixels, int]] = []
        self.has_joined = False
        self.is_ready = False
        self.is_leaving = False
        self._world = world

    @property
    def is_connected(self) -> bool:
        return self.has_joined and not self.is_killed and self.returncode is None

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.is_killed = True
        if not self.is_stuck:
            self.end()

    def end(self) -> None:
        self.returncode = -9
        self.told.clear()

    def hear(self, message: Any) -> None:
        if isinstance(message, wire.Encode):
            self.told += zip(message.images, message.places, strict=True)
        elif isinstance(message, wire.Leave):
            self.end()


class World:
    """In place of the module `time`, of a Meeting, and of its sockets."""

    def __init__(self, rng: random.Random, model: Path, side: int) -> None:
        self.rng = rng
        self.side = side
        self.is_calm = False  # nothing goes wrong any more
        self.now = 1000.0
        self.children: list[Child] = []
        self.everybody: list[Child] = []
        self.monitors: list[Any] = []
        self.inbox: list[tuple[Any, bytes, Any]] = []
        self.sockets = [SimpleNamespace(send_multipart=self._send) for _ in range(2)]
        self.in_doubt = False
        self.join = wire.Join(
            wire.PROTOCOL, channel.rank_software(), channel.digest(model), 0, 0, 0, 0, "encoder"
        )

    def monotonic(self) -> float:
        return self.now

    def open_to_others(self, *_: Any) -> None:
        return

    def end(self) -> None:
        return

    def start(self, module: str, arguments: list[str], environment: dict[str, str]) -> Child:
        child = self.new(int(arguments[-1]))
        self.children.append(child)
        if self.now == 1000.0:  # the engine's start waits for these
            self.join_and_load(child)
        return child

    def new(self, number: int | None) -> Child:
        child = Child(self, len(self.everybody), number)
        self.everybody.append(child)
        return child

    def join_and_load(self, child: Child) -> None:
        if not child.has_joined:
            child.has_joined = True
            self.say(child, msgspec.structs.replace(self.join, local_rank=child.number or 0))
        elif not child.is_ready:
            child.is_ready = True
            self.say(child, wire.EncoderReady())
            return
        if self.now == 1000.0:
            self.join_and_load(child)

    def say(self, child: Child, message: Any) -> None:
        self.inbox.append((self.sockets[child.number is None], child.identity, message))

    def receive(self, timeout_ms: int) -> Any:
        while self.inbox:
            yield self.inbox.pop(0)
        self.now += 0.01

    def _send(self, frames: list[bytes]) -> None:
        child = self.everybody[int(frames[0])]
        if not child.is_connected:
            raise zmq.ZMQError
        child.hear(wire.decode(frames[1:]))

    def step(self) -> None:
        """Something happens to a process."""
        rng = self.rng
        fails = lambda share: not self.is_calm and rng.random() < share  # noqa: E731
        self.now += rng.choice([0.0, 0.1, 1.0])
        living = [child for child in self.everybody if child.returncode is None]
        child = rng.choice(living) if living and not fails(0.05) else self.new(None)
        self.in_doubt = rng.random() < 0.5
        if child.is_killed:
            if rng.random() < 0.1:
                child.end()
        elif not child.is_ready:
            self.join_and_load(child)
        elif fails(0.04):
            child.is_stuck = child.number is not None and rng.random() < 0.5
            child.kill()
            self.in_doubt = True
        elif fails(0.02):
            child.is_leaving = True
            self.say(child, wire.Leave())
        elif fails(0.02):
            odd = [wire.Failed(0, "it fails"), wire.Encoded(10**6), wire.Ping(), self.join]
            self.say(child, rng.choice(odd))
        elif child.told:
            image, _ = child.told.pop(0)
            if fails(0.1):
                self.say(child, wire.NotEncoded(image.number, "it is broken"))
            else:
                size = 4 * NUMBERS * self.tokens_of(image) - fails(0.1)
                sent = b"" if child.number is not None else bytes(size)
                self.say(child, wire.Encoded(image.number, sent))

    def tokens_of(self, image: ImagePixels) -> int:
        return image.height * image.width // self.side**2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(path, "Qwen3VLForConditionalGeneration", seed=4)


class Engine:
    """What it knows of its images."""

    def __init__(self, world: World) -> None:
        self.encoders: Encoders
        self.world = world
        self.asked: dict[int, ImagePixels] = {}  # that are wanted and not done
        self.held: dict[int, ImagePixels] = {}  # by place
        self.cancelled: dict[int, ImagePixels] = {}
        self.num = 0
        self.num_landed = 0

    def act(self) -> None:
        rng = self.world.rng
        side = self.world.side
        if rng.random() < 0.5:
            rows, columns = rng.choice([(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)])
            image = ImagePixels(self.num, rows * side, columns * side, b"")
            self.num += 1
            self.asked[image.number] = image
            self.encoders.submit(image)
        elif self.asked and rng.random() < 0.3:
            number = rng.choice(list(self.asked))
            self.cancelled[number] = self.asked.pop(number)
            self.encoders.cancel(number)
        elif self.held and rng.random() < 0.7:
            place = rng.choice(list(self.held))
            del self.held[place]
            self.encoders.release([place])
        self.poll()

    def land(self, place: int, embeddings: bytes) -> None:
        if not self.world.is_calm and self.world.rng.random() < 0.05:
            raise BrokenPipeError

    def poll(self) -> None:
        try:
            events = self.encoders.poll()
        except BrokenPipeError:  # a failed step: everything is forgotten, as Engine does
            for number in self.asked:
                self.encoders.cancel(number)
            self.cancelled |= self.asked
            self.asked.clear()
            return
        for event in events:
            known = self.asked if event.number in self.asked else self.cancelled
            image = known.pop(event.number)
            if isinstance(event, Landed):
                self.num_landed += 1
                self.held[event.place] = image
        self.check()

    def check(self) -> None:
        """No two may write or read one token of the landing, and nobody has joined twice."""
        identities = [each.identity for each in self.encoders._encoders]
        assert len(set(identities)) == len(identities)
        used: set[int] = set()
        writers = [child.told for child in self.world.everybody if child.number is not None]
        spans = [(place, image) for told in writers for image, place in told]
        for place, image in [*spans, *self.held.items()]:
            span = {place + i for i in range(self.world.tokens_of(image))}
            assert not span & used and max(span) < TOKENS
            used |= span


@pytest.mark.parametrize("seed", range(8))
def test_places(model: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    arch = read_arch(model)
    assert arch.vision is not None
    side = arch.vision.patch * arch.vision.merge
    world = World(random.Random(seed), model, side)
    monkeypatch.setattr(engine_side, "time", world)
    monkeypatch.setattr(engine_side, "Meeting", lambda: world)
    config = EngineConfig(
        model=str(model), device="cpu", encoder_workers=2, cluster_key_file="/", master_addr="::1"
    )
    config = settle(config, None, 0)
    handle = LandingHandle(TOKENS, NUMBERS, "float32", 4, "")
    engine = Engine(world)
    engine.encoders = encoders = Encoders(config, arch, [handle], engine.land)
    for _ in range(600):
        engine.act()
        world.step()
    world.is_calm = True
    for _ in range(1500):
        world.step()
        encoders.release(list(engine.held))
        engine.held.clear()
        engine.poll()
    assert not engine.asked and encoders.stats()[1:] == (0, 0, 0)
    assert not encoders._taken and not encoders._jobs and engine.num_landed > 50
