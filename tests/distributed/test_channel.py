"""Frames between processes: what arrives is what was sent, in order, with bounded memory, at the speed of the link."""

from __future__ import annotations

import json

from crew import Crew

ALL_KINDS = """
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
          torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (3, 0, 5), (7, 11), ((1 << 20) + 1,), (3, (1 << 19) + 3)]

def numbers(shape, dtype, seed):
    count = 1
    for size in shape:
        count *= size
    values = (torch.arange(count) * 7 + seed) % 2
    return values.to(dtype).reshape(shape)

def frames():
    for index, dtype in enumerate(DTYPES):
        header = {"index": index, "text": "ä\\n\\u0000", "none": None, "half": 0.5}
        yield f"kind-{index}", header, [numbers(shape, dtype, index) for shape in SHAPES]
    yield "empty", {}, []
    yield "long", {"text": "x" * (3 << 20), "list": list(range(1000))}, [torch.ones(3)]
    for index in range(300):
        yield "many", {"index": index}, [torch.full((index,), index)]

def same(one, other):
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)) if one.numel() else True

def body(ranks):
    to, source = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sender, receiver = ranks.sender(to), ranks.receiver(source)
    for kind, header, tensors in frames():
        sender.send(kind, {**header, "rank": ranks.rank}, tensors)
    count = 0
    for kind, header, tensors in frames():
        frame = receiver.receive()
        assert (frame.kind, frame.header) == (kind, {**header, "rank": source}), (frame.kind, kind)
        assert len(frame.tensors) == len(tensors)
        assert all(same(one, other) for one, other in zip(frame.tensors, tensors)), kind
        count += 1
    sender.flush()
    assert (sender.num_frames, receiver.num_frames) == (count, count)
    assert sender.num_bytes == receiver.num_bytes > 100_000_000
    assert sender.busy_seconds > 0 and receiver.busy_seconds > 0
    say("the same", count)

run(body)
"""


def test_frames_of_all_dtypes_and_sizes_arrive_in_order_on_a_ring(crew: Crew) -> None:
    crew.start(3, ALL_KINDS)
    crew.end_well()
    assert all("the same 317\n" in crew.printed(rank) for rank in range(3))


BACKPRESSURE = """
MIB = 1 << 20

def body(ranks):
    if ranks.rank == 0:
        sender = ranks.sender(1)
        sender._most_bytes = 4 * MIB
        for index in range(64):
            sender.send("block", {"index": index}, [torch.full((MIB,), index % 100, dtype=torch.uint8)])
            if index == 30:
                say("too many")
        say("all sent")
    else:
        receiver = ranks.receiver(0)
        receiver._most_bytes = 4 * MIB
        arrived = threading.Event()
        receiver.on_arrival = arrived.set
        assert arrived.wait(30)
        for _ in range(40):  # longer than a silent connection is endured
            time.sleep(0.1)
            assert receiver._waiting_bytes <= 4 * MIB + 4096, receiver._waiting_bytes
        say("waited", receiver.num_frames)
        while "go on" not in open(os.environ["GO"]).read():
            time.sleep(0.01)
        for index in range(64):
            frame = receiver.receive()
            assert frame.header == {"index": index} and frame.tensors[0][0] == index % 100

run(body)
"""


def test_a_receiver_that_takes_nothing_holds_the_sender_up_and_nobody_takes_that_for_a_loss(crew: Crew, tmp_path: object) -> None:
    go = f"{tmp_path}/go"
    with open(go, "w") as file:  # noqa: PTH123
        file.write("wait")
    crew.start(2, BACKPRESSURE, silence=2.0, GO=go)
    crew.wait_for(1, "waited")
    assert "too many" not in crew.printed(0)  # 4 MiB at each end, and the window between them
    with open(go, "w") as file:  # noqa: PTH123
        file.write("go on")
    crew.end_well()


SHAPED = """
def body(ranks):
    if ranks.rank == 0:
        sender, receiver = ranks.sender(1), ranks.receiver(1)
        sender.send("warm", {}, [])
        receiver.receive()
        start = time.monotonic()
        sender.send("ping", {}, [])
        receiver.receive()
        trip = time.monotonic() - start
        start, cpu = time.monotonic(), time.process_time()
        for index in range(20):
            sender.send("block", {}, [torch.zeros(250_000, dtype=torch.uint8)])
        receiver.receive()
        say(json.dumps({"trip": trip, "blocks": time.monotonic() - start, "busy": sender.busy_seconds, "bytes": sender.num_bytes}))
    else:
        sender, receiver = ranks.sender(0), ranks.receiver(0)
        for _ in range(2):
            receiver.receive()
            sender.send("answer", {}, [])
        for _ in range(20):
            receiver.receive()
        sender.send("answer", {}, [])

run(body)
"""


def test_an_artificial_link_has_its_latency_and_rate_and_frames_follow_each_other_on_it(crew: Crew) -> None:
    crew.start(2, SHAPED, FLEXGEN_LINK="200ms,80Mbit")
    crew.end_well()
    measured = json.loads(crew.printed(0).partition("\n")[0])
    assert measured["trip"] >= 2 * 0.2
    # 20 frames of 250,000 bytes at 10 MB/s and two latencies; frame by frame it would be 20 latencies.
    assert 20 * 250_000 / 10e6 + 2 * 0.2 <= measured["blocks"] < 20 * (250_000 / 10e6 + 0.2)
    assert measured["busy"] >= measured["bytes"] / 10e6 * 0.999


BAD = """
from flexgen.distributed import frames
from flexgen.distributed.frames import Limits

def spoiled(kind, header, tensors, limits):
    data = eval(os.environ["HEADER"])
    return [frames._bytes_of(frames.LENGTH.pack(eval(os.environ["LENGTH_OF_IT"])) + data[:frames.FIRST_BYTES])]

def body(ranks):
    if ranks.rank == 0:
        from flexgen.distributed import channel
        channel.messages_of = spoiled
        ranks.sender(1).send("x", {}, [])
        ranks.receiver(1).receive()
    else:
        before = torch.empty
        def empty(shape, **keywords):
            assert shape in (1, frames.CHUNK_BYTES), "memory was taken"
            return before(shape, **keywords)
        torch.empty = empty
        ranks.sender(0)
        ranks.receiver(0).receive()

run(body, limits=Limits(header_bytes=1 << 20, tensor_bytes=1 << 20))
"""


def test_a_bad_header_ends_the_run_and_names_who_sent_it(crew: Crew) -> None:
    header = json.dumps({"kind": "x", "header": {}, "tensors": [["float32", [1 << 40]]]})
    crew.start(2, BAD, HEADER=f"{header!r}.encode()", LENGTH_OF_IT="len(data)")
    for rank in range(2):
        assert crew.wait(rank) == 75, crew.printed(rank)
        said = crew.printed(rank)
        assert "StageError: rank 0 on " in said
        assert "announced a frame (x) with tensors of 4.0 TiB, and at most 1.0 MiB are allowed, which rank 1 on " in said


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(crew: Crew) -> None:
    crew.start(2, BAD, HEADER="b'{}'", LENGTH_OF_IT="1 << 40")
    for rank in range(2):
        assert crew.wait(rank) == 75, crew.printed(rank)
        assert "announced a header of 1.0 TiB, and at most 1.0 MiB are allowed" in crew.printed(rank)


REFUSED = """
from flexgen.distributed.frames import Limits
from flexgen.errors import EngineError

def body(ranks):
    if ranks.rank == 0:
        sender = ranks.sender(1)
        for header, tensors in (
            ({"text": "x" * (1 << 20)}, []), ({}, [torch.zeros(1 << 20)]), ({1: {2}}, []),
            ({}, [torch.zeros(1, dtype=torch.cfloat)]), ({}, [torch.zeros(1, device="meta")]),
        ):
            try:
                sender.send("x", header, tensors)
            except EngineError as error:
                say(error)
        sender.send("good", {}, [torch.arange(12).reshape(3, 4).t()])
    else:
        frame = ranks.receiver(0).receive()
        assert frame.tensors[0].tolist() == torch.arange(12).reshape(3, 4).t().tolist()

run(body, limits=Limits(header_bytes=1 << 20, tensor_bytes=1 << 20))
"""


def test_what_cannot_be_sent_is_refused_where_it_is_sent_and_the_channel_goes_on(crew: Crew) -> None:
    crew.start(2, REFUSED)
    crew.end_well()
    said = crew.printed(0).splitlines()
    assert said[:2] == [
        "a frame (x) has a header of 1.0 MiB, and at most 1.0 MiB are allowed",
        "a frame (x) has tensors of 4.0 MiB, and at most 1.0 MiB are allowed",
    ]
    assert said[2].startswith("the header of a frame (x) cannot be written as JSON: ")
    assert said[3:5] == [
        "a tensor of torch.complex64 on cpu cannot be sent to another rank",
        "a tensor of torch.float32 on meta cannot be sent to another rank",
    ]
